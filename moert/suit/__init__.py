"""Whether a model suits expert offloading: what its routing says, before any hardware is bought."""

from __future__ import annotations

from moert.suit.forecast import Forecast, enough_for, forecast, sweet_spot
from moert.suit.statistics import Consistency, ConsistencyMeter, Estimate, Segments
from moert.suit.verdict import describe

__all__ = [
    "Consistency",
    "ConsistencyMeter",
    "Estimate",
    "Forecast",
    "Segments",
    "describe",
    "enough_for",
    "forecast",
    "sweet_spot",
]
