"""What predictors are trained on: the sequences of one or several traces, split into three parts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from moert.errors import ConfigError, CorruptFileError
from moert.trace.sequence import NO_EXPERT, Phase, Sequence, TraceHeader
from moert.trace.trace import TraceLike
from moert.training.hidden import HiddenFile

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shares:
    """Which part of the sequences is kept from training: to stop early by, and to be judged by."""

    validation: float = 0.1
    """Of those that are not tested with."""
    test: float = 0.2
    """Of all."""
    in_order: bool = False
    """Whether the first ones are trained on and the last ones tested on, cut by tokens; else chance decides, by a seed.
    With half of them for the test, it is made on what `moert predict` tests on."""

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(f"the share for {name}, {value}, must be between 0 and 1")


@dataclass(frozen=True)
class Source:
    """One trace, what it is called in messages, and the hidden states recorded beside it."""

    trace: TraceLike
    name: str
    hidden: HiddenFile | None = None


class Example(NamedTuple):
    """One sequence without its padding: T tokens through L layers."""

    experts: npt.NDArray[np.int32]
    """[T, L, K] of `NO_EXPERT` and ids."""
    token_ids: npt.NDArray[np.int64] | None
    """[T]"""
    n_prompt: int
    """Tokens of the prompt at its beginning; T where all of the text was given."""
    hidden: npt.NDArray[np.float16] | None = None
    """[T, L, D] what the layers' blocks were given, each token scaled to a mean square of 1."""


class Examples:
    """Some of the sequences, read one at a time whenever they are gone through."""

    def __init__(self, sources: list[Source], chosen: list[tuple[int, int]], n_tokens: int) -> None:
        self.sources = sources
        self.chosen = chosen
        """Source and place in it, of each sequence."""
        self.n_tokens = n_tokens
        """Without padding."""

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Example]:
        return (self.read(place) for place in range(len(self.chosen)))

    def read(self, place: int) -> Example:
        """One of them, with the hidden states if there are any. Blocks.

        Raises:
            CorruptFileError: the hidden states are those of other tokens.
            MoertError: what reading it raises.
        """
        return self._read(*self.chosen[place], with_hidden=True)

    def without_hidden(self) -> Iterator[Example]:
        """All of them, without the hidden states."""
        return (self._read(*one, with_hidden=False) for one in self.chosen)

    def shuffled(self, rng: random.Random) -> Iterator[Example]:
        """All of them in an order of its own."""
        order = list(range(len(self.chosen)))
        rng.shuffle(order)
        return (self.read(place) for place in order)

    def _read(self, source: int, index: int, *, with_hidden: bool) -> Example:
        found = self.sources[source]
        sequence = found.trace[index]
        real = sequence.phases != Phase.PADDING
        hidden = None
        if with_hidden and found.hidden is not None:
            hidden = found.hidden.read(index)
            if hidden.shape[:2] != sequence.experts.shape[:2]:
                raise CorruptFileError(
                    f"{found.hidden.path}: sequence {index} has {hidden.shape[0]} tokens and {hidden.shape[1]} layers, "
                    f"in {found.name} it has {sequence.experts.shape[0]} and {sequence.experts.shape[1]}"
                )
            hidden = hidden[real]
        phases = sequence.phases[real]
        decoded = phases != Phase.PREFILL
        return Example(
            sequence.experts[real],
            None if sequence.token_ids is None else sequence.token_ids[real],
            int(decoded.argmax()) if decoded.any() else len(phases),
            hidden,
        )


