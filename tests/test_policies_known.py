"""What each policy does, against the papers: references of another make, and traces worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import SEQUENTIAL, fewest_misses, fewest_misses_with_bypass
from policy_support import Trace, Watched, e, ids, make, replay, replay_with_bypass, traces, victims

from moert.policies import make_policy
from moert.policies.activation_matrix import ActivationMatrix
from moert.policies.static import Static
from moert.residency import Residency
from moert.types import ExpertId


def skewed(n: int) -> st.SearchStrategy[list[int]]:
    """Traces in which some experts come often, so that hits, promotions and ghosts all occur."""
    return st.lists(st.one_of(st.integers(0, 3), st.integers(0, n - 1)), max_size=120)


@pytest.mark.parametrize("name", sorted(SEQUENTIAL))
@settings(max_examples=150, deadline=None)
@given(trace=skewed(30), capacity=st.integers(1, 24))
def test_single_accesses_are_the_published_algorithm(name: str, trace: list[int], capacity: int) -> None:
    events = ids([[x] for x in trace])
    assert sum(replay(make(name, capacity, events), capacity, events)) == SEQUENTIAL[name](trace, capacity)


TEXTBOOK = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
"""The reference string of Silberschatz, Galvin and Gagne, and their faults with three frames."""
ANOMALY = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]
"""Belady's anomaly: more room, more misses of FIFO."""


@pytest.mark.parametrize(
    ("name", "trace", "capacity", "misses"),
    [
        ("fifo", TEXTBOOK, 3, 15),
        ("lru", TEXTBOOK, 3, 12),
        ("belady", TEXTBOOK, 3, 9),
        ("fifo", ANOMALY, 3, 9),
        ("fifo", ANOMALY, 4, 10),
        ("lru", ANOMALY, 3, 10),
        ("lru", ANOMALY, 4, 8),
        ("belady", ANOMALY, 3, 7),
        ("belady", ANOMALY, 4, 6),
    ],
)
def test_textbook(name: str, trace: list[int], capacity: int, misses: int) -> None:
    events = ids([[x] for x in trace])
    assert sum(replay(make(name, capacity, events), capacity, events)) == misses


@settings(max_examples=200, deadline=None)
@given(trace=traces(n_experts=7, steps=12), capacity=st.integers(3, 6))
def test_min_is_the_least_that_there_is(trace: Trace, capacity: int) -> None:
    ints = tuple(tuple(expert.expert for expert in event) for event in trace)
    assert sum(replay(make("belady", capacity, trace), capacity, trace)) == fewest_misses(ints, capacity)
    assert sum(replay(make("min_bypass", capacity, trace), capacity, trace)) == fewest_misses(ints, capacity)


@settings(max_examples=200, deadline=None)
@given(trace=traces(n_experts=7, steps=11, event=4), capacity=st.integers(1, 5))
def test_min_with_bypass_is_the_least_of_those(trace: Trace, capacity: int) -> None:
    """Also where an event is larger than the cache."""
    ints = tuple(tuple(expert.expert for expert in event) for event in trace)
    misses = sum(replay_with_bypass(make("min_bypass", capacity, trace), capacity, trace))
    assert misses == fewest_misses_with_bypass(ints, capacity)


def test_bypass_saves_misses() -> None:
    trace = ids([[0], [1], [0], [2], [0]])
    assert replay(make("belady", 1, trace), 1, trace) == [1, 1, 1, 1, 1]
    assert replay_with_bypass(make("min_bypass", 1, trace), 1, trace) == [1, 1, 0, 1, 0]


def test_lru_takes_hits_of_an_event_as_older_than_its_misses() -> None:
    # 0 2 4 are resident; 2 and 4 hit, 1 comes for 0; then 2, 4, 1 from old to new.
    assert victims(make_policy("lru", 3), 3, ids([[0], [2], [4], [1, 2, 4], [5], [6], [7]])) == [0, 2, 4, 1]


def test_least_stale_is_lru_in_one_layer() -> None:
    trace = ids([[0, 1], [2], [1], [3], [0], [2, 3]])
    assert victims(make_policy("least_stale", 3), 3, trace) == victims(make_policy("lru", 3), 3, trace)


