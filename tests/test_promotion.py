"""Background promotion: what is brought, what for, and that a cache behind a poor link does not freeze."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_support import real_trace

from moert.errors import ConfigError
from moert.policies import make_policy
from moert.schedule import Costs, Curve, Promotion, Swap
from moert.simulate import simulate
from moert.simulate.timed import simulate_time
from moert.trace import LayerInfo, Phase, Sequence, Trace, TraceHeader
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer, recognise
from moert.types import ExpertId

LINK_POOR = Costs(Curve.constant(4.4e-4), Curve.constant(4e-5), move_s=1.9e-3)
"""A CPU that is four times as fast as the link: no event is ever done sooner for a fetch."""
LAYER_S = 2e-4


def expert(number: int, layer: int = 0) -> ExpertId:
    return ExpertId(layer, number)


def used(promotion: Promotion, counts: dict[int, int], layer: int = 0) -> None:
    """So many events of single experts, interleaved."""
    left = dict(counts)
    while any(left.values()):
        for number, n in left.items():
            if n:
                promotion.observe([expert(number, layer)])
                left[number] -= 1


def carry(promotion: Promotion, chunks: int = 3) -> None:
    for _ in range(chunks):
        promotion.chunk_done()


def test_the_moving_average_is_that_of_the_policy() -> None:
    rng = np.random.default_rng(0)
    policy, promotion = make_policy("ema,alpha=0.1,burst=0", 4), Promotion(alpha=0.1)
    for _ in range(50):
        event = [expert(int(n)) for n in sorted(rng.choice(8, 3, replace=False))]
        policy.access(event)
        promotion.observe(event)
    for number in range(9):
        assert promotion.rate(expert(number)) == pytest.approx(policy.score(expert(number)))  # type: ignore[attr-defined]


def test_the_largest_gain_moves_and_takes_the_place_of_the_weakest() -> None:
    promotion = Promotion(hysteresis=0.01)
    used(promotion, {0: 1, 1: 8, 2: 20})
    promotion.offer(0, [expert(1), expert(2)], expert(0))
    assert promotion.next_chunk() == promotion.next_chunk() == expert(2)
    carry(promotion)
    assert promotion.next_chunk() is None
    assert list(promotion.install(lambda _: expert(0))) == [Swap(expert(2), expert(0))]
    assert not list(promotion.install(lambda _: expert(0)))


def test_what_has_begun_goes_on_and_the_next_one_is_the_best_of_all_layers() -> None:
    promotion = Promotion()
    used(promotion, {0: 1, 1: 8})
    used(promotion, {0: 1, 1: 30}, layer=1)
    promotion.offer(0, [expert(1)], expert(0))
    assert promotion.next_chunk() == expert(1)
    promotion.chunk_done()
    promotion.offer(1, [expert(1, 1)], expert(0, 1))
    assert promotion.next_chunk() == expert(1)
    carry(promotion, 2)
    assert promotion.next_chunk() == expert(1, 1)


def test_the_layer_with_the_most_gain_is_first_and_of_equal_ones_the_earlier() -> None:
    promotion = Promotion()
    for layer, uses in ((0, 8), (1, 30), (2, 30)):
        used(promotion, {0: 1, 1: uses}, layer=layer)
        promotion.offer(layer, [expert(1, layer)], expert(0, layer))
    assert promotion.next_chunk() == expert(1, 1)
    carry(promotion)
    assert promotion.next_chunk() == expert(1, 2)


def test_no_more_arrive_than_are_staged() -> None:
    promotion = Promotion(staged=1)
    used(promotion, {0: 1, 1: 8, 2: 9})
    promotion.offer(0, [expert(1), expert(2)], expert(0))
    assert promotion.next_chunk() == expert(2)
    carry(promotion)
    promotion.offer(0, [expert(1)], expert(0))
    assert promotion.next_chunk() is None
    assert list(promotion.install(lambda _: None)) == [Swap(expert(2), None)]
    assert promotion.next_chunk() == expert(1)


def test_a_small_gain_is_not_worth_it() -> None:
    promotion = Promotion(hysteresis=0.05)
    used(promotion, {0: 5, 1: 6})
    promotion.offer(0, [expert(1)], expert(0))
    assert promotion.next_chunk() is None
    promotion.offer(0, [expert(1)], None)
    assert promotion.next_chunk() == expert(1)


def test_of_equal_gains_the_first_is_brought_and_no_gain_is_none() -> None:
    promotion = Promotion(hysteresis=0.0)
    promotion.observe([expert(0), expert(1), expert(2)])
    promotion.offer(0, [expert(2), expert(1)], expert(0))
    assert promotion.next_chunk() is None
    promotion.offer(0, [expert(2), expert(1)], None)
    assert promotion.next_chunk() == expert(1)


def test_only_the_latest_event_of_a_layer_has_candidates() -> None:
    promotion = Promotion()
    used(promotion, {0: 1, 1: 8})
    promotion.offer(0, [expert(1)], expert(0))
    promotion.offer(0, [], expert(0))
    assert promotion.next_chunk() is None


def test_what_lost_its_worth_on_the_way_is_given_up() -> None:
    promotion = Promotion()
    used(promotion, {0: 2, 1: 9})
    promotion.offer(0, [expert(1)], expert(0))
    assert promotion.next_chunk() == expert(1)
    carry(promotion)
    used(promotion, {0: 60})
    assert not list(promotion.install(lambda _: expert(0)))
    assert promotion.finished == 1


def test_on_arrival_too_a_small_gain_is_not_worth_it() -> None:
    promotion = Promotion(hysteresis=0.05)
    used(promotion, {0: 5, 1: 9})
    promotion.offer(0, [expert(1)], expert(0))
    assert promotion.next_chunk() == expert(1)
    carry(promotion)
    while promotion.rate(expert(1)) > promotion.rate(expert(0)) + 0.03:
        promotion.observe([expert(0)])
    assert promotion.rate(expert(1)) > promotion.rate(expert(0))
    assert not list(promotion.install(lambda _: expert(0)))


def test_locked_ones_stay_where_they_are() -> None:
    promotion = Promotion()
    used(promotion, {0: 1, 1: 9})
    promotion.offer(0, [expert(1)], expert(0))
    assert promotion.next_chunk() == expert(1)
    carry(promotion)
    assert not list(promotion.install(lambda _: expert(0), locked={expert(0)}))
    assert list(promotion.install(lambda _: expert(0))) == [Swap(expert(1), expert(0))]


def test_what_came_by_another_way_is_not_brought_again() -> None:
    promotion = Promotion()
    used(promotion, {0: 1, 1: 8, 2: 9, 3: 10})
    promotion.offer(0, [expert(3)], expert(0))
    assert promotion.next_chunk() == expert(3)
    carry(promotion)
    promotion.offer(0, [expert(2), expert(3)], expert(0))
    assert promotion.next_chunk() == expert(2)
    promotion.offer(0, [expert(1), expert(2), expert(3)], expert(0))
    promotion.drop({expert(2), expert(3)})
    assert promotion.next_chunk() == expert(1)
    promotion.drop({expert(1)})
    assert promotion.next_chunk() is None
    assert not list(promotion.install(lambda _: None))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_locked=st.integers(0, 2))
def test_swaps_are_of_residents_only_and_never_of_locked_ones(seed: int, n_locked: int) -> None:
    rng = np.random.default_rng(seed)
    promotion = Promotion(alpha=0.2, hysteresis=0.0)
    residents = {expert(n) for n in range(4)}
    for _ in range(100):
        event = [expert(int(n)) for n in sorted(rng.choice(10, 2, replace=False))]
        promotion.observe(event)
        weakest = min(residents, key=promotion.rate)
        promotion.offer(0, [one for one in event if one not in residents], weakest)
        for _ in range(int(rng.integers(0, 5))):
            moving = promotion.next_chunk()
            if moving is not None:
                assert moving not in residents
                promotion.chunk_done()
        locked = set(sorted(residents)[:n_locked])
        for swap in promotion.install(lambda _: min(residents, key=promotion.rate), locked):
            assert swap.victim is not None
            assert swap.victim in residents - locked
            assert swap.expert not in residents
            assert promotion.rate(swap.expert) > promotion.rate(swap.victim)
            residents.remove(swap.victim)
            residents.add(swap.expert)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0}, {"alpha": float("nan")}, {"hysteresis": -1}, {"hysteresis": 1}, {"chunks": 0}, {"staged": 0}],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Promotion(**options)  # type: ignore[arg-type]


def skewed(num_tokens: int, warm_up: int, layers: int = 4, experts: int = 32, top_k: int = 4) -> Trace:
    """Some experts are liked far more than others, and after the warm-up they are other ones."""
    rng = np.random.default_rng(1)
    liked = rng.dirichlet(np.full(experts, 0.25), size=(2, layers)) + 1e-5
    ids = np.empty((warm_up + num_tokens, layers, top_k), np.int32)
    for token in range(len(ids)):
        for layer in range(layers):
            p = liked[int(token >= warm_up), layer]
            ids[token, layer] = rng.choice(experts, top_k, replace=False, p=p / p.sum())
    phases = np.full(len(ids), Phase.DECODE, np.uint8)
    phases[:warm_up] = Phase.PREFILL
    header = TraceHeader(tuple(LayerInfo(f"layers.{i}", experts, top_k) for i in range(layers)))
    return Trace(header, [Sequence(ids, np.arange(len(ids)), phases)])


def hit_rates(trace: Trace, last: int) -> tuple[float, float, float]:
    """Of the last tokens: frozen, with promotion, and of the policy that brings every miss at once."""
    n = last * len(trace.header.layers)
    frozen = simulate_time(trace, "ema", "25%", LINK_POOR, layer_s=LAYER_S)
    promoted = simulate_time(trace, "ema", "25%", LINK_POOR, layer_s=LAYER_S, promotion=Promotion())
    assert frozen.fetched == promoted.fetched == 0
    assert frozen.promoted == 0 < promoted.promoted
    assert promoted.seconds <= frozen.seconds
    kept = simulate(trace, "ema", "25%", keep_events=True).event_hits
    assert kept is not None
    uses = n * trace.header.top_k
    return sum(frozen.event_hits[-n:]) / uses, sum(promoted.event_hits[-n:]) / uses, float(kept[-n:].sum()) / uses


def test_a_cache_behind_a_poor_link_follows_the_text() -> None:
    frozen, promoted, ema = hit_rates(skewed(600, 300), last=300)
    assert frozen < ema - 0.3
    assert promoted > ema - 0.01


def test_hysteresis_stops_thrashing() -> None:
    """Uniform routing: nobody is worth more than another, so what is moved is moved for nothing."""
    rng = np.random.default_rng(2)
    ids = np.stack([np.stack([rng.choice(32, 4, replace=False) for _ in range(2)]) for _ in range(400)])
    header = TraceHeader(tuple(LayerInfo(f"layers.{i}", 32, 4) for i in range(2)))
    trace = Trace(header, [Sequence(ids.astype(np.int32), np.arange(400), np.full(400, Phase.DECODE, np.uint8))])
    moved = {
        h: simulate_time(trace, "ema", "25%", LINK_POOR, layer_s=LAYER_S, promotion=Promotion(hysteresis=h))
        for h in (0.0, 0.02, 0.1)
    }
    assert moved[0.02].promoted < 0.7 * moved[0.0].promoted
    assert moved[0.1].promoted < 0.2 * moved[0.0].promoted
    assert moved[0.1].hit_rate > moved[0.0].hit_rate - 0.03


def test_on_the_real_trace_of_gpt_oss() -> None:
    path = real_trace("gpt-oss-20b", "gpt-oss-20b_mmlu_pro_test.npz")
    header, found = load_importer(recognise(path)).read(path, ImportOptions(experts=32, keep_repetition=False))
    sequences = list(found)
    ids = np.concatenate([sequence.experts for sequence in sequences])
    middle = len(ids) // 2
    ids = ids[middle - 1500 : middle + 600]
    phases = np.where(np.arange(len(ids)) < 1500, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    sequence = replace(sequences[0], experts=ids, steps=np.arange(len(ids)), phases=phases, weights=None, scores=None)
    frozen, promoted, ema = hit_rates(Trace(header, [replace(sequence, token_ids=None)]), last=300)
    assert frozen < ema - 0.15
    assert promoted > ema - 0.01
