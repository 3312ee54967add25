"""Traces and their replay, for the tests of policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from hypothesis import strategies as st

from moert.policies import Policy, make_policy
from moert.residency import Residency
from moert.types import ExpertId

Trace = Sequence[Sequence[ExpertId]]


def ids(events: Sequence[Sequence[int]], layer: int = 0) -> list[list[ExpertId]]:
    return [[ExpertId(layer, expert) for expert in sorted(event)] for event in events]


def make(name: str, capacity: int, trace: Trace, sizes: Callable[[ExpertId], int] | None = None) -> Policy:
    """A policy that knows the future if it has to."""
    return make_policy(name, capacity, future=trace, sizes=sizes)


def traces(
    n_experts: int = 7, event: int = 3, steps: int = 12, layers: int = 1
) -> st.SearchStrategy[list[list[ExpertId]]]:
    """Traces of events of up to so many experts, whose layers run one after the other."""
    one = st.lists(st.integers(0, n_experts - 1), min_size=1, max_size=event, unique=True).map(sorted)
    return st.lists(one, max_size=steps).map(
        lambda events: [[ExpertId(step % layers, e) for e in event] for step, event in enumerate(events)]
    )


class Watched(Policy):
    """A policy that notes its victims, and may be asked for them more often than need be."""

    def __init__(self, policy: Policy, *, ask_often: bool = False) -> None:
        super().__init__(policy.capacity)
        self.inner = policy
        self.evicted: list[ExpertId] = []
        self._ask_often = ask_often

    def access(self, event: Sequence[ExpertId]) -> None:
        self.inner.capacity = self.capacity
        self.inner.access(event)

    def admit(self, expert: ExpertId) -> None:
        self.inner.capacity = self.capacity
        self.inner.admit(expert)

    def evict(self, expert: ExpertId) -> None:
        self.evicted.append(expert)
        self.inner.evict(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return self._ask(self.inner.victim, locked)

    def victim_for(self, expert: ExpertId, locked: Collection[ExpertId]) -> ExpertId:
        if self._ask_often:
            self.inner.wants(expert, locked)
        return self._ask(lambda held: self.inner.victim_for(expert, held), locked)

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        return self.inner.wants(expert, locked)

    def _ask(self, ask: Callable[[Collection[ExpertId]], ExpertId], locked: Collection[ExpertId]) -> ExpertId:
        victim = ask(locked)
        if self._ask_often:
            residents = {expert for expert in self.residents if expert not in locked}
            if len(residents) > 1:
                self.inner.victim({*locked, victim})
            assert ask(locked) == victim, "the second answer is another one"
        return victim

    residents: Collection[ExpertId] = ()


def replay(policy: Policy, capacity: int, trace: Trace) -> list[int]:
    """Misses of each event, all of them admitted while all of the event is locked; every event fits."""
    residency = Residency(capacity, policy)
    misses = []
    for event in trace:
        split = residency.begin(event)
        misses.append(len(split.misses))
        for expert in split.misses:
            if isinstance(policy, Watched):
                policy.residents = residency.residents
            admission = residency.admit(expert)
            assert admission is not None
            assert admission.victim not in event
            residency.arrive(expert)
        for expert in event:
            residency.release(expert)
        residency.end()
        residency.check_integrity()
    return misses


def replay_with_bypass(policy: Policy, capacity: int, trace: Trace) -> list[int]:
    """Misses of each event, computed without slots; after the event those that are wanted are admitted."""
    residency = Residency(capacity, policy)
    misses = []
    for event in trace:
        split = residency.begin(event)
        misses.append(len(split.misses))
        residency.end()
        for expert in split.misses:
            if residency.wants(expert):
                assert residency.admit(expert) is not None
                residency.arrive(expert)
        residency.check_integrity()
    return misses


def e(expert: int, layer: int = 0) -> ExpertId:
    """An expert, of the first layer if nothing else is said."""
    return ExpertId(layer, expert)


def victims(policy: Policy, capacity: int, trace: Sequence[Sequence[ExpertId]]) -> list[int]:
    """Who left, in order."""
    watched = Watched(policy)
    replay(watched, capacity, trace)
    return [expert.expert for expert in watched.evicted]
