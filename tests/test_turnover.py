"""Who leaves for an event's misses: decided before anything moves, whatever order reads and kernels end in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_support import Watched, ids

from moert.policies import make_policy, policy_names
from moert.residency import Residency
from moert.turnover import PASSING, turn_over
from moert.types import ExpertId

N_EXPERTS = 24
each_live_policy = pytest.mark.parametrize("name", policy_names(live_only=True))
events = st.lists(st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=N_EXPERTS).map(sorted), max_size=8)


def run(residency: Residency, event: list[ExpertId], choose: Callable[[int], int]) -> tuple[int, int]:
    """A step of which `choose` decides what happens next, as timing does; hits, and the most reads there could be."""
    split = residency.begin(event)
    residency.promise()
    residency.check_integrity()
    queue, ready, reading = list(split.misses), list(split.hits), []
    streams = 0
    while queue or ready or reading:
        while queue and residency.can_admit():
            admission = residency.admit(queue[0])
            assert admission is not None
            assert admission.victim is None
            reading.append(queue.pop(0))
        streams = max(streams, len(reading))
        possible = [ready] * bool(ready) + [reading] * bool(reading)
        assert possible, f"{len(queue)} wait for slots that nobody gives up"
        chosen = possible[choose(len(possible))]
        expert = chosen.pop(choose(len(chosen)))
        if chosen is reading:
            residency.arrive(expert)
            ready.append(expert)
        else:
            residency.release(expert)
        residency.check_integrity()
    residency.end()
    residency.check_integrity()
    return len(split.hits), streams


@each_live_policy
@settings(max_examples=40, deadline=None)
@given(trace=events, capacity=st.integers(1, N_EXPERTS), data=st.data())
def test_no_order_of_reads_and_kernels_changes_what_is_resident(
    name: str, trace: list[list[int]], capacity: int, data: st.DataObject
) -> None:
    policy = make_policy(name, capacity)
    residents: set[ExpertId] = set()
    watched = Watched(make_policy(name, capacity))
    residency = Residency(capacity, watched)
    evicted: list[ExpertId] = []
    for event in ids(trace):
        policy.access(event)
        hits = [expert for expert in event if expert in residents]
        misses = [expert for expert in event if expert not in residents]
        before = set(residents)
        victims = turn_over(policy, residents, event, misses, capacity)
        evicted += victims
        assert len(residents) == min(capacity, len(before | set(event)))
        assert set(misses[-min(PASSING, capacity) :]) <= residents
        if len(event) <= capacity:
            assert not set(victims) & set(event)
        else:
            assert residents <= set(event)
        found, _ = run(residency, event, lambda n: data.draw(st.integers(0, n - 1)))
        assert found == len(hits)
        assert set(residency.residents) == residents
    assert watched.evicted == evicted


@given(capacity=st.integers(1, 12), data=st.data())
def test_reads_of_an_event_that_does_not_fit_go_through_many_slots(capacity: int, data: st.DataObject) -> None:
    # The policy would keep the hits for ever, and each miss in turn would be the least.
    policy = make_policy("lfu", capacity)
    residency = Residency(capacity, policy)
    kept = [ExpertId(0, expert) for expert in range(capacity)]
    for _ in range(30):
        run(residency, kept, lambda n: 0)
    event = [ExpertId(0, expert) for expert in range(N_EXPERTS)]
    _, streams = run(residency, event, lambda n: 0)
    assert streams >= min(PASSING, capacity, N_EXPERTS - capacity)
    assert len(set(residency.residents) & set(kept)) == max(0, capacity - PASSING)


@each_live_policy
@settings(max_examples=30, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 6))
def test_steps_that_fail_anywhere_leave_a_cache(name: str, data: st.DataObject, capacity: int) -> None:
    policy = make_policy(name, capacity)
    residency = Residency(capacity, policy)
    reading: list[ExpertId] = []
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        members = data.draw(st.sets(st.integers(0, 9), min_size=1), label="event")
        event = [ExpertId(0, expert) for expert in sorted(members)]
        split = residency.begin(event)
        residency.promise()
        queue = [expert for expert in split.misses if expert not in split.arriving]
        ready = list(split.hits)
        for _ in range(data.draw(st.integers(0, 20), label="actions")):
            action = data.draw(st.sampled_from(["admit", "arrive", "fail", "compute", "guess"]))
            if action == "admit" and queue and residency.can_admit():
                assert residency.admit(queue[0]) is not None
                reading.append(queue.pop(0))
            elif action == "guess":
                other = ExpertId(0, data.draw(st.integers(0, 12)))
                absent = residency.slot_of(other) is None and other not in queue and other not in reading
                if absent and residency.admit(other) is not None:
                    reading.append(other)
            elif action in ("arrive", "fail") and reading:
                expert = reading.pop(data.draw(st.integers(0, len(reading) - 1)))
                if action == "fail":
                    residency.abandon(expert)
                    continue
                residency.arrive(expert)
                if expert in event:
                    ready.append(expert)
            elif action == "compute" and ready:
                residency.release(ready.pop())
            residency.check_integrity()
        residency.end()
        residency.check_integrity()
        assert residency.arriving == set(reading)
    while reading:
        residency.abandon(reading.pop())
    residency.check_integrity()
    locked: set[ExpertId] = set()
    while set(residency.residents) - locked:
        victim = policy.victim(locked)
        assert victim in residency.residents
        locked.add(victim)


def test_bytes_are_made_room_for_as_well() -> None:
    policy = make_policy("lru", 10, sizes=lambda expert: expert.expert)
    residents: set[ExpertId] = set()
    (first, second) = ids([[1, 2, 4], [3, 5]])
    for event in (first, second):
        policy.access(event)
        victims = turn_over(policy, residents, event, event, 10)
    assert victims == ids([[1, 2, 4]])[0]
    assert residents == set(second)
