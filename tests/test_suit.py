"""Local routing consistency: against brute force, by hand, and against what the paper found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_support import real_trace

from moert.suit.statistics import Consistency, ConsistencyMeter
from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence, TraceHeader

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

Ids = npt.NDArray[np.int32]


def sequence(experts: Ids, phases: npt.NDArray[np.uint8] | None = None) -> Sequence:
    steps = np.arange(len(experts))
    return Sequence(experts.astype(np.int32), steps, np.ones(len(steps), np.uint8) if phases is None else phases)


def header(num_layers: int, num_experts: int, top_k: int) -> TraceHeader:
    return TraceHeader(tuple(LayerInfo(f"layers.{i}", num_experts, top_k) for i in range(num_layers)))


def measure(sequences: Iterable[Ids], num_experts: int, lengths: tuple[int, ...], **options: int) -> Consistency:
    arrays = list(sequences)
    meter = ConsistencyMeter(header(arrays[0].shape[1], num_experts, arrays[0].shape[2]), lengths)
    for experts in arrays:
        meter.add(sequence(experts))
    return meter.result(**options)


def brute_srp(sequences: list[Ids], num_experts: int, length: int) -> tuple[float, float]:
    """SRP and its size ratio straight from the definition, window by window and threshold by threshold."""
    best = (-1.0, 0.0)
    for threshold in range(length + 1):
        matches = predicted = activated = 0
        for experts in sequences:
            for begin in range(len(experts) - length + 1):
                for layer in range(experts.shape[1]):
                    window = experts[begin : begin + length, layer]
                    counts = [int((window == expert).sum()) for expert in range(num_experts)]
                    chosen = {expert for expert, count in enumerate(counts) if count >= threshold}
                    predicted += length * len(chosen)
                    matches += sum(counts[expert] for expert in chosen)
                    activated += sum(counts)
        f1 = 2 * matches / max(1, predicted + activated)
        if f1 > best[0]:
            best = f1, predicted / max(1, activated)
    return best


def brute_segment_hits(experts: Ids, capacity: int, length: int) -> int:
    """One layer's hits in a cache of one capacity that is told the next tokens."""
    resident: list[int] = []  # the least recently used first
    hits, seen = 0, set()
    for token, row in enumerate(experts):
        picks = [int(expert) for expert in row if expert >= 0]
        for pick in picks:
            hits += pick in resident or (pick not in seen and len(seen) < capacity)
            seen.add(pick)
        for place, pick in enumerate(picks):
            if pick not in resident and len(resident) == capacity:
                ahead = [*picks[place:], *experts[token + 1 : token + length].ravel().tolist()]
                resident.remove(min(resident, key=lambda expert: (ahead.count(expert), resident.index(expert))))
            if pick in resident:
                resident.remove(pick)
            resident.append(pick)
    return hits


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[Ids], int]:
    """Some sequences of tokens that choose unlike experts, some with fewer picks than others."""
    num_experts = draw(st.integers(2, 7))
    top_k = draw(st.integers(1, min(3, num_experts)))
    num_layers = draw(st.integers(1, 2))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        rows = []
        for _ in range(draw(st.integers(1, 12))):
            layers = []
            for _ in range(num_layers):
                picks = draw(st.lists(st.integers(0, num_experts - 1), max_size=top_k, unique=True))
                layers.append(picks + [NO_EXPERT] * (top_k - len(picks)))
            rows.append(layers)
        found.append(np.array(rows, np.int32))
    return found, num_experts


@given(routings(), st.integers(1, 6))
def test_srp_is_what_its_definition_says(routing: tuple[list[Ids], int], length: int) -> None:
    sequences, num_experts = routing
    segments = measure(sequences, num_experts, (length,), resamples=2).segments
    if all(len(experts) < length for experts in sequences):
        assert segments == ()
        return
    value, size_ratio = brute_srp(sequences, num_experts, length)
    assert segments[0].srp.value == pytest.approx(value, abs=1e-12)
    assert segments[0].windows == sum(max(0, len(experts) - length + 1) for experts in sequences)
    if value > 0:
        assert segments[0].size_ratio == pytest.approx(size_ratio)
    for layer, found in enumerate(segments[0].layer_srp):
        alone = [experts[:, layer : layer + 1] for experts in sequences]
        assert found == pytest.approx(brute_srp(alone, num_experts, length)[0], abs=1e-12)


@given(routings(), st.integers(1, 6))
def test_segment_cache_hits_are_those_of_a_cache_of_each_size(routing: tuple[list[Ids], int], length: int) -> None:
    sequences, num_experts = routing
    segments = measure(sequences, num_experts, (length,), resamples=2).segments
    if not segments:
        return
    picks = sum(int((experts >= 0).sum()) for experts in sequences)
    for capacity in range(1, num_experts + 1):
        hits = sum(
            brute_segment_hits(experts[:, layer], capacity, length)
            for experts in sequences
            for layer in range(experts.shape[1])
        )
        assert segments[0].sch[capacity - 1].value == pytest.approx(hits / max(1, picks))
    if picks:
        assert segments[0].sch[-1].value == 1


def test_srp_by_hand() -> None:
    """Two tokens that share one of two experts: {shared} foretells 2 of 4 with 2 guesses, all three 4 of 4 with 6."""
    experts = np.array([[[0, 1]], [[0, 2]]])
    (segments,) = measure([experts], 4, (2,)).segments
    assert segments.srp.value == pytest.approx(2 * 4 / (6 + 4))
    assert segments.size_ratio == pytest.approx(6 / 4)
    assert measure([experts], 4, (2,)).reuse == 0.5


