"""Everything on the device."""

from __future__ import annotations

from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Schedule, Scheduler, arrange


class FetchAll(Scheduler):
    """Moves every missing expert to the device and runs it there, as caches without a CPU path do (MoE-Infinity)."""

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        return arrange(items, (), costs) if costs.device is None else arrange((), items, costs)
