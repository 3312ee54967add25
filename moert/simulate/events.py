"""A trace as a stream of events: what each layer's step needs, as compact arrays, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError, CorruptFileError
from moert.machine_code import compiled
from moert.trace.sequence import LayerInfo, Phase, TraceHeader
from moert.trace.sequence import Sequence as TraceSequence

Count = Literal["decode", "all"]
Ints = npt.NDArray[np.int64]

CHUNK_PICKS = 1 << 22
"""Sequences are gathered until they have so many picks; one with more is a chunk of its own."""


class TraceLike(Protocol):
    """What is read of a trace: `moert.trace.file` has both kinds."""

    @property
    def header(self) -> TraceHeader: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[TraceSequence]: ...


TraceSource = str | Path | TraceLike


@dataclass(frozen=True)
class Events:
    """N events of whole sequences, in the order in which they ran; event i needs `ids[offsets[i]:offsets[i + 1]]`."""

    layer: npt.NDArray[np.int32]
    """[N]"""
    step: Ints
    """[N] the trace's own number of the forward pass, or where sequences were interleaved a new one."""
    counted: npt.NDArray[np.bool_]
    """[N] whether its hits and misses count."""
    sequence: npt.NDArray[np.int32]
    """[N] ascending: the number of the sequence, or batch of sequences that ran together, over the whole trace."""
    offsets: Ints
    """[N + 1]"""
    ids: npt.NDArray[np.int32]
    """Experts, ascending and each once within an event; `first_ids` tells the layers' ones apart."""
    tokens: int
    """Tokens that are counted, without padding."""
    picks: int
    """Picks of the counted events' tokens, before those for the same expert are merged."""
    scores: npt.NDArray[np.float64] | None = None
    """[N, E] router probabilities, averaged over the event's tokens, if asked for and known."""

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def sizes(self) -> Ints:
        """[N] experts of each event."""
        return np.diff(self.offsets)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Begin and end of each sequence's events."""
        if len(self):
            edges = [0, *(np.flatnonzero(np.diff(self.sequence)) + 1).tolist(), len(self)]
            yield from pairwise(edges)

    def part(self, begin: int, end: int) -> Events:
        """Some of the events, as views; `tokens` and `picks` stay those of all."""
        first, last = self.offsets[begin], self.offsets[end]
        return Events(
            self.layer[begin:end],
            self.step[begin:end],
            self.counted[begin:end],
            self.sequence[begin:end],
            self.offsets[begin : end + 1] - first,
            self.ids[first:last],
            self.tokens,
            self.picks,
            None if self.scores is None else self.scores[begin:end],
        )


@dataclass(frozen=True)
class Reading:
    """How a trace becomes events."""

    count: Count = "decode"
    """Which steps count: those with a generated token, or all. The others only warm the caches."""
    batch: int = 1
    """So many sequences run together, the first steps of all, then the second ones, until the longest ends."""
    atomic: bool = True
    """False: each pick is an event of its own, by step, layer, token and rank, for simulators of single accesses."""
    scores: bool = False
    """Whether to work out `Events.scores`."""

    def __post_init__(self) -> None:
        if self.count not in ("decode", "all"):
            raise ConfigError(f'count={self.count!r} must be "decode" or "all"')
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch={self.batch!r} must be a whole number of sequences, at least 1")


def open_trace(source: TraceSource) -> AbstractContextManager[TraceLike]:
    """The trace itself, or that of the file at a path, which is closed at the end.

    Raises:
        ConfigError, CorruptFileError, TransferError: the file is no trace, a damaged one, or cannot be read.
    """
    if isinstance(source, (str, Path)):
        from moert.trace.file import TraceFile

        return TraceFile(source)
    return nullcontext(source)


def first_ids(layers: Sequence[LayerInfo]) -> Ints:
    """[L + 1] where each layer's experts begin among all of the trace's, and how many there are."""
    return np.concatenate([[0], np.cumsum([layer.num_experts for layer in layers])]).astype(np.int64)


