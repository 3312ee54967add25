"""The costs with which a schedule takes as long as was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from moert.schedule import Costs, Item, Place, Timing, make_scheduler, makespan
from moert.types import ExpertId

NOISE = 0.01
"""Of the time that the disk was at work, what a wait may be too short by."""


class Solved(NamedTuple):
    """What `moert.schedule.Costs` calls so."""

    read_s: float
    read_start_s: float
    miss_s: float
    miss_start_s: float


def solve(costs: Costs, top_k: int, wait_s: Mapping[int, float], disk_s: Mapping[int, float]) -> Solved:
    """The costs with which steps with so many misses take `wait_s` longer than without, the disk at work for `disk_s`.

    What the disk was at work for is its own; what is left of the wait is the CPU's. Where less was waited than that
    explains, all of it is the disk's.

    Args:
        costs: without misses' own costs.
        wait_s: by misses, one and as many as a step can have.
        disk_s: of the same numbers of misses.
    """
    read_s, start_s = _reads(costs, top_k, disk_s, _disk_s)
    of_disk = replace(costs, read_s=read_s, read_start_s=start_s)
    left = {n: wait - _longer_s(of_disk, top_k, n) for n, wait in wait_s.items()}
    few, most = min(left), max(left)
    if min(left.values()) < -NOISE * disk_s[most]:
        return Solved(*_reads(costs, top_k, wait_s, _longer_s), 0.0, 0.0)
    first_s = max(0.0, left[few])
    each_s = max(0.0, left[most] - first_s) / (most - few) if few < most else first_s / few
    each_s = min(each_s, first_s / few)
    return Solved(read_s, start_s, each_s, first_s - few * each_s)


def _reads(
    costs: Costs, top_k: int, seconds: Mapping[int, float], of: Callable[[Costs, int, int], float]
) -> tuple[float, float]:
    """(read_s, read_start_s) with which `of` says these seconds."""
    few, most = min(seconds), max(seconds)
    longest = 8 * costs.read_s
    read_s, start_s = costs.read_s, 0.0

    def off(misses: int, read: float, start: float) -> float:
        return of(replace(costs, read_s=read, read_start_s=start), top_k, misses) - seconds[misses]

    def of_most(start: float, read: float) -> float:
        return off(most, read, start)

    def of_few(read: float, start: float) -> float:
        return off(few, read, start)

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


def _longer_s(costs: Costs, top_k: int, misses: int) -> float:
    """Than an event without misses."""
    return _event(costs, top_k, misses).makespan_s - _event(costs, top_k, 0).makespan_s


def _disk_s(costs: Costs, top_k: int, misses: int) -> float:
    return _event(costs, top_k, misses).disk_s


def _event(costs: Costs, top_k: int, misses: int) -> Timing:
    items = [Item(ExpertId(0, e), 1, Place.DISK if e < misses else Place.HOST) for e in range(top_k)]
    return makespan(make_scheduler("cpu_all").plan(items, costs), costs)
