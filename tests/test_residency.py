"""The cache's bookkeeping under any order of steps, failures and events larger than the cache."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moert.errors import CapacityError
from moert.policies import make_policy
from moert.policies.lru import LRU
from moert.residency import Residency
from moert.types import ExpertId


class ResidencyMachine(RuleBasedStateMachine):
    """Drives a cache as steps do, beside a model of what must be where."""

    @initialize(capacity=st.integers(1, 5))
    def start(self, capacity: int) -> None:
        self.residency = Residency(capacity, make_policy("lru", capacity))
        self.capacity = capacity
        self.in_slot: dict[int, ExpertId] = {}
        self.to_admit: list[ExpertId] = []
        self.reading: list[ExpertId] = []
        self.ready: list[ExpertId] = []
        self.stepping = False
        self.event: set[ExpertId] = set()

    @precondition(lambda self: not self.stepping)
    @rule(event=st.sets(st.integers(0, 7), min_size=1))
    def begin(self, event: set[int]) -> None:
        experts = [ExpertId(0, expert) for expert in sorted(event)]
        hits, misses, arriving = self.residency.begin(experts)
        assert set(hits) == set(experts) & (set(self.in_slot.values()) - set(self.reading))
        assert sorted(hits + misses) == experts
        assert set(arriving) == set(experts) & set(self.reading)
        self.event = set(experts)
        self.to_admit = [expert for expert in misses if expert not in arriving]
        self.ready, self.stepping = list(hits), True

    @precondition(lambda self: not self.stepping)
    @rule(event=st.sets(st.integers(0, 7), min_size=1))
    def begin_hits(self, event: set[int]) -> None:
        experts = [ExpertId(0, expert) for expert in sorted(event)]
        slots = {expert: slot for slot, expert in self.in_slot.items()}
        possible = set(experts) <= slots.keys() - set(self.reading)
        assert self.residency.begin_hits(experts) == possible
        if possible:
            assert self.residency.slots_of(experts) == [slots[expert] for expert in experts]
            self.event = set(experts)
            self.to_admit, self.ready, self.stepping = [], experts, True

    @precondition(lambda self: self.to_admit)
    @rule()
    def admit_of_the_event(self) -> None:
        if self.admit(self.to_admit[0]):
            self.to_admit.pop(0)

    @rule(data=st.data())
    def admit_another(self, data: st.DataObject) -> None:
        absent = {ExpertId(0, expert) for expert in range(8)} - set(self.in_slot.values()) - set(self.to_admit)
        if absent:
            self.admit(data.draw(st.sampled_from(sorted(absent))))

    def admit(self, expert: ExpertId) -> bool:
        locked = set(self.reading) | set(self.ready)
        possible = self.residency.can_admit()
        admission = self.residency.admit(expert)
        assert (admission is not None) == possible == (len(locked) < self.capacity)
        if admission is None:
            return False
        assert admission.victim == self.in_slot.get(admission.slot)
        assert admission.victim not in locked
        self.in_slot[admission.slot] = expert
        self.reading.append(expert)
        return True

    @precondition(lambda self: self.reading)
    @rule(arrives=st.booleans(), data=st.data())
    def settle(self, arrives: bool, data: st.DataObject) -> None:
        expert = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        if arrives:
            self.residency.take_up(expert)
            self.residency.arrive(expert)
            if self.stepping and expert in self.event:
                self.ready.append(expert)
        else:
            self.residency.abandon(expert)
            self.in_slot = {slot: other for slot, other in self.in_slot.items() if other != expert}

    @precondition(lambda self: self.reading)
    @rule(stays=st.booleans(), data=st.data())
    def give_or_take_up(self, stays: bool, data: st.DataObject) -> None:
        expert = data.draw(st.sampled_from(self.reading))
        if stays:
            self.residency.take_up(expert)
        else:
            self.residency.give_up(expert)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self.residency.release(self.ready.pop(data.draw(st.integers(0, len(self.ready) - 1))))

    @precondition(lambda self: not self.stepping and not self.reading)
    @rule(capacity=st.integers(1, 7))
    def resize(self, capacity: int) -> None:
        before = dict(self.in_slot)
        victims, moves = self.residency.resize(capacity)
        assert len(victims) == max(0, len(before) - capacity), "no more leave than have to"
        assert set(victims) <= set(before.values())
        for expert, from_slot, to_slot in moves:
            assert before[from_slot] == expert
            assert expert not in victims
            assert from_slot >= capacity > to_slot
            assert before.get(to_slot) is None or before[to_slot] in victims, "somebody else's bytes are there"
        places = {expert: slot for slot, expert in before.items() if expert not in victims}
        places.update({move.expert: move.to_slot for move in moves})
        self.in_slot = {slot: expert for expert, slot in places.items()}
        assert len(self.in_slot) == len(places), "two experts in one slot"
        self.capacity = capacity

    @precondition(lambda self: not self.stepping and not self.reading and self.in_slot)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.residency.drop(self.in_slot.pop(data.draw(st.sampled_from(sorted(self.in_slot)))))

    @precondition(lambda self: self.stepping)
    @rule()
    def end(self) -> None:
        self.residency.end()
        self.to_admit, self.ready, self.stepping = [], [], False

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "residency"):
            return
        self.residency.check_integrity()
        residents = set(self.in_slot.values()) - set(self.reading)
        assert self.residency.residents == tuple(sorted(residents))
        assert self.residency.arriving == set(self.reading)
        for slot, expert in self.in_slot.items():
            assert self.residency.slot_of(expert) == slot
            assert (expert in self.residency) == (expert in residents)
        assert len(self.residency) == len(residents)


ResidencyMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestResidency = ResidencyMachine.TestCase


def test_cache_without_slots_is_refused() -> None:
    with pytest.raises(CapacityError, match="at least 1 slot"):
        Residency(0, make_policy("lru", 1))


def test_resize_lets_the_least_recently_used_leave() -> None:
    residency = Residency(4, make_policy("lru", 4))
    for expert in (3, 1, 0, 2):
        residency.begin([ExpertId(0, expert)])
        residency.admit(ExpertId(0, expert))
        residency.arrive(ExpertId(0, expert))
        residency.end()
    change = residency.resize(2)
    assert change.victims == (ExpertId(0, 1), ExpertId(0, 3))
    # 0 was in slot 2 and 2 in slot 3.
    assert change.moves == ((ExpertId(0, 0), 2, 0), (ExpertId(0, 2), 3, 1))
    assert residency.residents == (ExpertId(0, 0), ExpertId(0, 2))


def test_resize_to_nothing_or_within_a_step_is_refused() -> None:
    residency = Residency(2, make_policy("lru", 2))
    with pytest.raises(CapacityError, match="at least 1 slot, not 0"):
        residency.resize(0)
    assert residency.capacity == 2
    residency.begin([ExpertId(0, 1)])
    with pytest.raises(AssertionError, match="has not ended"):
        residency.resize(1)


def test_a_policy_that_fails_to_choose_leaves_the_cache_as_it_was() -> None:
    class Undecided(LRU):
        def victim(self, locked: Collection[ExpertId]) -> ExpertId:
            if locked:
                raise RuntimeError("cannot choose")
            return super().victim(locked)

    residency = Residency(3, Undecided(3))
    experts = [ExpertId(0, expert) for expert in range(3)]
    residency.begin(experts)
    for expert in experts:
        residency.admit(expert)
        residency.arrive(expert)
    residency.end()
    with pytest.raises(RuntimeError, match="cannot choose"):
        residency.resize(1)
    assert residency.residents == tuple(experts)
    residency.check_integrity()


def test_events_do_not_overlap() -> None:
    residency = Residency(2, make_policy("lru", 2))
    residency.begin([ExpertId(0, 1)])
    with pytest.raises(AssertionError, match="has not ended"):
        residency.begin([ExpertId(0, 2)])
    residency.end()
    with pytest.raises(AssertionError, match="twice"):
        residency.begin([ExpertId(0, 2), ExpertId(0, 2)])