def read_events(trace: TraceLike, reading: Reading) -> Iterator[Events]:
    """The events of `trace`, in chunks of whole sequences of about `CHUNK_PICKS` picks.

    No more than a chunk's sequences, or one sequence (one batch of sequences that ran together), is in memory at once.
    Two sequences ran together if the steps of one begin before those of the other have ended.

    Raises:
        CorruptFileError: an id that its layer does not have, arrays that do not fit the header, or sequences that are
            not in the order of their first steps.
    """
    picks_per_token = len(trace.header.layers) * trace.header.top_k
    groups = _interleaved(_groups(trace), reading.batch)
    waiting: list[_Group] = []
    n_picks = number = 0
    next_step = 0
    for group in groups:
        waiting.append(group)
        n_picks += len(group.steps) * picks_per_token
        if n_picks >= CHUNK_PICKS:
            events, next_step = _build(trace.header, waiting, reading, number, next_step)
            yield events
            number += len(waiting)
            waiting, n_picks = [], 0
    if waiting:
        yield _build(trace.header, waiting, reading, number, next_step)[0]


@dataclass
class _Group:
    """Tokens that share steps, by ascending step."""

    name: str
    experts: npt.NDArray[Any]
    steps: Ints
    phases: npt.NDArray[np.uint8]
    scores: npt.NDArray[np.float32] | None
    own_steps: bool = True


def _groups(trace: TraceLike) -> Iterator[_Group]:
    layers = trace.header.layers
    open_: list[TraceSequence] = []
    last = ended = -1
    for number, sequence in enumerate(trace):
        n_tokens = len(sequence.steps)
        name = sequence.name or f"sequence {number}"
        shape = sequence.experts.shape
        if len(shape) != 3 or shape[:2] != (n_tokens, len(layers)) or len(sequence.phases) != n_tokens:
            raise CorruptFileError(
                f"{name}: experts of shape {shape}, {n_tokens} steps and {len(sequence.phases)} phases do not fit "
                f"together, or not the {len(layers)} layers of the trace"
            )
        if n_tokens == 0:
            continue
        first = int(sequence.steps.min())
        if first <= ended:
            raise CorruptFileError(
                f"{name} begins at step {first}, but the sequences before it went on to step {ended} and others came "
                "between; store sequences in the order of their first steps"
            )
        if open_ and first > last:
            yield _merged(open_)
            ended, open_ = last, []
        open_.append(sequence)
        last = max(last, int(sequence.steps.max()))
    if open_:
        yield _merged(open_)


def _merged(sequences: Sequence[TraceSequence]) -> _Group:
    steps = np.concatenate([np.asarray(one.steps, dtype=np.int64) for one in sequences])
    order: Any = slice(None) if np.all(steps[1:] >= steps[:-1]) else np.argsort(steps, kind="stable")
    all_scores = [one.scores for one in sequences if one.scores is not None]
    width = max(one.experts.shape[2] for one in sequences)
    return _Group(
        ", ".join(one.name for one in sequences if one.name) or "a sequence",
        np.concatenate([_wide(one.experts, width) for one in sequences])[order],
        steps[order],
        np.concatenate([np.asarray(one.phases, dtype=np.uint8) for one in sequences])[order],
        np.concatenate(all_scores)[order] if len(all_scores) == len(sequences) else None,
    )


def _wide(experts: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    missing = width - experts.shape[2]
    return np.pad(experts, ((0, 0), (0, 0), (0, missing)), constant_values=-1) if missing else experts


def _interleaved(groups: Iterator[_Group], batch: int) -> Iterator[_Group]:
    if batch == 1:
        yield from groups
        return
    while some := list(islice(groups, batch)):
        steps = np.concatenate([np.unique(group.steps, return_inverse=True)[1] for group in some])
        order = np.argsort(steps, kind="stable")
        scores = [group.scores for group in some if group.scores is not None]
        width = max(group.experts.shape[2] for group in some)
        yield _Group(
            some[0].name,
            np.concatenate([_wide(group.experts, width) for group in some])[order],
            steps[order],
            np.concatenate([group.phases for group in some])[order],
            np.concatenate(scores)[order] if len(scores) == len(some) else None,
            own_steps=False,
        )


def _build(
    header: TraceHeader, groups: Iterable[_Group], reading: Reading, number: int, next_step: int
) -> tuple[Events, int]:
    bases = first_ids(header.layers)
    parts = []
    for place, group in enumerate(groups):
        if not group.own_steps:
            group.steps = group.steps + next_step
            next_step = int(group.steps[-1]) + 1
        parts.append(_events_of(group, bases, reading, number + place))
    if len(parts) == 1:
        return parts[0], next_step
    shifts = np.cumsum([0, *(len(part.ids) for part in parts)])
    whole = Events(
        np.concatenate([part.layer for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.counted for part in parts]),
        np.concatenate([part.sequence for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=False))]),
        np.concatenate([part.ids for part in parts]),
        sum(part.tokens for part in parts),
        sum(part.picks for part in parts),
        _stacked([part.scores for part in parts]),
    )
    return whole, next_step


