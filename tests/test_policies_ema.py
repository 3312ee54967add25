"""What `ema` keeps: against scores written out for all experts at each event, and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import moving_averages
from policy_support import Trace, e, traces, victims

from moert.policies import make_policy
from moert.policies.ema import EMA


@pytest.mark.parametrize(("alpha", "burst"), [("0.25", "0"), ("0.03125", "0"), ("0.5", "0.75"), ("0.03125", "0.625")])
@settings(max_examples=80, deadline=None)
@given(trace=traces(n_experts=6, steps=40), capacity=st.integers(3, 5))
def test_ema_is_the_score_updated_everywhere_at_each_event(alpha: str, burst: str, trace: Trace, capacity: int) -> None:
    ints = [[expert.expert for expert in event] for event in trace]
    history = moving_averages(ints, Fraction(alpha), Fraction(burst))
    held: list[int] = []
    last: dict[int, int] = {}
    gone, order = [], 0
    for event, scores in zip(ints, history, strict=True):
        for expert in event:
            order += 1
            last[expert] = order
        for expert in event:
            if expert not in held:
                if len(held) == capacity:
                    victim = min((x for x in held if x not in event), key=lambda x: (scores[x], last[x]))
                    held.remove(victim)
                    gone.append(victim)
                held.append(expert)
    assert victims(make_policy(f"ema,alpha={alpha},burst={burst}", capacity), capacity, trace) == gone
    policy = EMA(capacity, float(alpha), float(burst))
    for event, scores in zip(trace, history, strict=True):
        policy.access(event)
        for expert, score in scores.items():
            assert math.isclose(policy.score(e(expert)), score, rel_tol=1e-12)


def test_to_ema_a_burst_counts_less_than_as_many_uses_apart() -> None:
    for burst, leaves in ((0.0, 1), (0.68, 0)):
        policy = EMA(2, 0.001, burst)
        for expert in (0, 1):
            policy.admit(e(expert))
        for event in ([e(1)], [], [], [e(0), e(1)], [e(0)], [e(0)], [e(2)]):
            policy.access(event or [e(7)])
        # 0 was used three times in a row, 1 twice, three events apart.
        assert policy.victim(set()) == e(leaves)


def test_ema_counts_uses_that_are_far_apart_in_full() -> None:
    policy = EMA(2, 0.03)
    policy.access([e(0)])
    for _ in range(200):
        policy.access([e(1)])
    policy.access([e(0)])
    assert math.isclose(policy.score(e(0)), 0.03 * (1 + 0.97**201), rel_tol=1e-12)


def test_ema_wants_who_scores_more() -> None:
    policy = EMA(1, 0.5, 0.0, bonus=0.0)
    policy.access([e(0)])
    policy.admit(e(0))
    policy.access([e(0)])
    policy.access([e(1)])
    # 0: .5, .75, .375; 1: .5
    assert policy.score(e(0)) == 0.375
    assert policy.wants(e(1), set())
    policy.access([e(0)])
    assert not policy.wants(e(1), set())


def test_ema_wants_what_was_needed_just_now_for_a_little_less() -> None:
    for bonus, is_enough in ((0.0625, False), (0.1, True)):
        policy = EMA(1, 0.25, 0.0, bonus)
        for expert in (0, 0, 0, 1, 2):
            policy.access([e(expert)])
        policy.admit(e(0))
        # .25, .4375, .578125 and then twice times .75; the others .1875 and .25
        assert math.isclose(policy.score(e(0)), 0.3251953125)
        assert policy.wants(e(2), set()) == is_enough
        assert not policy.wants(e(1), set()), "its event is over"
        assert policy.victim(set()) == e(0)


@pytest.mark.parametrize("bonus", ["0", "0.125", "0.5"])
@settings(max_examples=80, deadline=None)
@given(trace=traces(n_experts=7, steps=40), capacity=st.integers(1, 5))
def test_ema_without_room_for_all_misses(bonus: str, trace: Trace, capacity: int) -> None:
    """Those that are wanted are admitted once the event is over, one after the other; worths written out."""
    ints = [[expert.expert for expert in event] for event in trace]
    extra = Fraction(bonus)
    policy = make_policy(f"ema,alpha=0.25,burst=0.5,bonus={bonus}", capacity)
    held: list[int] = []
    last: dict[int, int] = {}
    order = 0
    for event, scores in zip(ints, moving_averages(ints, Fraction(1, 4), Fraction(1, 2)), strict=True):
        policy.access([e(x) for x in event])
        for x in event:
            order += 1
            last[x] = order
        fits = len(event) <= capacity
        worths = {x: scores[x] + (extra if fits and x in event else 0) for x in scores}
        for x in [x for x in event if x not in held]:
            if len(held) == capacity:
                leaves = min(held, key=lambda y: (worths[y], last[y]))
                assert policy.victim(set()) == e(leaves)
                assert policy.wants(e(x), set()) == (worths[x] > worths[leaves])
                if worths[x] <= worths[leaves]:
                    continue
                policy.evict(e(leaves))
                held.remove(leaves)
            policy.admit(e(x))
            held.append(x)


def test_an_event_as_large_as_that_of_all_layers_fits_or_nothing_of_it_is_worth_more() -> None:
    small, large = (make_policy("ema,bonus=0.5", capacity) for capacity in (3, 4))
    for policy in (small, large):
        policy.access([e(5, 0), e(6, 0)])
        policy.access([e(1, 1), e(2, 1)])
        policy.access([e(1, 1), e(2, 1)])
        for expert in (e(1, 1), e(2, 1)):
            policy.admit(expert)
        policy.access([e(5, 0), e(6, 0)])
        policy.access([e(3, 1), e(4, 1)])
    # Two layers with two experts each take four places.
    assert large.wants(e(3, 1), set())
    assert not small.wants(e(3, 1), set())


def test_where_sizes_differ_it_is_bytes_that_have_to_fit() -> None:
    for capacity, is_worth_more in ((8, True), (7, False)):
        policy = make_policy("ema,bonus=0.5", capacity, sizes=lambda expert: 4)
        policy.access([e(1), e(2)])
        policy.access([e(1), e(2)])
        policy.admit(e(1))
        policy.access([e(3), e(4)])
        assert policy.wants(e(3), set()) == is_worth_more


def test_ema_of_several_layers_decays_by_each_layers_own_events() -> None:
    policy = EMA(4, 0.5)
    for expert in (e(0, 0), e(1, 0), e(0, 1)):
        policy.access([expert])
        policy.admit(expert)
    # Layer 0: 0 has .25, 1 has .5; layer 1 has had one event, so its 0 has .5 and is the more recent one.
    assert policy.victim(set()) == e(0, 0)
    assert policy.victim({e(0, 0)}) == e(1, 0)
    for _ in range(3):
        policy.access([e(7, 1)])
    assert policy.victim(set()) == e(0, 1)


def test_ema_survives_many_events() -> None:
    policy = EMA(3, 0.5)
    for step in range(5000):
        policy.access([e(step % 2)])
        if step < 2:
            policy.admit(e(step))
    policy.admit(e(2))
    assert policy.victim(set()) == e(2)
    assert policy.victim({e(2)}) == e(0)
    for _ in range(5000):
        policy.access([e(0)])
    assert policy.score(e(1)) == 0
    assert policy.victim({e(2)}) == e(1)