@pytest.mark.parametrize(("name", "last"), [("least_stale", e(1, 1)), ("lru", e(1, 2))])
def test_least_stale_keeps_what_was_brought_up_for_this_pass(name: str, last: ExpertId) -> None:
    policy = make_policy(name, 5)
    for expert in (e(0, 0), e(0, 1), e(0, 2)):
        policy.access([expert])
        policy.admit(expert)
    policy.access([e(0, 0)])
    policy.admit(e(1, 1))
    policy.admit(e(1, 2))
    # A new pass has used 0 of layer 0 and brought up two: the others are stale, the older one first.
    assert policy.victim(set()) == e(0, 1)
    assert policy.victim({e(0, 1)}) == e(0, 2)
    assert policy.victim({e(0, 1), e(0, 2)}) == e(0, 0)
    # Brought up and then used in one pass, an expert does not get newer, as it does with LRU.
    policy.access([e(1, 1)])
    assert policy.victim({e(0, 0), e(0, 1), e(0, 2)}) == last


def test_sieve_by_hand() -> None:
    # 0 1 2, then 0 is marked. For 3 the hand clears 0 and takes 1; from there it goes on: 2, 3, 4.
    assert victims(make_policy("sieve", 3), 3, ids([[0], [1], [2], [0], [3], [4], [5], [6]])) == [1, 2, 3, 4]
    # A marked one that is locked keeps its mark.
    policy = make_policy("sieve", 2)
    policy.admit(e(0))
    policy.admit(e(1))
    policy.access([e(0), e(1), e(2)])
    assert policy.victim({e(0)}) == e(1)
    policy.evict(e(1))
    policy.admit(e(2))
    assert policy.victim(set()) == e(2)


def test_s3fifo_by_hand() -> None:
    # Ten slots: one small, nine main. 0 fills the small queue, 1 to 9 the main one as long as nothing was evicted.
    trace = [[x] for x in range(10)]
    # 10: 0 leaves and has a ghost. 0 comes back into the main queue for 10. 11 evicts from main, which is over: 1.
    assert victims(make_policy("s3fifo", 10), 10, ids([*trace, [10], [0], [11]])) == [0, 10, 1]
    # Used twice, 0 goes on to the main queue, where it is last; the first there leaves.
    assert victims(make_policy("s3fifo", 10), 10, ids([*trace, [0], [0], [10]])) == [1]
    # Used once is not enough.
    assert victims(make_policy("s3fifo", 10), 10, ids([*trace, [0], [10]])) == [0]


def test_arc_resists_a_scan_by_hand() -> None:
    # 0 and 1 are used twice and stay while 2, 3, 4, 5 pass through the other half.
    assert victims(make_policy("arc", 3), 3, ids([[0], [1], [0], [1], [2], [3], [4], [5]])) == [2, 3, 4]
    # 2 was evicted from T1 and comes back: T1 is to grow by one, and the next to leave is the oldest of T2.
    trace = ids([[0], [1], [0], [1], [2], [3], [2], [6]])
    assert victims(make_policy("arc", 3), 3, trace)[:2] == [2, 0]


def test_slru_by_hand() -> None:
    # Five slots, four protected. 0 hits and is protected; 1, 2, 3, 4 are on probation and leave first.
    assert victims(make_policy("slru", 5), 5, ids([[0], [1], [2], [3], [4], [0], [5], [6], [7], [8]])) == [1, 2, 3, 4]
    # All five hit, 0 first, so 0 is back on probation.
    assert victims(make_policy("slru", 5), 5, ids([[0], [1], [2], [3], [4], *([x] for x in range(5)), [5]])) == [0]


def test_wtinylfu_keeps_the_more_frequent() -> None:
    # 0 and 1 were used twice and are in the main part, 2 once: it is in the window and loses to the older of them.
    assert victims(make_policy("wtinylfu", 3), 3, ids([[0], [1], [0], [1], [2], [3], [4]])) == [2, 3]
    # Used three times 2 wins, over 1: 0 was used again in the main part and is protected.
    assert victims(make_policy("wtinylfu", 3), 3, ids([[0], [1], [0], [1], [2], [2], [2], [3]])) == [1]


