"""Which experts are worth reading before anybody has asked for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from moert.schedule._costs import Costs
from moert.schedule._flow import makespan
from moert.schedule.base import Item, Place, Scheduler
from moert.types import ExpertId


class Wanted(NamedTuple):
    """An expert that may be needed when the link's idle time is over."""

    expert: ExpertId
    chance: float
    """That it is."""
    read_s: float
    """The link is busy with it for so long."""
    loss: float = 0.0
    """The chance that, if it is not, what leaves for it is needed instead."""

    def gain_s(self, idle_s: float) -> float:
        """Seconds that are expected to be gained by starting it now, with so much idle time left.

        If it is needed, what was read of it in idle time need not be waited for; the rest would be read then anyway. If
        not, what is left of the read when others are needed delays those.
        """
        inside_s = min(max(idle_s, 0.0), self.read_s)
        return self.chance * inside_s - (1 - self.chance) * (self.read_s - inside_s + self.loss * self.read_s)


def worth_reading(wanted: Sequence[Wanted], idle_s: float) -> list[ExpertId]:
    """Those to read over a link that will be idle for `idle_s`, in this order.

    One after the other takes the time that is left, the one with most expected gain a second first, while there is a
    gain. For experts of one size that is the best choice there is.
    """
    left, chosen = list(wanted), []
    while left:
        best = max(left, key=lambda one: one.gain_s(idle_s) / one.read_s)
        if best.gain_s(idle_s) <= 0:
            break
        left.remove(best)
        chosen.append(best.expert)
        idle_s -= best.read_s
    return chosen


def impacts(
    expected: Sequence[Item], candidates: Collection[ExpertId], scheduler: Scheduler, costs: Costs
) -> dict[ExpertId, float]:
    """By how many seconds each of `candidates`, if it were on the device, would shorten an expected event.

    The impact-driven prefetching of HybriMoE (DAC 2025) brings the expert with most of it, and asks again.

    Args:
        expected: the experts of the event, with the tokens that are expected to choose them.
        scheduler: plans the event with and without each.
    """

    def event_s(items: Sequence[Item]) -> float:
        return makespan(scheduler.plan(items, costs), costs).makespan_s

    without_s = event_s(expected)
    return {
        item.expert: without_s
        - event_s([other._replace(place=Place.DEVICE) if other is item else other for other in expected])
        for item in expected
        if item.expert in candidates
    }
