"""The contract of every policy there is: these tests are the same for a new file in the folder."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import fewest_misses, fewest_misses_with_bypass
from policy_support import Watched, make, replay, replay_with_bypass, traces

from moert.policies import Policy, make_policy, policy_names
from moert.residency import Residency
from moert.types import ExpertId

each_policy = pytest.mark.parametrize("name", policy_names())
each_live_policy = pytest.mark.parametrize("name", policy_names(live_only=True))
quick = settings(max_examples=40, deadline=None)

Trace = list[list[ExpertId]]


def ints(trace: Trace) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(1000 * layer + expert for layer, expert in event) for event in trace)


def test_every_file_is_a_policy() -> None:
    files = {path.stem for path in (Path(__file__).parent.parent / "moert" / "policies").glob("*.py")}
    assert set(policy_names()) == {name for name in files if not name.startswith("_")} - {"base"}
    assert {"lru", "belady", "min_bypass"} <= set(policy_names())
    assert set(policy_names()) - set(policy_names(live_only=True)) == {"belady", "min_bypass"}


@each_policy
@quick
@given(trace=traces(), capacity=st.integers(3, 6))
def test_policy_keeps_the_contract_and_never_beats_the_bound(name: str, trace: Trace, capacity: int) -> None:
    misses = sum(replay(make(name, capacity, trace), capacity, trace))
    assert misses >= fewest_misses(ints(trace), capacity)
    assert misses >= sum(replay(make("belady", capacity, trace), capacity, trace))


@each_policy
@quick
@given(trace=traces(n_experts=5, steps=60, layers=3), capacity=st.integers(3, 9))
def test_policy_of_several_layers_never_beats_min(name: str, trace: Trace, capacity: int) -> None:
    misses = sum(replay(make(name, capacity, trace), capacity, trace))
    assert misses >= sum(replay(make("belady", capacity, trace), capacity, trace))


@each_policy
@quick
@given(trace=traces(steps=9), capacity=st.integers(1, 5))
def test_policy_with_bypass_never_beats_that_bound(name: str, trace: Trace, capacity: int) -> None:
    misses = sum(replay_with_bypass(make(name, capacity, trace), capacity, trace))
    assert misses >= fewest_misses_with_bypass(ints(trace), capacity)


@each_policy
@quick
@given(trace=traces())
def test_policy_misses_each_expert_once_where_all_fit(name: str, trace: Trace) -> None:
    distinct = {expert for event in trace for expert in event}
    assert sum(replay(make(name, 7, trace), 7, trace)) == len(distinct)


@each_policy
@quick
@given(trace=traces(n_experts=6, steps=40, layers=2), capacity=st.integers(3, 7))
def test_the_same_events_have_the_same_victims_however_often_they_are_asked_for(
    name: str, trace: Trace, capacity: int
) -> None:
    first, second = (Watched(make(name, capacity, trace), ask_often=often) for often in (False, True))
    assert replay(first, capacity, trace) == replay(second, capacity, trace)
    assert first.evicted == second.evicted


@each_policy
def test_victim_is_none_that_is_locked(name: str) -> None:
    experts = [ExpertId(0, expert) for expert in range(3)]
    policy = make(name, 3, [[expert] for expert in experts])
    for expert in experts:
        policy.access([expert])
        policy.admit(expert)
    for locked in itertools.chain.from_iterable(itertools.combinations(experts, n) for n in range(3)):
        first = policy.victim(set(locked))
        assert first in experts
        assert first not in locked
        assert policy.victim(set(locked)) == first


class Driver:
    """Does to a cache what a live run may do: failed reads, prefetches, events that do not fit, other capacities."""

    def __init__(self, policy: Policy, capacity: int, data: st.DataObject) -> None:
        self.residency = Residency(capacity, policy)
        self.data = data

    def step(self, event: list[ExpertId]) -> None:
        residency = self.residency
        waiting = list(residency.begin(event).misses)
        ready = [expert for expert in event if expert not in waiting]
        reading = [expert for expert in waiting if expert in residency.arriving]
        waiting = [expert for expert in waiting if expert not in reading]
        while waiting or reading or ready:
            if waiting and residency.can_admit():
                residency.wants(waiting[0])
                admission = residency.admit(waiting[0])
                assert admission is not None
                assert admission.victim not in ready
                reading.append(waiting.pop(0))
            elif reading and self.data.draw(st.booleans(), label="settle"):
                ready += self.settle(reading.pop(0), waiting)
            elif ready:
                residency.release(ready.pop(0))
            elif reading:
                ready += self.settle(reading.pop(0), waiting)
            else:
                break
        for expert in reading:
            residency.abandon(expert)
        residency.end()
        residency.check_integrity()

    def settle(self, expert: ExpertId, waiting: list[ExpertId]) -> list[ExpertId]:
        if self.data.draw(st.integers(0, 5), label="fails") == 0:
            self.residency.abandon(expert)
            return []
        self.residency.arrive(expert)
        return [expert]

    def prefetch(self, expert: ExpertId) -> None:
        if self.residency.slot_of(expert) is None and self.residency.can_admit():
            self.residency.admit(expert)
            if self.data.draw(st.booleans(), label="arrives"):
                self.residency.arrive(expert)
            else:
                self.residency.abandon(expert)

    def resize(self, capacity: int) -> None:
        before = set(self.residency.residents)
        change = self.residency.resize(capacity)
        assert set(self.residency.residents) == before - set(change.victims)
        assert len(change.victims) == max(0, len(before) - capacity)
        self.residency.check_integrity()

    def drop(self) -> None:
        if self.residency.residents:
            self.residency.drop(self.data.draw(st.sampled_from(self.residency.residents), label="lost"))


@each_live_policy
@settings(max_examples=40, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 6))
def test_policy_lives_through_what_a_live_run_does(name: str, data: st.DataObject, capacity: int) -> None:
    policy = make_policy(name, capacity)
    driver = Driver(policy, capacity, data)
    experts = st.builds(ExpertId, st.just(0), st.integers(0, 7))
    for _ in range(data.draw(st.integers(1, 25), label="steps")):
        kind = data.draw(st.sampled_from(["step", "step", "step", "prefetch", "resize", "drop", "sequence"]))
        if kind == "step":
            if data.draw(st.booleans(), label="scores known"):
                policy.observe_scores(0, data.draw(st.lists(st.floats(0, 1), min_size=8, max_size=8)))
            driver.step(sorted(data.draw(st.sets(experts, min_size=1, max_size=5))))
        elif kind == "prefetch":
            driver.prefetch(data.draw(experts))
        elif kind == "resize":
            driver.resize(data.draw(st.integers(1, 8)))
        elif kind == "drop":
            driver.drop()
        else:
            policy.begin_sequence()
    # It still is a cache, and still knows all of its residents.
    left = set(driver.residency.residents)
    locked: set[ExpertId] = set()
    while left - locked:
        victim = policy.victim(locked)
        assert victim in left - locked
        locked.add(victim)


@each_policy
@quick
@given(trace=traces(n_experts=6, steps=30), budget=st.integers(9, 30))
def test_policy_keeps_a_budget_of_bytes(name: str, trace: Trace, budget: int) -> None:
    def size(expert: ExpertId) -> int:
        return 1 + expert.expert % 3

    policy = make(name, budget, trace, size)
    resident: set[ExpertId] = set()
    for event in trace:
        policy.access(event)
        for expert in event:
            if expert in resident:
                continue
            while sum(map(size, resident)) + size(expert) > budget:
                victim = policy.victim_for(expert, set(event))
                assert victim in resident - set(event)
                policy.evict(victim)
                resident.remove(victim)
            policy.admit(expert)
            resident.add(expert)


@each_live_policy
@quick
@given(trace=traces(n_experts=6, steps=30))
def test_a_fresh_one_has_seen_nothing(name: str, trace: Trace) -> None:
    used = Watched(make_policy(name, 4))
    again = Watched(used.inner.fresh(4))
    assert replay(used, 4, trace) == replay(again, 4, trace)
    later = Watched(used.inner.fresh(4))
    assert later.inner is not used.inner
    assert later.inner.parameters == used.inner.parameters
    replay(later, 4, trace)
    assert later.evicted == used.evicted
