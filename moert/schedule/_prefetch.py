"""Which experts are worth reading before anybody has asked for them."""

from __future__ import annotations

import math
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
    begun_s: float = math.inf
    """Of a read that is given up, so much at most goes on; inf: all that is left of it."""

    def gain_s(self, idle_s: float, loss: float = 0.0) -> float:
        """Seconds that are expected to be gained by starting it now, with so much idle time left.

        If it is needed, what was read of it in idle time need not be waited for; the rest would be read then anyway. If
        not, it is given up when others are needed, and what has been begun of it then delays those. `loss` is the
        chance that what leaves for it is needed, and has to be read in its turn.
        """
        inside_s = min(max(idle_s, 0.0), self.read_s)
        delay_s = min(self.read_s - inside_s, self.begun_s)
        return self.chance * inside_s - (1 - self.chance) * delay_s - loss * self.read_s


def worth_reading(wanted: Sequence[Wanted], idle_s: float, losses: Sequence[float] | None = None) -> list[ExpertId]:
    """Those to read over a link that will be idle for `idle_s`, in this order.

    One after the other takes the time that is left, the one with most expected gain a second first, while there is a
    gain. For experts of one size that is the best choice there is.

    Args:
        losses: the chances, ascending, that what leaves for the first of them is needed, for the second, and so on;
            there is no room for more. None: nothing is lost.
    """
    left = list(wanted)
    chosen: list[ExpertId] = []
    while left and (losses is None or len(chosen) < len(losses)):
        loss = 0.0 if losses is None else losses[len(chosen)]
        gains = [one.gain_s(idle_s, loss) for one in left]
        gain_s, best = max(zip(gains, left, strict=True), key=lambda of: of[0] / of[1].read_s)
        if gain_s <= 0:
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
