"""The schedule of the least makespan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Place, Schedule, Scheduler, arrange


class Exact(Scheduler):
    """Tries every number of experts of each place that the CPU might take, and gives it the least loaded of them.

    With experts that take the device equally long, which they do while it waits for weights, that is all that has to be
    tried: whoever gave the CPU a more loaded expert of the same place could change it for a less loaded one. What a
    number costs follows from sums; no schedule is built but the best. Where the device's time depends on the tokens,
    the mean of the event's is taken, and the result is good but not proven to be the best.

    For P experts on the device, Q in host memory and R on disk it takes O(P Q) steps, or O(P Q R (Q + R)) if R > 0.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        run_s = costs.device_s([item.tokens for item in items]) if items else 0.0
        places: list[list[Item]] = [[], [], []]
        for item in sorted(items, key=lambda item: (item.tokens, item.value)):
            places[item.place].append(item)
        sums = [[0.0, *accumulate(costs.cpu_s(item.tokens) for item in place)] for place in places]
        numbers = _best(sums, costs, run_s) if places[Place.DISK] else _best_without_disk(sums, costs, run_s)
        cpu = [item for place, n in zip(places, numbers, strict=True) for item in place[:n]]
        device = [item for place, n in zip(places, numbers, strict=True) for item in reversed(place[n:])]
        return arrange(cpu, device, costs)


def _best_without_disk(sums: list[list[float]], costs: Costs, run_s: float) -> tuple[int, int, int]:
    hits, misses = len(sums[0]) - 1, len(sums[1]) - 1
    extra, move_s = costs.cpu_start_s + costs.merge_s, costs.move_s
    best, found = math.inf, (0, 0, 0)
    for b, of_misses in enumerate(sums[1]):
        moved = misses - b
        # Moving and running overlap, so the longer of the two sets the pace and the other comes once.
        fixed = max(moved * move_s + run_s, move_s + moved * run_s) if moved else 0.0
        for a, of_hits in enumerate(sums[0]):
            device_s = max(fixed, (hits - a + moved) * run_s)
            cpu_s = of_hits + of_misses + extra if a or b else 0.0
            total = device_s if device_s > cpu_s else cpu_s
            if total < best:
                best, found = total, (a, b, 0)
            if cpu_s > device_s:
                break  # another hit for the CPU makes it worse
    return found


def _best(sums: list[list[float]], costs: Costs, run_s: float) -> tuple[int, int, int]:
    counts = [len(of) - 1 for of in sums]
    best, found = math.inf, (0, 0, 0)
    for c in range(counts[2] + 1):
        for b in range(counts[1] + 1):
            for a in range(counts[0] + 1):
                total = _total(sums, (a, b, c), costs, run_s)
                if total < best:
                    best, found = total, (a, b, c)
    return found


def _total(sums: list[list[float]], numbers: tuple[int, int, int], costs: Costs, run_s: float) -> float:
    """The makespan when the CPU takes so many of each place, in the order that `arrange` gives."""
    hits, from_host, from_disk = (len(of) - 1 - n for of, n in zip(sums, numbers, strict=True))
    moved = from_host + from_disk
    device_s = (hits + moved) * run_s
    if moved:
        device_s = max(device_s, moved * costs.move_s + run_s, costs.move_s + moved * run_s)
    cpu_s = sum(of[n] for of, n in zip(sums, numbers, strict=True))
    cpu_s += costs.cpu_start_s + costs.merge_s if any(numbers) else 0.0
    # Least loaded ones are last, so what is behind one of them is the sum of those before it in ascending order.
    tails = [costs.merge_s + of for of in sums[2][1 : numbers[2] + 1]]
    tails += [max(costs.move_s * n + run_s, costs.move_s + run_s * n) for n in range(1, from_disk + 1)]
    tails.sort(reverse=True)
    after_disk = max((costs.read_s * n + tail for n, tail in enumerate(tails, start=1)), default=0.0)
    return max(device_s, cpu_s, after_disk)
