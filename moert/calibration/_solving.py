"""The costs with which a schedule takes as long as was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from moert.schedule import Costs, Item, Place, make_scheduler, makespan
from moert.types import ExpertId


def solve(costs: Costs, top_k: int, wait_s: dict[int, float]) -> tuple[float, float]:
    """(read_s, read_start_s) with which steps take longer than without misses by `wait_s`, of as many misses."""
    few, most = min(wait_s), max(wait_s)

    def longer(misses: int, read_s: float, start_s: float) -> float:
        with_them = replace(costs, read_s=read_s, read_start_s=start_s)
        return _event_s(with_them, top_k, misses) - _event_s(with_them, top_k, 0)

    longest = 8 * costs.read_s
    read_s, start_s = costs.read_s, 0.0

    def of_most(start: float, read: float) -> float:
        return longer(most, read, start) - wait_s[most]

    def of_few(read: float, start: float) -> float:
        return longer(few, read, start) - wait_s[few]

    for _ in range(8):
        read_s = root(partial(of_most, start_s), costs.read_s / 8, longest)
        if few < most:
            start_s = root(partial(of_few, read_s), 0.0, longest)
    return read_s, start_s


def root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where it crosses 0; the nearer end if it does not."""
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return low if low and rising(low) >= 0 else high if rising(high) <= 0 else (low + high) / 2


def _event_s(costs: Costs, top_k: int, misses: int) -> float:
    items = [Item(ExpertId(0, e), 1, Place.DISK if e < misses else Place.HOST) for e in range(top_k)]
    return makespan(make_scheduler("cpu_all").plan(items, costs), costs).makespan_s