def _stacked(scores: list[npt.NDArray[np.float64] | None]) -> npt.NDArray[np.float64] | None:
    known = [one for one in scores if one is not None]
    return np.concatenate(known) if known and len(known) == len(scores) else None


def _events_of(group: _Group, bases: Ints, reading: Reading, number: int) -> Events:
    experts = np.ascontiguousarray(group.experts, dtype=np.int32)
    begins = np.flatnonzero(np.concatenate([[True], group.steps[1:] != group.steps[:-1]]))
    is_decode = group.phases == Phase.DECODE
    counts = np.ones(len(begins), dtype=bool) if reading.count == "all" else np.logical_or.reduceat(is_decode, begins)
    ends = np.append(begins[1:], len(group.steps))
    layer, step, offsets, ids, picks, bad = _gather(experts, begins, ends, counts, bases, reading.atomic)
    if bad[0] >= 0:
        token, at, rank = bad
        raise CorruptFileError(
            f"{group.name}: token {token} has expert {experts[token, at, rank]} in layer {at}, which has "
            f"{bases[at + 1] - bases[at]}"
        )
    tokens = np.count_nonzero(group.phases != Phase.PADDING if reading.count == "all" else is_decode)
    scores = None
    if reading.scores and group.scores is not None and reading.atomic:
        means = np.add.reduceat(group.scores.astype(np.float64), begins) / (ends - begins)[:, None, None]
        scores = means[step, layer]
    return Events(
        layer,
        group.steps[begins][step],
        counts[step],
        np.full(len(layer), number, dtype=np.int32),
        offsets,
        ids,
        int(tokens),
        int(picks),
        scores,
    )


@compiled
def _gather(experts, begins, ends, counts, bases, atomic):  # type: ignore[no-untyped-def]
    """The events of all steps: distinct ids, ascending. `bad` is the place of an id that its layer does not have."""
    n_layers, n_picks = experts.shape[1], experts.size
    most = n_picks if not atomic else len(begins) * n_layers
    layers = np.empty(most, np.int32)
    steps = np.empty(most, np.int64)
    offsets = np.zeros(most + 1, np.int64)
    ids = np.empty(n_picks, np.int32)
    bad = np.full(3, -1, np.int64)
    seen = np.full(bases[-1], -1, np.int64)
    n_events = 0
    end = 0
    picks = 0
    for step in range(len(begins)):
        for layer in range(n_layers):
            begin = end
            base, n_experts = bases[layer], bases[layer + 1] - bases[layer]
            for token in range(begins[step], ends[step]):
                for rank in range(experts.shape[2]):
                    expert = experts[token, layer, rank]
                    if expert < 0 or expert >= n_experts:
                        if expert == -1:
                            continue
                        bad[0], bad[1], bad[2] = token, layer, rank
                        return layers, steps, offsets, ids, picks, bad
                    if counts[step]:
                        picks += 1
                    if atomic:
                        if seen[base + expert] == step:
                            continue
                        seen[base + expert] = step
                    else:
                        layers[n_events] = layer
                        steps[n_events] = step
                        n_events += 1
                        offsets[n_events] = end + 1
                    ids[end] = base + expert
                    end += 1
            if not atomic or end == begin:
                continue
            if end - begin <= 32:
                for i in range(begin + 1, end):
                    value, j = ids[i], i
                    while j > begin and ids[j - 1] > value:
                        ids[j] = ids[j - 1]
                        j -= 1
                    ids[j] = value
            else:
                at = begin
                for i in range(base, base + n_experts):
                    if seen[i] == step:
                        ids[at] = i
                        at += 1
            layers[n_events] = layer
            steps[n_events] = step
            n_events += 1
            offsets[n_events] = end
    return (
        layers[:n_events].copy(),
        steps[:n_events].copy(),
        offsets[: n_events + 1].copy(),
        ids[:end].copy(),
        picks,
        bad,
    )
