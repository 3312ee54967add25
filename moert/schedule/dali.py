"""The experts to which it matters most, first."""

from __future__ import annotations

from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Place, Schedule, Scheduler, arrange


class Dali(Scheduler):
    """The greedy assignment of DALI: experts by how far apart their times on the CPU and on the device are, each to the
    part whose sum of times would then be less.

    A miss takes the longer of being moved and being run on the device, as the two overlap.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)

        def times(item: Item) -> tuple[float, float]:
            run_s = costs.device_s(item.tokens)
            return costs.cpu_s(item.tokens), run_s if item.place is Place.DEVICE else max(run_s, costs.move_s)

        cpu: list[Item] = []
        device: list[Item] = []
        cpu_sum = device_sum = 0.0
        for item in sorted(items, key=lambda item: -abs(times(item)[0] - times(item)[1])):
            on_cpu, on_device = times(item)
            if cpu_sum + on_cpu < device_sum + on_device:
                cpu.append(item)
                cpu_sum += on_cpu
            else:
                device.append(item)
                device_sum += on_device
        return arrange(cpu, device, costs)
