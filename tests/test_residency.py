"""The cache's bookkeeping under any order of steps, failures and events larger than the cache."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moert.errors import CapacityError
from moert.policies import make_policy
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

    @precondition(lambda self: not self.stepping)
    @rule(event=st.sets(st.integers(0, 7), min_size=1))
    def begin(self, event: set[int]) -> None:
        experts = [ExpertId(0, expert) for expert in sorted(event)]
        hits, misses = self.residency.begin(experts)
        assert set(hits) == set(experts) & set(self.in_slot.values())
        assert sorted(hits + misses) == experts
        self.to_admit, self.ready, self.stepping = list(misses), list(hits), True

    @precondition(lambda self: self.to_admit)
    @rule()
    def admit(self) -> None:
        expert = self.to_admit[0]
        locked = set(self.reading) | set(self.ready)
        possible = self.residency.can_admit()
        admission = self.residency.admit(expert)
        assert (admission is not None) == possible == (len(locked) < self.capacity)
        if admission is None:
            return
        assert admission.victim == self.in_slot.get(admission.slot)
        assert admission.victim not in locked
        self.in_slot[admission.slot] = expert
        self.to_admit.pop(0)
        self.reading.append(expert)

    @precondition(lambda self: self.reading)
    @rule(arrives=st.booleans(), data=st.data())
    def settle(self, arrives: bool, data: st.DataObject) -> None:
        expert = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        if arrives:
            self.ready.append(expert)
        else:
            self.residency.abandon(expert)
            self.in_slot = {slot: other for slot, other in self.in_slot.items() if other != expert}

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        self.residency.release(self.ready.pop(data.draw(st.integers(0, len(self.ready) - 1))))

    @precondition(lambda self: self.stepping and not self.reading)
    @rule()
    def end(self) -> None:
        self.residency.end()
        self.to_admit, self.ready, self.stepping = [], [], False

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "residency"):
            return
        self.residency.check_integrity()
        assert self.residency.residents == tuple(sorted(self.in_slot.values()))
        for slot, expert in self.in_slot.items():
            assert self.residency.slot_of(expert) == slot
            assert expert in self.residency
        assert len(self.residency) == len(self.in_slot)


ResidencyMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestResidency = ResidencyMachine.TestCase


def test_cache_without_slots_is_refused() -> None:
    with pytest.raises(CapacityError, match="at least 1 slot"):
        Residency(0, make_policy("lru", 1))


def test_events_do_not_overlap() -> None:
    residency = Residency(2, make_policy("lru", 2))
    residency.begin([ExpertId(0, 1)])
    with pytest.raises(AssertionError, match="has not ended"):
        residency.begin([ExpertId(0, 2)])
    residency.end()
    with pytest.raises(AssertionError, match="twice"):
        residency.begin([ExpertId(0, 2), ExpertId(0, 2)])