def test_lfu_perfect_and_in_cache() -> None:
    # 0 was used three times before it left. When it is back 2, with four uses, is as good, and older; or better.
    trace = ids([[0], [0], [0], [1], [1], [1], [1], [2], [2], [2], [2], [0], [3]])
    assert victims(make_policy("lfu", 2), 2, trace) == [0, 1, 2]
    assert victims(make_policy("lfu,in_cache=true", 2), 2, trace) == [0, 1, 0]


def test_lfu_forgets_with_decay() -> None:
    # 0 was used three times at first, 1 twice just now.
    trace = ids([[0], [0], [0], [2], [2], [2], [2], [1], [1], [3]])
    assert victims(make_policy("lfu", 3), 3, trace) == [1]
    assert victims(make_policy("lfu,decay=0.5", 3), 3, trace) == [0]


def test_lfru_is_frequency_over_age() -> None:
    # At event 8 0 has 4 / 5, 1 has 1 / 4, 2 has 1 / 3: 1 leaves, where LRU would let 0.
    assert victims(make_policy("lfru", 3), 3, ids([[0], [0], [0], [0], [1], [2], [2], [3]])) == [1]
    # Much later 0 has 2 / 12 and 1 has 1 / 2.
    trace = ids([[0], [0], *([[2], [3]] * 4), [2], [1], [4]])
    assert 0 in victims(make_policy("lfru", 3), 3, trace)


def test_mrs_follows_the_scores_of_the_router_and_not_the_choice() -> None:
    policy = make_policy("mrs,alpha=0.5,top_k=1", 3)
    for expert in (0, 1, 2):
        policy.admit(e(expert))
    policy.observe_scores(0, [0.5, 0.3, 0.2])
    policy.access([e(0)])
    # TopP keeps two: .25, .15, 0
    assert policy.victim(set()) == e(2)
    policy.observe_scores(0, [0.0, 0.4, 0.6])
    policy.access([e(2)])
    # .125, .275, .3
    assert policy.victim(set()) == e(0)
    policy.observe_scores(0, [0.9, 0.0, 0.1])
    policy.access([e(0)])
    # .5125, .1375, .2
    assert policy.victim(set()) == e(1)
    # Scores are of one step only; without them the choice counts: .25625, .06875, .6
    policy.access([e(2)])
    policy.access([e(1)])
    assert policy.victim(set()) == e(0)


