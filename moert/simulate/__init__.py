"""Replay of traces against policies: the engine's own decisions, for any capacity. Needs numpy and numba, no torch."""

from __future__ import annotations

from moert.simulate.capacity import Capacity, parse_capacity
from moert.simulate.curve import Curve, miss_curve
from moert.simulate.fast import fast_policies
from moert.simulate.results import Result
from moert.simulate.run import simulate
from moert.simulate.sweep import sweep

__all__ = ["Capacity", "Curve", "Result", "fast_policies", "miss_curve", "parse_capacity", "simulate", "sweep"]
