"""A fixed share of the misses over the link."""

from __future__ import annotations

from collections.abc import Sequence

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Place, Schedule, Scheduler, arrange


class FreeToken(Scheduler):
    """Fetches at most q* of an event's misses, q* = link rate / (link rate + CPU rate) (FreeToken, arXiv 2608.16157).

    Rates are experts a second at one token. Hits run on the device, the other misses on the CPU. The most loaded misses
    are fetched.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        cpu_s = costs.cpu_s(1)
        share = cpu_s / (cpu_s + costs.move_s) if cpu_s + costs.move_s > 0 else 1.0
        misses = sorted((item for item in items if item.place is not Place.DEVICE), key=lambda item: item.tokens)
        on_cpu = misses[: len(misses) - int(share * len(misses))]
        chosen = {item.expert for item in on_cpu}
        return arrange(on_cpu, [item for item in items if item.expert not in chosen], costs)
