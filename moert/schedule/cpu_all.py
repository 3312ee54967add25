"""Everything on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Schedule, Scheduler, arrange


class CpuAll(Scheduler):
    """Runs every expert on the CPU, wherever it is: a machine whose device has other things to do."""

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        return arrange(items, (), costs)
