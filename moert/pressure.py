"""When memory runs short, and how much of the host tier is then given back: numbers in, a decision out."""

from __future__ import annotations

from dataclasses import dataclass

from moert.config import format_bytes
from moert.tiers.memory import MemoryLimit, MemoryReport

_FLOOR_SHARE = 0.05
_FLOOR_BYTES = (64 << 20, 256 << 20)

STALLED_SHARE = 0.10
"""Tasks that wait for memory this much of the time are short of it, if not much more than the floor is left either."""
NEAR_FLOOR = 4
"""That many floors. With more left, tasks wait because of some limit that is not ours to relieve."""
STALL_WAIT_S = 20.0
"""Stalls are a mean over 10 s: only after this long can they tell whether what was given back has helped."""
STEP_SHARE = 1 / 8
"""At least this share of the tier is given back at once."""
EPISODE_S = 60.0
"""So long without a shortage, and the next one is a new episode."""


@dataclass(frozen=True)
class Relief:
    """What to do about a shortage: keep no more than `target_bytes` of slots."""

    limit: MemoryLimit
    """The bound that is short."""
    target_bytes: int
    is_new: bool
    """Whether this is an episode's first."""


def floor_bytes(limit_bytes: int) -> int:
    """What must stay free under a bound: 5 % of it, at least 64 and at most 256 MiB.

    The default budget leaves at least as much, so it is not short from the start.
    """
    least, most = _FLOOR_BYTES
    return min(most, max(least, int(limit_bytes * _FLOOR_SHARE)))


def describe(relief: Relief, bytes_before: int, bytes_after: int) -> str:
    """What to tell the user about an episode's first relief, which took the slots from one size to another."""
    limit, floor = relief.limit, floor_bytes(relief.limit.limit_bytes)
    why = f"memory runs short: {limit}; {format_bytes(floor)} should stay free"
    if limit.available_bytes >= floor and limit.stalled is not None:
        why = f"memory runs short: tasks wait for it {limit.stalled:.0%} of the time, with {limit}"
    done = f"the experts' host memory shrinks from {format_bytes(bytes_before)} to {format_bytes(bytes_after)}"
    if bytes_after == bytes_before:
        done = f"the experts' host memory is at its least already, {format_bytes(bytes_after)}"
    return (
        f"{why}. To go on, {done}, and shrinks further while that lasts. Free some memory and call moert.resize, or "
        "give a smaller host_memory; shrink_on_pressure=False turns this off"
    )


def room_to_grow(report: MemoryReport) -> tuple[int, MemoryLimit]:
    """How much more may be taken with every floor kept, and the bound that says so; negative where one is short."""
    return min(
        ((limit.available_bytes - floor_bytes(limit.limit_bytes), limit) for limit in report.limits),
        key=lambda room: room[0],
    )


class PressureGovernor:
    """Decides when the host tier gives memory back, reading by reading. It never asks for growth: memory that was short
    once is needed by someone, and a tier that grows and shrinks in turns would read its experts again and again.
    """

    def __init__(self) -> None:
        self._last_short_s: float | None = None
        self._stalls_count_from_s = 0.0

    def decide(self, report: MemoryReport, slot_bytes: int, least_bytes: int, now_s: float) -> Relief | None:
        """What this reading calls for.

        Args:
            report: all bounds, as they are now.
            slot_bytes: of all slots now.
            least_bytes: of the slots that one token needs; no target is below.
            now_s: a clock's reading, never less than at the call before.

        Returns:
            None if nothing is to be done. With nothing left to give, a relief whose target is `slot_bytes`, once an
            episode.
        """
        short = [limit for limit in report.limits if self._is_short(limit, now_s)]
        if not short:
            return None
        is_new = self._last_short_s is None or now_s - self._last_short_s >= EPISODE_S
        self._last_short_s = now_s
        worst = max(short, key=_deficit_bytes)
        wanted = max(_deficit_bytes(worst), int(slot_bytes * STEP_SHARE))
        target = min(slot_bytes, max(least_bytes, slot_bytes - wanted))
        if target == slot_bytes and not is_new:
            return None
        self._stalls_count_from_s = now_s + STALL_WAIT_S
        return Relief(worst, target, is_new)

    def _is_short(self, limit: MemoryLimit, now_s: float) -> bool:
        floor = floor_bytes(limit.limit_bytes)
        if limit.available_bytes < floor:
            return True
        stalled = limit.stalled is not None and limit.stalled >= STALLED_SHARE and now_s >= self._stalls_count_from_s
        return stalled and limit.available_bytes < NEAR_FLOOR * floor


def _deficit_bytes(limit: MemoryLimit) -> int:
    """What is missing to twice the floor, so that the next allocation does not make it short again."""
    return 2 * floor_bytes(limit.limit_bytes) - limit.available_bytes
