"""What a report is made of: the numbers of one `moert simulate`, ready to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""A result as `moert simulate --json` prints it."""


@dataclass(frozen=True)
class CurveLine:
    """A policy's miss-ratio curve."""

    policy: str
    capacities: Sequence[float]
    """Shares of all experts, ascending, 0 to 1."""
    miss_ratio: Sequence[float]
    is_bound: bool


@dataclass(frozen=True)
class LayerUse:
    """A layer of the trace, and what became of it in each capacity."""

    name: str
    num_experts: int
    use: Sequence[float]
    """Each expert's share of the layer's picks, the most used first."""
    hit_rate: Sequence[float | None]
    """At each of the study's heat-map capacities; None where nothing was counted."""


@dataclass(frozen=True)
class TraceStudy:
    """Everything about one trace."""

    name: str
    facts: Sequence[tuple[str, str]]
    """What it is, in words."""
    rows: Sequence[Row]
    curves: Sequence[CurveLine]
    compulsory: float | None
    """The share of accesses that no cache can serve, because they are an expert's first; None: not drawn."""
    marks: Sequence[float]
    """The capacities that were asked for, as shares of all experts."""
    heat_policy: str
    heat_capacities: Sequence[str]
    layers: Sequence[LayerUse]


@dataclass(frozen=True)
class Study:
    """A whole report."""

    command: str
    """The line that makes it again."""
    version: str
    made: str
    """When, in words."""
    settings: Sequence[tuple[str, str]]
    notes: Sequence[str]
    """How the numbers were made, a sentence or two each."""
    traces: Sequence[TraceStudy]
