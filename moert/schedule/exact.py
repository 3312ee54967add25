"""The schedule of the least makespan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Schedule, Scheduler, arrange


class Exact(Scheduler):
    """Tries every number of experts of each place that the CPU might take, and gives it the least loaded of them.

    With experts that take the device equally long, which they do while it waits for weights, that is all that has to be
    tried: whoever gave the CPU a more loaded expert of the same place could change it for a less loaded one. What a
    number costs follows from sums; no schedule is built but the best. Where the device's time depends on the tokens,
    the mean of the event's is taken, and the result is good but not proven to be the best.

    For P experts on the device, Q in host memory and R on disk it takes O(P Q (R + 1) + R^2 log R) steps at most; what
    cannot be better than the best so far is passed over.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        run_s = costs.device_s([item.tokens for item in items]) if items else 0.0
        places: list[list[Item]] = [[], [], []]
        for item in sorted(items, key=lambda item: (item.tokens, item.value)):
            places[item.place].append(item)
        sums = [[0.0, *accumulate(costs.cpu_s(item.tokens) for item in place)] for place in places]
        numbers = _best(sums, costs, run_s)
        cpu = [item for place, n in zip(places, numbers, strict=True) for item in place[:n]]
        device = [item for place, n in zip(places, numbers, strict=True) for item in reversed(place[n:])]
        return arrange(cpu, device, costs)


def _best(sums: list[list[float]], costs: Costs, run_s: float) -> tuple[int, int, int]:
    """How many of each place the CPU takes; of equally good ones the first, fewest from disk, then from host memory."""
    hits, from_host, from_disk = (len(of) - 1 for of in sums)
    extra, move_s = costs.cpu_start_s + costs.merge_s, costs.move_s
    best, found = math.inf, (0, 0, 0)
    for c, of_disk in enumerate(sums[2]):
        after_disk = _after_disk(sums[2][1 : c + 1], from_disk - c, costs, run_s)
        if after_disk >= best:
            continue
        for b, of_host in enumerate(sums[1]):
            moved = from_host - b + from_disk - c
            # Moving and running overlap, so the longer of the two sets the pace and the other comes once.
            fixed = max(moved * move_s + run_s, move_s + moved * run_s) if moved else 0.0
            of_misses = of_host + of_disk
            if fixed >= best or of_misses >= best:
                continue
            for a, of_hits in enumerate(sums[0]):
                device_s = max(fixed, (hits - a + moved) * run_s)
                cpu_s = of_hits + of_misses + extra if a or b or c else 0.0
                total = max(device_s, cpu_s, after_disk)
                if total < best:
                    best, found = total, (a, b, c)
                if cpu_s > device_s:
                    break  # another hit for the CPU makes it worse
    return found


def _after_disk(cpu_sums: list[float], fetched: int, costs: Costs, run_s: float) -> float:
    """When the last of the experts that are read has been computed: some on the CPU, so many on the device, in the
    order that `arrange` gives."""
    # Least loaded ones are last, so what is behind one of them is the sum of those before it in ascending order.
    tails = [costs.merge_s + of for of in cpu_sums]
    tails += [max(costs.move_s * n + run_s, costs.move_s + run_s * n) for n in range(1, fetched + 1)]
    tails.sort(reverse=True)
    return max((costs.read_s * n + tail for n, tail in enumerate(tails, start=1)), default=0.0)