class TrainingSet:
    """The sequences of traces of one model, and a split of them that a seed decides."""

    def __init__(self, sources: list[Source]) -> None:
        """Reads each sequence once; blocks.

        Raises:
            ConfigError: traces of different models, no trace at all, or hidden states of another trace.
            MoertError: what reading the traces raises.
        """
        if not sources:
            raise ConfigError("there is no trace to train on")
        self.sources = sources
        self.header = _one_model(sources)
        self._groups: dict[str, list[tuple[int, int]]] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self.without_ids: list[tuple[str, int]] = []
        """Trace and number of sequences in it that have no token ids."""
        hashes = xxhash.xxh3_128()
        for place, source in enumerate(sources):
            missing = 0
            own = xxhash.xxh3_128()
            for index, sequence in enumerate(source.trace):
                digest = content_hash(sequence)
                own.update(digest.encode())
                real = int((sequence.phases != Phase.PADDING).sum())
                missing += sequence.token_ids is None
                if real:
                    self._groups.setdefault(digest, []).append((place, index))
                    self._tokens[place, index] = real
            if missing:
                self.without_ids.append((source.name, missing))
            if source.hidden is not None:
                source.hidden.check(own.hexdigest(), source.name)
            hashes.update(own.hexdigest().encode())
        self.trace_hash = hashes.hexdigest()
        """Of the routing and the token ids of all sequences."""

    @property
    def n_sequences(self) -> int:
        """With at least one token that is no padding."""
        return len(self._tokens)

    @property
    def n_tokens(self) -> int:
        """Without padding."""
        return sum(self._tokens.values())

    def split(self, shares: Shares, seed: int) -> tuple[Examples, Examples, Examples]:
        """Sequences to train on, to stop by and to test on. Those that are equal in all tokens stay together.

        Raises:
            ConfigError: too few sequences for three parts.
        """
        groups = list(self._groups.values())
        if len(groups) < 3:
            names = ", ".join(source.name for source in self.sources)
            raise ConfigError(
                f"{names}: too short to train on: {_count(len(groups), 'different sequence')} of {self.n_tokens:,} "
                "tokens in all; it takes 3 sequences, to train on, to stop by and to test on: record more prompts"
            )
        if shares.in_order:
            ends = list(accumulate(sum(self._tokens[one] for one in group) for group in groups))
            n_test = sum(end >= (1 - shares.test) * ends[-1] for end in ends[:-1])
            groups.reverse()
        else:
            random.Random(seed).shuffle(groups)
            n_test = round(shares.test * len(groups))
        n_test = min(max(1, n_test), len(groups) - 2)
        n_validation = min(max(1, round(shares.validation * (len(groups) - n_test))), len(groups) - n_test - 1)
        test, rest = groups[:n_test], groups[n_test:]
        return self._examples(rest[n_validation:]), self._examples(rest[:n_validation]), self._examples(test)

    def _examples(self, groups: list[list[tuple[int, int]]]) -> Examples:
        chosen = [one for group in groups for one in group]
        return Examples(self.sources, chosen, sum(self._tokens[one] for one in chosen))


def content_hash(sequence: Sequence) -> str:
    """Of a sequence's routing, token ids and phases."""
    state = xxhash.xxh3_128(sequence.experts.astype("<i4").tobytes())
    state.update(sequence.phases.tobytes())
    if sequence.token_ids is not None:
        state.update(sequence.token_ids.astype("<i8").tobytes())
    return state.hexdigest()


def trace_hash(trace: TraceLike) -> str:
    """What `TrainingSet` calls a single trace. Reads all of it; blocks."""
    state = xxhash.xxh3_128()
    for sequence in trace:
        state.update(content_hash(sequence).encode())
    return state.hexdigest()


def targets(experts: npt.NDArray[np.int32], num_experts: int) -> Bools:
    """[T, L, K] ids -> [T, L, E]: whether the token chose the expert."""
    chosen = np.zeros((*experts.shape[:2], num_experts + 1), dtype=np.bool_)
    np.put_along_axis(chosen, np.where(experts == NO_EXPERT, num_experts, experts), True, axis=2)
    return chosen[..., :num_experts]


def ran(chosen: Bools) -> Bools:
    """[T, L, E] what was chosen -> [T, L]: whether the layer ran for the token."""
    return np.logical_or.reduce(chosen, axis=2)


def _one_model(sources: list[Source]) -> TraceHeader:
    first = sources[0]
    for source in sources[1:]:
        a, b = first.trace.header, source.trace.header
        shapes = [[(layer.num_experts, layer.top_k) for layer in header.layers] for header in (a, b)]
        hashes = a.config_hash and b.config_hash and a.config_hash != b.config_hash
        names = not (a.config_hash and b.config_hash) and a.model and b.model and a.model != b.model
        if hashes or names or [n for n, _ in shapes[0]] != [n for n, _ in shapes[1]]:
            raise ConfigError(
                f"{first.name} and {source.name} are traces of different models: {_describe(a)}, and {_describe(b)}; "
                "train a predictor for each"
            )
    return first.trace.header


def _describe(header: TraceHeader) -> str:
    counts = sorted({layer.num_experts for layer in header.layers})
    return (
        f"{header.model or 'an unnamed one'} (configuration {header.config_hash or 'unknown'}, {len(header.layers)} "
        f"layers of {' or '.join(map(str, counts))} experts)"
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
