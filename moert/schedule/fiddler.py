"""Each expert where it alone is done sooner."""

from __future__ import annotations

from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Place, Schedule, Scheduler, arrange


class Fiddler(Scheduler):
    """Minimises the sum of all times (Fiddler, arXiv 2402.07033).

    Hits run on the device, and a miss on the CPU unless that takes longer than moving it and running it there.

    As the two run side by side that is not what an event takes, and the CPU may get all of a large one.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        cpu = [
            item
            for item in items
            if item.place is not Place.DEVICE and costs.cpu_s(item.tokens) <= costs.move_s + costs.device_s(item.tokens)
        ]
        chosen = {item.expert for item in cpu}
        return arrange(cpu, [item for item in items if item.expert not in chosen], costs)