def test_static_stays_as_it_was_given() -> None:
    counts = {e(0): 5.0, e(1): 4.0, e(2): 3.0}
    trace = ids([[0], [1], [2], [3], [4], [3], [4], [0], [1]])
    watched = Watched(Static(3, counts=counts))
    assert replay(watched, 3, trace) == [1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert [expert.expert for expert in watched.evicted] == [2, 3, 4, 3]
    assert not watched.inner.wants(e(3), set())
    assert watched.inner.wants(e(0), {e(0), e(1)})


def test_static_is_frozen_after_its_warm_up() -> None:
    # Counted are the first three events of the layer: 0 twice, 1 once.
    trace = ids([[0], [0], [1], [2], [2], [2], [3]])
    assert victims(make_policy("static,warm_up_events=3", 2), 2, trace) == [1, 2]
    assert victims(make_policy("static,warm_up_events=6", 2), 2, trace) == [1, 0]
    policy = make_policy("static,warm_up_events=1", 2)
    assert policy.wants(e(5), set()), "until then every expert may be worth something"


def test_random_takes_each_as_often_and_the_same_ones_again() -> None:
    def gone(seed: int) -> list[int]:
        return victims(make_policy(f"random,seed={seed}", 4), 4, ids([[x] for x in range(400)]))

    assert gone(1) == gone(1)
    assert gone(1) != gone(2)
    policy = make_policy("random,seed=3", 8)
    for expert in range(8):
        policy.admit(e(expert))
    taken: Counter[int] = Counter()
    for _ in range(6000):
        victim = policy.victim({e(0), e(5)})
        taken[victim.expert] += 1
        policy.evict(victim)
        policy.admit(victim)
    assert set(taken) == {1, 2, 3, 4, 6, 7}
    # Six standard deviations of 1000 draws each.
    assert all(abs(count - 1000) < 6 * math.sqrt(1000 * 5 / 6) for count in taken.values())


def test_activation_matrix_takes_the_most_similar_sequence() -> None:
    policy = ActivationMatrix(4)
    first, second = [[0, 1], [0, 2]], [[4, 5], [4, 6]]
    for sequence in (first, second):
        policy.begin_sequence()
        for event in ids(sequence):
            policy.access(event)
    policy.begin_sequence()
    assert policy.nearest() is None, "nothing has been seen of this sequence"
    for expert in (1, 2, 5, 6):
        policy.admit(e(expert))
    policy.access([e(4)])
    # cos with the first (2, 1, 1 for 0, 1, 2) is 0, with the second 2 / sqrt(6): 5 and 6 stay.
    assert policy.nearest() == 1
    assert policy.victim(set()) == e(1)
    assert policy.victim({e(1), e(2)}) == e(5)
    for _ in range(3):
        policy.access([e(0)])
    assert policy.nearest() == 0
    assert policy.victim(set()) == e(5)


def test_activation_matrix_compares_the_layers_that_it_has_seen_and_no_others() -> None:
    policy = ActivationMatrix(4)
    # Both have been to layer 0 alike but for one expert, and to layer 1 differently.
    for one, other in ((0, 3), (1, 7)):
        policy.begin_sequence()
        for _ in range(3):
            policy.access([e(one, 0)])
            policy.access([e(other, 1)])
    policy.begin_sequence()
    policy.admit(e(3, 1))
    policy.admit(e(7, 1))
    policy.access([e(1, 0)])
    assert policy.nearest() == 1
    assert policy.victim(set()) == e(3, 1)


def test_activation_matrix_keeps_the_layers_that_run_next() -> None:
    policy = ActivationMatrix(3)
    for layer in range(3):
        policy.access([e(0, layer)])
        policy.admit(e(0, layer))
    # All alike but for the distance: after layer 2 comes layer 0 again, then 1, then 2.
    assert policy.victim(set()) == e(0, 2)
    policy.access([e(0, 0)])
    policy.access([e(0, 1)])
    assert policy.victim({e(0, 0)}) == e(0, 1)


def test_activation_matrix_replaces_the_most_similar_one() -> None:
    policy = ActivationMatrix(2, matrices=2)
    for expert in (0, 1, 1):
        policy.begin_sequence()
        policy.access([e(expert)])
    policy.begin_sequence()
    policy.access([e(0)])
    assert policy.nearest() == 0, "the third sequence has taken the place of the second, not of the first"


def test_worth_is_per_byte_where_sizes_differ() -> None:
    def size(expert: ExpertId) -> int:
        return 4 if expert.expert == 0 else 1

    for name in ("ema,alpha=0.5", "lfu", "lfru", "static,warm_up_events=9", "mrs"):
        policy = make_policy(name, 6, sizes=size)
        for expert in (0, 1):
            policy.access([e(expert)])
            policy.admit(e(expert))
        policy.access([e(0), e(1)])
        policy.access([e(0), e(1)])
        # Nearly as often used, but four times the bytes.
        assert policy.victim(set()) == e(0), name


def test_no_victim_of_an_event_that_is_still_to_be_computed() -> None:
    """What all of this is for: a scan over eight experts in one event evicts none of them before it is computed."""
    residency = Residency(2, make_policy("fifo", 2))
    event = [e(expert) for expert in range(3)]
    residency.begin(event)
    for expert in event[:2]:
        residency.admit(expert)
        residency.arrive(expert)
    assert not residency.can_admit()
    assert not residency.wants(event[2])
    residency.release(event[1])
    assert residency.wants(event[2])
    admission = residency.admit(event[2])
    assert admission is not None
    assert admission.victim == event[1], "the first one is older, but is still to be computed"
