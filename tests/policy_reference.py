"""Caches written a second time: lists and single accesses, as the papers have them, and bounds by trying everything."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

Event = Sequence[int]
Reference = Callable[[Sequence[int], int], int]
"""Misses of a trace of single accesses in a cache of that many."""


def fifo(trace: Sequence[int], capacity: int) -> int:
    queue: list[int] = []
    misses = 0
    for x in trace:
        if x not in queue:
            misses += 1
            queue = [*queue, x][-capacity:]
    return misses


def lru(trace: Sequence[int], capacity: int) -> int:
    queue: list[int] = []
    misses = 0
    for x in trace:
        misses += x not in queue
        queue = [*(y for y in queue if y != x), x][-capacity:]
    return misses


def lfu(trace: Sequence[int], capacity: int, *, in_cache: bool = False) -> int:
    uses: Counter[int] = Counter()
    last: dict[int, int] = {}
    held: set[int] = set()
    misses = 0
    for now, x in enumerate(trace):
        if x not in held:
            misses += 1
            if len(held) == capacity:
                gone = min(held, key=lambda y: (uses[y], last[y]))
                held.remove(gone)
                if in_cache:
                    del uses[gone]
            held.add(x)
        uses[x] += 1
        last[x] = now
    return misses


def belady(trace: Sequence[int], capacity: int) -> int:
    held: set[int] = set()
    misses = 0
    for now, x in enumerate(trace):
        if x not in held:
            misses += 1
            if len(held) == capacity:
                rest = list(trace[now + 1 :])
                held.remove(max(held, key=lambda y: rest.index(y) if y in rest else len(rest)))
            held.add(x)
    return misses


def sieve(trace: Sequence[int], capacity: int) -> int:
    queue: list[int] = []  # newest first, as in the paper's figure
    visited: dict[int, bool] = {}
    hand: int | None = None
    misses = 0
    for x in trace:
        if x in queue:
            visited[x] = True
            continue
        misses += 1
        if len(queue) == capacity:
            at = len(queue) - 1 if hand is None else queue.index(hand)
            while visited[queue[at]]:
                visited[queue[at]] = False
                at = at - 1 if at > 0 else len(queue) - 1
            hand = queue[at - 1] if at > 0 else None
            del queue[at]
        queue.insert(0, x)
        visited[x] = False
    return misses


def s3fifo(trace: Sequence[int], capacity: int) -> int:
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    uses: dict[int, int] = {}
    n_small = max(1, capacity // 10)
    n_ghosts = capacity * 9 // 10
    misses = 0
    evicted = False

    def evict_main() -> bool:
        while main:
            x = main.pop(0)
            if uses[x] == 0:
                return True
            uses[x] = min(uses[x], 3) - 1
            main.append(x)
        return False

    def evict_small() -> bool:
        while small:
            x = small.pop(0)
            if uses[x] < 2:
                ghosts.append(x)
                del ghosts[: max(0, len(ghosts) - n_ghosts)]
                return True
            uses[x] = 0
            main.append(x)
        return False

    for x in trace:
        if x in small or x in main:
            uses[x] += 1
            continue
        misses += 1
        returns = x in ghosts
        if returns:
            ghosts.remove(x)
        while len(small) + len(main) >= capacity:
            evicted = True
            if len(main) > capacity - n_small or not small:
                evict_main()
            else:
                evict_small()
        (main if returns or (not evicted and len(small) >= n_small) else small).append(x)
        uses[x] = 0
    return misses


def arc(trace: Sequence[int], capacity: int) -> int:
    """Figure 4 of the paper; lists run from LRU to MRU."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p = Fraction(0)
    misses = 0

    def replace(x: int) -> None:
        if t1 and (len(t1) > p or (x in b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in trace:
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            continue
        misses += 1
        if x in b1:
            p = min(Fraction(capacity), p + max(Fraction(len(b2), len(b1)), Fraction(1)))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(Fraction(0), p - max(Fraction(len(b1), len(b2)), Fraction(1)))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == capacity:
                if len(t1) < capacity:
                    b1.pop(0)
                    replace(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= capacity:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * capacity:
                    b2.pop(0)
                replace(x)
            t1.append(x)
    return misses


def slru(trace: Sequence[int], capacity: int) -> int:
    probation: list[int] = []
    protected: list[int] = []
    misses = 0
    for x in trace:
        if x in protected or x in probation:
            (protected if x in protected else probation).remove(x)
            protected.append(x)
            if len(protected) > capacity * 4 // 5:
                probation.append(protected.pop(0))
            continue
        misses += 1
        if len(probation) + len(protected) == capacity:
            (probation or protected).pop(0)
        probation.append(x)
    return misses


def wtinylfu(trace: Sequence[int], capacity: int) -> int:
    """With exact counts in place of the sketch."""
    n_window = max(1, capacity // 100)
    n_protected = (capacity - n_window) * 4 // 5
    window: list[int] = []
    probation: list[int] = []
    protected: list[int] = []
    counts: Counter[int] = Counter()
    seen = misses = 0
    for x in trace:
        counts[x] = min(counts[x] + 1, 10)
        seen += 1
        if seen >= 10 * capacity:
            counts = Counter({y: n // 2 for y, n in counts.items()})
            seen //= 2
        if x in window:
            window.append(window.pop(window.index(x)))
        elif x in protected or x in probation:
            (protected if x in protected else probation).remove(x)
            protected.append(x)
            if len(protected) > n_protected:
                probation.append(protected.pop(0))
        else:
            misses += 1
            window.append(x)
            if len(window) > n_window:
                candidate = window.pop(0)
                main = probation or protected
                if len(window) + len(probation) + len(protected) < capacity:
                    probation.append(candidate)
                elif main and counts[candidate] > counts[main[0]]:
                    main.pop(0)
                    probation.append(candidate)
    return misses


def lfru(trace: Sequence[int], capacity: int) -> int:
    uses: Counter[int] = Counter()
    last: dict[int, int] = {}
    held: set[int] = set()
    misses = 0
    for now, x in enumerate(trace):
        uses[x] += 1
        last[x] = now
        if x not in held:
            misses += 1
            if len(held) == capacity:
                held.remove(min(held, key=lambda y: (Fraction(uses[y], now - last[y] + 1), last[y])))
            held.add(x)
    return misses


SEQUENTIAL: dict[str, Reference] = {
    "arc": arc,
    "belady": belady,
    "fifo": fifo,
    "lfru": lfru,
    "lfu": lfu,
    "lfu,in_cache=true": lambda trace, capacity: lfu(trace, capacity, in_cache=True),
    "lru": lru,
    "s3fifo": s3fifo,
    "sieve": sieve,
    "slru": slru,
    "wtinylfu": wtinylfu,
}
"""By the text that chooses the policy."""


def moving_averages(trace: Sequence[Event], alpha: Fraction, burst: Fraction) -> list[dict[int, Fraction]]:
    """The score of every expert after each event, every one of them updated at each; with no `burst`, its average."""
    scores: dict[int, Fraction] = {expert: Fraction(0) for event in trace for expert in event}
    history = []
    for now, event in enumerate(trace):
        for expert, score in scores.items():
            before = [then for then in range(now) if expert in trace[then]]
            news = 1 - burst ** (now - before[-1]) if before else 1
            scores[expert] = (1 - alpha) * score + alpha * (expert in event) * news
        history.append(dict(scores))
    return history


def fewest_misses(trace: Sequence[Event], capacity: int) -> int:
    """The least number of misses of any policy that admits every miss, by trying all of them; every event fits."""

    @cache
    def best(step: int, resident: frozenset[int]) -> int:
        if step == len(trace):
            return 0
        event = frozenset(trace[step])
        others = sorted(resident - event)
        n_evicted = max(0, len(event | resident) - capacity)
        return len(event - resident) + min(
            best(step + 1, (resident | event) - frozenset(evicted))
            for evicted in itertools.combinations(others, n_evicted)
        )

    return best(0, frozenset())


def fewest_misses_with_bypass(trace: Sequence[Event], capacity: int) -> int:
    """The same where after each event any of its experts and of the residents may stay, as many as fit."""

    @cache
    def best(step: int, resident: frozenset[int]) -> int:
        if step == len(trace):
            return 0
        event = frozenset(trace[step])
        held = sorted(resident | event)
        return len(event - resident) + min(
            best(step + 1, frozenset(kept)) for kept in itertools.combinations(held, min(capacity, len(held)))
        )

    return best(0, frozenset())