def test_the_same_experts_for_ever_are_perfectly_consistent() -> None:
    experts = np.tile(np.array([[[3, 1], [0, 2]]]), (40, 1, 1))
    found = measure([experts, experts], 4, (4, 16), resamples=50)
    for segments in found.segments:
        assert segments.srp.value == segments.srp.low == segments.srp.high == 1
        assert segments.size_ratio == 1
        assert segments.sch[1].value == 1
    assert found.reuse == 1


def test_padding_is_left_out() -> None:
    experts = np.array([[[0, 1]], [[2, 3]], [[0, 1]], [[0, 1]]], np.int32)
    phases = np.array([Phase.PREFILL, Phase.PADDING, Phase.DECODE, Phase.DECODE], np.uint8)
    meter = ConsistencyMeter(header(1, 4, 2), (2,))
    meter.add(sequence(experts, phases))
    found = meter.result()
    assert (found.num_tokens, found.decoded_tokens, found.activations) == (3, 2, 6)
    assert found.segments[0].srp.value == 1


def test_intervals_come_from_the_sequences_and_are_the_same_for_the_same_seed() -> None:
    rng = np.random.default_rng(5)
    sequences = [np.argsort(rng.random((30, 2, 12)), axis=2)[:, :, :3].astype(np.int32) for _ in range(20)]
    first = measure(sequences, 12, (4,), resamples=300, seed=1)
    assert first == measure(sequences, 12, (4,), resamples=300, seed=1)
    other = measure(sequences, 12, (4,), resamples=300, seed=2)
    estimate = first.segments[0].srp
    assert estimate.value == other.segments[0].srp.value
    assert (estimate.low, estimate.high) != (other.segments[0].srp.low, other.segments[0].srp.high)
    assert estimate.low is not None and estimate.high is not None
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low < 0.05

    alone = measure(sequences[:1], 12, (4,))
    assert alone.segments[0].srp.low is None, "one sequence says nothing about others"


def test_bootstrap_interval_is_the_basic_one_of_a_mean() -> None:
    """With windows of one token and one layer the hits at one slot are a mean; its interval has a closed form."""
    rng = np.random.default_rng(3)
    sequences = [np.full((10, 1, 1), 0) for _ in range(200)]
    for experts in sequences:
        experts[:, 0, 0] = rng.random() < 0.5  # all hits but none is new: a sequence begins with a fresh cache
        experts[5:, 0, 0] = rng.integers(0, 2)
    found = measure(sequences, 2, (1,), resamples=4000).segments[0].sch[0]
    rates = np.array([0.9 if row[0, 0, 0] != row[5, 0, 0] else 1.0 for row in sequences])
    assert found.value == pytest.approx(rates.mean())
    half = 1.96 * rates.std() / np.sqrt(len(rates))
    assert found.high == pytest.approx(min(1, rates.mean() + half), abs=half / 5)
    assert found.low == pytest.approx(rates.mean() - half, abs=half / 5)


def test_bootstrap_interval_is_reflected_at_the_value() -> None:
    """The basic interval of a skewed mean: one sequence in six always hits, the others only once in twenty."""
    always, hardly = np.zeros((20, 1, 1)), np.resize([0, 1], (20, 1, 1))
    found = measure([always, *[hardly] * 5], 2, (1,), resamples=4000).segments[0].sch[0]
    mean = (1 + 5 * 0.05) / 6
    # Among draws of six the 97.5 % quantile has three that hit always, the 2.5 % one has none.
    assert found.value == pytest.approx(mean)
    assert found.high == pytest.approx(2 * mean - 0.05)
    assert found.low == 0 == max(0, 2 * mean - (3 + 3 * 0.05) / 6)


def waste(path: Path) -> Ids:
    rows = [json.loads(line)["layers"] for line in path.read_text().splitlines() if line.strip()]
    return np.array(rows, np.int32)


def test_srp_of_olmoe_is_the_published_one() -> None:
    """Liang et al. (2025) give 50.9 % for windows of 16 tokens."""
    found = measure([waste(real_trace("waste", "trace_olmoe_299.jsonl"))], 64, (16,))
    print(f"OLMoE, m=16: SRP {100 * found.segments[0].srp.value:.2f}, published 50.9")
    assert 100 * found.segments[0].srp.value == pytest.approx(50.9, abs=1.5)
    assert 100 * (found.reuse or 0) == pytest.approx(43.5, abs=0.05)


def test_srp_of_deepseek_v2_lite_is_the_published_one() -> None:
    """Liang et al. (2025) give 37.9 %, of samples of 512 tokens; here those that are at least half as long."""
    sequences = []
    for name in ("intent", "law", "summary"):
        with np.load(real_trace("deepseek-v2-lite", f"deepseek_v2_lite_{name}.npz")) as arrays:
            sequences += [arrays[key] for key in sorted(arrays.files) if key.startswith("experts_")]
    long = [experts for experts in sequences if len(experts) >= 256]
    found, everything = (measure(some, 64, (16,), resamples=200).segments[0].srp for some in (long, sequences))
    print(
        f"DeepSeek-V2-Lite, m=16: SRP {100 * found.value:.2f} of {len(long)}, {100 * everything.value:.2f} of all, 37.9"
    )
    assert 100 * found.value == pytest.approx(37.9, abs=1.5)
    assert 100 * everything.value == pytest.approx(37.9, abs=2)
