"""The schedule of the least makespan."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import add, attrgetter

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Schedule, Scheduler, arrange

_value, _tokens = attrgetter("value"), attrgetter("tokens")


class Exact(Scheduler):
    """Tries every number of experts of each place that the CPU might take, and gives it the least loaded of them.

    With experts that take the device equally long, which they do while it waits for weights, that is all that has to be
    tried: whoever gave the CPU a more loaded expert of the same place could change it for a less loaded one. What a
    number costs follows from sums; no schedule is built but the best. Where the device's time depends on the tokens,
    the mean of the event's is taken, and the result is good but not proven to be the best.

    For P experts on the device, Q in host memory and R on disk it takes O((R + 1) (P + Q + R)) steps at most; what
    cannot be better than the best so far, or than a guess before all, is passed over.
    """

    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        if costs.device is None:
            return arrange(items, (), costs)
        places: tuple[list[Item], ...] = ([], [], [])
        # By tokens, and by value where those are equal: two sorts by numbers take less time than one by pairs.
        for item in sorted(sorted(items, key=_value), key=_tokens):
            places[item.place].append(item)
        numbers = _Event(places, costs, costs.device_s([item.tokens for item in items])).best()
        cpu = [item for place, n in zip(places, numbers, strict=True) for item in place[:n]]
        device = [item for place, n in zip(places, numbers, strict=True) for item in reversed(place[n:])]
        return arrange(cpu, device, costs)


class _Event:
    """What takes how long, by numbers of experts; those that the CPU takes of a place are the least loaded ones."""

    def __init__(self, places: Sequence[Sequence[Item]], costs: Costs, run_s: float) -> None:
        times = costs.cpu_times
        self.cpu_s = [[times[item.tokens] for item in place] for place in places]
        self.sums = [list(accumulate(each, initial=0.0)) for each in self.cpu_s]
        self.hits, self.from_host, self.from_disk = map(len, places)
        self.misses = self.from_host + self.from_disk
        self.extra_s = costs.cpu_start_s + costs.merge_s
        self.waits = [costs.merge_s + s for s in self.sums[2]]
        self.runs = [n * run_s for n in range(self.hits + self.misses + 1)]
        # Moving and running overlap, so the longer of the two sets the pace and the other comes once.
        once_s, pace_s = sorted((costs.move_s, run_s))
        self.fetches = [0.0, *[n * pace_s + once_s for n in range(1, self.misses + 1)]]
        self.reads = [n * costs.read_s for n in range(1, self.from_disk + 1)]

    def after_disk_s(self, c: int) -> float:
        """When the last of the experts that are read has been computed if the CPU takes c of them.

        In the order that `arrange` gives: the least loaded ones are last, so what is behind one of them is the sum of
        those before it in ascending order.
        """
        if not self.from_disk:
            return 0.0
        tails = self.waits[1 : c + 1] + self.fetches[1 : self.from_disk - c + 1]
        tails.sort(reverse=True)
        return max(map(add, self.reads, tails))

    def guess_s(self) -> float:
        """In how long it can be done with the least loaded misses on the CPU, and then as many hits as pay."""
        fetches, runs, of_hits, misses = self.fetches, self.runs, self.sums[0], self.misses
        each = sorted(self.cpu_s[1] + self.cpu_s[2])
        sums = list(accumulate(each, initial=self.extra_s))
        # The most misses with which the CPU is done before the link, or one more.
        n = bisect_left(range(misses), True, key=lambda n: sums[n + 1] >= fetches[misses - n - 1])
        if n < misses and sums[n + 1] < fetches[misses - n]:
            n += 1
        b = min(bisect_right(self.cpu_s[1], each[n - 1]), n - bisect_left(self.cpu_s[2], each[n - 1])) if n else 0
        cpu_s, on_device = sums[n], self.hits + misses - n
        total = max(fetches[misses - n], self.after_disk_s(n - b), cpu_s)
        if runs[on_device] <= total:
            return total
        a = bisect_left(range(self.hits), True, key=lambda a: cpu_s + of_hits[a + 1] >= runs[on_device - a - 1])
        return max(total, min(runs[on_device - a], cpu_s + of_hits[a + 1] if a < self.hits else math.inf))

    def best(self) -> tuple[int, int, int]:
        """How many of each place the CPU takes; of equally good ones the first, fewest from disk, then from host."""
        hits, from_host, from_disk, misses = self.hits, self.from_host, self.from_disk, self.misses
        of_hits, of_host, of_disk = self.sums
        extra_s, runs, fetches = self.extra_s, self.runs, self.fetches
        # However they are split, the last one that is read has this to be done after it.
        least = self.reads[-1] + min(self.waits[1], fetches[1]) if from_disk else 0.0
        # A little more than the guess, whose sums are rounded in another order.
        best, found = math.nextafter(self.guess_s() * (1 + 1e-9), math.inf), (0, 0, 0)
        # With all on the device there is nothing to start on the CPU.
        whole = max(fetches[misses], runs[hits + misses])
        if whole < best:
            best = min(best, max(whole, self.after_disk_s(0)))
        for c in range(from_disk + 1):
            if best <= least:
                break
            missing = misses - c
            most = bisect_left(runs, best) - 1
            b = max(0, missing + 1 - bisect_left(fetches, best))
            if b > from_host or of_host[b] + of_disk[c] + extra_s >= best:
                continue
            after_s = self.after_disk_s(c)
            while b <= from_host and after_s < best:
                of_misses = of_host[b] + of_disk[c]
                if of_misses + extra_s >= best:
                    break
                # As few hits as leave the device less to do than it has at best.
                a = max(0, hits + missing - b - most)
                cpu_s = of_hits[a] + of_misses + extra_s
                if cpu_s >= best:
                    b += 1
                    continue
                total_s = max(cpu_s, fetches[missing - b], runs[hits + missing - b - a], after_s)
                best, found = total_s, (a, b, c)
                most = bisect_left(runs, best) - 1
                b = max(b, missing + 1 - bisect_left(fetches, best))
        return found
