"""Events out of traces, against the same thing done with Python's sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_support import header_of, random_traces, sequence_of, trace_of

from moert.errors import ConfigError, CorruptFileError
from moert.simulate import events as events_module
from moert.simulate.events import Events, Reading, first_ids, read_events
from moert.trace import Phase, Sequence, Trace

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

quick = settings(max_examples=60, deadline=None)


def listed(chunks: Iterator[Events], trace: Trace) -> list[tuple[int, int, bool, list[int]]]:
    """(step, layer, counted, experts) of every event."""
    bases = first_ids(trace.header.layers)
    found = []
    for chunk in chunks:
        for i, layer in enumerate(chunk.layer.tolist()):
            ids = chunk.ids[chunk.offsets[i] : chunk.offsets[i + 1]] - bases[layer]
            found.append((int(chunk.step[i]), layer, bool(chunk.counted[i]), ids.tolist()))
    return found


def expected(trace: Trace, *, everything: bool) -> list[tuple[int, int, bool, list[int]]]:
    needed: dict[tuple[int, int], set[int]] = {}
    counts: dict[int, bool] = {}
    for sequence in trace.sequences:
        for token, step in enumerate(sequence.steps.tolist()):
            counts[step] = counts.get(step, False) or everything or sequence.phases[token] == Phase.DECODE
            for layer in range(len(trace.header.layers)):
                chosen = {expert for expert in sequence.experts[token, layer].tolist() if expert >= 0}
                if chosen:
                    needed.setdefault((step, layer), set()).update(chosen)
    return [(step, layer, counts[step], sorted(needed[step, layer])) for step, layer in sorted(needed)]


@quick
@given(trace=random_traces(), everything=st.booleans())
def test_events_are_the_union_of_what_a_layers_tokens_chose(trace: Trace, everything: bool) -> None:
    reading = Reading("all" if everything else "decode")
    assert listed(read_events(trace, reading), trace) == expected(trace, everything=everything)


@quick
@given(trace=random_traces(), everything=st.booleans())
def test_tokens_and_picks(trace: Trace, everything: bool) -> None:
    chunks = list(read_events(trace, Reading("all" if everything else "decode")))
    phases = np.concatenate([sequence.phases for sequence in trace.sequences])
    assert sum(chunk.tokens for chunk in chunks) == np.sum(phases != 2 if everything else phases == Phase.DECODE)
    steps = np.concatenate([sequence.steps for sequence in trace.sequences])
    counted = {step for step, _, counts, _ in expected(trace, everything=everything) if counts}
    picks = np.concatenate([(sequence.experts >= 0).sum(axis=(1, 2)) for sequence in trace.sequences])
    assert sum(chunk.picks for chunk in chunks) == picks[np.isin(steps, sorted(counted))].sum()


@quick
@given(trace=random_traces(), batch=st.integers(1, 3), atomic=st.booleans())
def test_chunks_make_no_difference(trace: Trace, batch: int, atomic: bool) -> None:
    reading = Reading("decode", batch, atomic)
    whole = list(read_events(trace, reading))
    before = events_module.CHUNK_PICKS
    try:
        events_module.CHUNK_PICKS = 1
        parts = list(read_events(trace, reading))
    finally:
        events_module.CHUNK_PICKS = before
    assert len(whole) == 1
    assert listed(iter(parts), trace) == listed(iter(whole), trace)
    assert np.concatenate([part.sequence for part in parts]).tolist() == whole[0].sequence.tolist()
    assert sum(part.tokens for part in parts) == whole[0].tokens


def test_sequences_that_share_steps_are_one_batch() -> None:
    first = sequence_of([[[0]], [[1]], [[2]]], first_step=0)
    beside = sequence_of([[[3]], [[1]]], first_step=1)
    after = sequence_of([[[4]]], first_step=5)
    trace = Trace(header_of([6]), [first, beside, after])
    (events,) = read_events(trace, Reading())
    assert [experts for *_, experts in listed(iter([events]), trace)] == [[0], [1, 3], [1, 2], [4]]
    assert events.sequence.tolist() == [0, 0, 0, 1]
    assert list(events.spans()) == [(0, 3), (3, 4)]


def test_batch_interleaves_step_by_step() -> None:
    trace = trace_of([9], [[[0]], [[1]], [[2]]], [[[5]], [[1]]], [[[7]]])
    (events,) = read_events(trace, Reading(batch=2))
    assert [experts for *_, experts in listed(iter([events]), trace)] == [[0, 5], [1], [2], [7]]
    assert events.sequence.tolist() == [0, 0, 0, 1]
    assert events.step.tolist() == [0, 1, 2, 3]
    assert events.picks == 6
    assert events.tokens == 6


def test_sequential_events_are_the_picks_in_order() -> None:
    trace = trace_of([9, 9], [[[3, 1], [2]], [[3], [0, 8]]])
    (events,) = read_events(trace, Reading(atomic=False))
    assert [(layer, *experts) for _, layer, _, experts in listed(iter([events]), trace)] == [
        (0, 3),
        (0, 1),
        (1, 2),
        (0, 3),
        (1, 0),
        (1, 8),
    ]


def test_large_events_are_sorted_too() -> None:
    rng = np.random.default_rng(0)
    picks = [[rng.permutation(100)[:3].tolist()] for _ in range(40)]
    prompt = Trace(header_of([100]), [sequence_of([*picks, [[0]]], num_prompt=40)])
    (events,) = read_events(prompt, Reading("all"))
    first = events.ids[events.offsets[0] : events.offsets[1]].tolist()
    assert first == sorted({expert for token in picks for expert in token[0]})
    assert len(first) > 32


def test_scores_are_averaged_over_the_tokens_of_an_event() -> None:
    sequence = sequence_of([[[0]], [[1]], [[1]]], num_prompt=2, width=2)
    scores = np.array([[[0.5, 0.5]], [[0.0, 1.0]], [[0.25, 0.75]]], dtype=np.float32)
    sequence = Sequence(sequence.experts, sequence.steps, sequence.phases, scores=scores)
    (events,) = read_events(Trace(header_of([2], 2), [sequence]), Reading("all", scores=True))
    assert events.scores is not None
    assert events.scores.tolist() == [[0.25, 0.75], [0.25, 0.75]]


class Loose:
    """A trace that nobody has checked."""

    def __init__(self, trace: Trace, sequences: list[Sequence]) -> None:
        self.header, self._sequences = trace.header, sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": np.array([[[0]], [[4]]], np.int32)}, "expert 4 in layer 0, which has 4"),
        ({"experts": np.array([[[0]], [[-2]]], np.int32)}, "expert -2"),
        ({"experts": np.array([[[0], [1]], [[0], [1]]], np.int32)}, "1 layers"),
        ({"phases": np.ones(3, np.uint8)}, "3 phases"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    trace = trace_of([4], [[[0]], [[1]]])
    old = trace.sequences[0]
    bad = Sequence(**{"experts": old.experts, "steps": old.steps, "phases": old.phases, "name": "odd one", **change})
    with pytest.raises(CorruptFileError, match=words) as error:
        list(read_events(Loose(trace, [bad]), Reading()))
    assert "odd one" in str(error.value)


def test_sequences_out_of_order_are_refused() -> None:
    late, early = sequence_of([[[0]]], first_step=7), sequence_of([[[1]]], first_step=9)
    between = sequence_of([[[1]]], first_step=7)
    with pytest.raises(CorruptFileError, match=r"begins at step 7, but .* went on to step 7"):
        list(read_events(Loose(trace_of([4], [[[0]]]), [late, early, between]), Reading()))


def test_empty_sequences_are_passed_by() -> None:
    trace = trace_of([4], [[[0]]])
    empty = Sequence(np.zeros((0, 1, 3), np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8))
    (events,) = read_events(Loose(trace, [empty, *trace.sequences, empty]), Reading())
    assert len(events) == 1


@pytest.mark.parametrize("options", [{"count": "prefill"}, {"batch": 0}, {"batch": True}, {"batch": 1.5}])
def test_readings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Reading(**options)


def test_a_large_trace_is_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "CHUNK_PICKS", 1000)
    alive = most = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            if self.base is None or not isinstance(self.base, Counted):
                alive -= 1

    def sequences() -> Iterator[Sequence]:
        nonlocal alive, most
        for number in range(200):
            alive += 1
            most = max(most, alive)
            experts = np.full((50, 2, 1), number % 7, np.int32).view(Counted)
            steps = np.arange(50, dtype=np.int64) + 50 * number
            yield Sequence(experts, steps, np.ones(50, np.uint8))

    class Stream(Loose):
        def __iter__(self) -> Iterator[Sequence]:
            return sequences()

    stream = Stream(Trace(header_of([7, 7], 1), []), [])
    assert sum(len(chunk) for chunk in read_events(stream, Reading())) == 200 * 50 * 2
    assert most < 30
