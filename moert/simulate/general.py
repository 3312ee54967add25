"""Replay with the policy objects themselves: any policy, also one's own, and experts that differ in size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moert.policies import Policy, make_policy
from moert.predictors._ahead import Chances
from moert.simulate.events import Events, Ints
from moert.turnover import turn_over
from moert.types import ExpertId

Sizes = Callable[[ExpertId], int]


class GeneralReplay:
    """Caches driven in Python by `moert.turnover.turn_over`, as the engine's are."""

    path = "general"

    def __init__(
        self,
        policy: str,
        capacity: Ints,
        bases: Ints,
        scope: str,
        *,
        needs_future: bool,
        sizes: npt.NDArray[np.int64] | None = None,
        bypass: bool = False,
        ahead: Iterator[Chances] | None = None,
    ) -> None:
        """Caches of `capacity` [C] experts, or bytes if `sizes` [L] are given, empty until `restart`.

        `ahead`: of each event to come, what is predicted for those after it.
        """
        self._text = policy
        self.needs_future = needs_future
        self._capacity = [int(one) for one in capacity]
        self._is_layered = scope == "layer"
        self._ids = [ExpertId(i, e) for i in range(len(bases) - 1) for e in range(int(bases[i + 1] - bases[i]))]
        self._size: Sizes | None = None
        if sizes is not None:
            by_layer = sizes.tolist()
            self._size = lambda expert: int(by_layer[expert.layer])
        self._bypass = bypass
        self._ahead = ahead
        self._caches: list[_Cache] = []
        if not needs_future:
            self.restart(())

    def restart(self, chunks: Iterable[Events] = ()) -> None:
        """Empty caches, and policies that have seen nothing but, if they need the future, all of `chunks`."""
        futures: list[list[list[ExpertId]]] = [[] for _ in self._capacity]
        if self.needs_future:
            for events in chunks:
                for event in range(len(events)):
                    futures[self._cache_of(events, event)].append(self._experts(events, event))
        self._caches = [
            _Cache(make_policy(self._text, capacity, future=future, sizes=self._size), capacity)
            for capacity, future in zip(self._capacity, futures, strict=True)
        ]

    def run(self, events: Events, next_use: Ints | None = None) -> tuple[Ints, Ints]:
        """[N] hits and [N] experts brought into slots, for each event."""
        hits = np.empty(len(events), np.int64)
        transfers = np.empty(len(events), np.int64)
        for number in range(len(events)):
            cache = self._caches[self._cache_of(events, number)]
            cache.begin_sequence(int(events.sequence[number]))
            if events.scores is not None:
                cache.policy.observe_scores(int(events.layer[number]), self._scores(events, number))
            if self._ahead is not None and (chances := next(self._ahead)):
                cache.policy.observe_ahead(int(events.layer[number]), chances)
            event = self._experts(events, number)
            step = cache.step_with_bypass if self._bypass else cache.step
            hits[number], transfers[number] = step(event)
        return hits, transfers

    def _cache_of(self, events: Events, number: int) -> int:
        return int(events.layer[number]) if self._is_layered else 0

    def _experts(self, events: Events, number: int) -> list[ExpertId]:
        first, last = events.offsets[number], events.offsets[number + 1]
        return [self._ids[expert] for expert in events.ids[first:last].tolist()]

    def _scores(self, events: Events, number: int) -> list[float]:
        assert events.scores is not None
        scores: list[float] = events.scores[number].tolist()
        return scores


class _Cache:
    def __init__(self, policy: Policy, capacity: int) -> None:
        self.policy = policy
        self._capacity = capacity
        self._residents: set[ExpertId] = set()
        self._used = 0
        self._sequence = -1

    def begin_sequence(self, sequence: int) -> None:
        if sequence != self._sequence:
            self._sequence = sequence
            self.policy.begin_sequence()

    def step(self, event: Sequence[ExpertId]) -> tuple[int, int]:
        misses = [expert for expert in event if expert not in self._residents]
        self.policy.access(event)
        victims = turn_over(self.policy, self._residents, event, misses, self._capacity, used=self._used)
        size = self.policy.size
        self._used += sum(map(size, misses)) - sum(map(size, victims))
        return len(event) - len(misses), len(misses)

    def step_with_bypass(self, event: Sequence[ExpertId]) -> tuple[int, int]:
        """Misses are computed without a slot; once the event is over those that the policy wants are admitted."""
        misses = [expert for expert in event if expert not in self._residents]
        self.policy.access(event)
        admitted = 0
        for expert in misses:
            size = self.policy.size(expert)
            if self._used + size > self._capacity and not self.policy.wants(expert, frozenset()):
                continue
            while self._used + size > self._capacity:
                victim = self.policy.victim_for(expert, frozenset())
                self.policy.evict(victim)
                self._residents.remove(victim)
                self._used -= self.policy.size(victim)
            self.policy.admit(expert)
            self._residents.add(expert)
            self._used += size
            admitted += 1
        return len(event) - len(misses), admitted
