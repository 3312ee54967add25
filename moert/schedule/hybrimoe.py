"""Two queues' ends, taken from by whoever would be done first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Place, Schedule, Scheduler, arrange


class HybriMoE(Scheduler):
    """The scheduling simulation of HybriMoE (DAC 2025) as published.

    Hits, then misses, each the most loaded first, are in one queue. The device would take the first of them, the CPU
    the last; of the two the one that would be done with it sooner does. The paper has no disk: what is there counts as
    a miss.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        queue = deque(sorted(items, key=lambda item: (item.place is not Place.DEVICE, -item.tokens)))
        device_s = cpu_s = link_s = 0.0
        cpu: list[Item] = []
        device: list[Item] = []
        while queue:
            first, last = queue[0], queue[-1]
            is_here = first.place is Place.DEVICE
            begins = device_s if is_here else max(device_s, link_s + costs.move_s)
            on_device = begins + costs.device_s(first.tokens)
            on_cpu = cpu_s + costs.cpu_s(last.tokens) + (0.0 if cpu else costs.cpu_start_s)
            if on_device <= on_cpu:
                device.append(queue.popleft())
                device_s = on_device
                link_s += 0.0 if is_here else costs.move_s
            else:
                cpu.append(queue.pop())
                cpu_s = on_cpu
        return arrange(cpu, device, costs)
