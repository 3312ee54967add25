"""Every expert where it is."""

from __future__ import annotations

from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Place, Schedule, Scheduler, arrange


class StaticSplit(Scheduler):
    """Runs hits on the device and misses on the CPU, and moves nothing: KTransformers, and llama.cpp's `-ot`."""

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        return arrange(
            [item for item in items if item.place is not Place.DEVICE],
            [item for item in items if item.place is Place.DEVICE],
            costs,
        )
