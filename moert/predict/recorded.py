"""What predictors are shown: sequences of a trace, or of a model that ran, with what its layers were given."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from moert.errors import ConfigError
from moert.predictors.base import Model, Need
from moert.trace import Sequence, TraceHeader, TraceLike


@dataclass(frozen=True)
class Recorded:
    """One sequence of T tokens. The arrays and tensors are the caller's and are not written to."""

    sequence: Sequence
    hidden: Seq[Any | None] | None = None
    """Of each layer, the tensor [T, D] on the CPU that its experts were given; None: unknown."""
    residual: Seq[Any | None] | None = None
    """Of each layer, the tensor [T, D] on the CPU that its block was given; None: unknown."""


class Sequences(Protocol):
    """Sequences in order; a file reads each when it is asked for."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Recorded:
        """One of them."""
        ...

    def __iter__(self) -> Iterator[Recorded]:
        """One after another."""
        ...


class _Of:
    """Some sequences of a trace."""

    def __init__(self, trace: TraceLike, first: int, last: int) -> None:
        self._trace, self._range = trace, range(first, last)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Recorded:
        return Recorded(self._trace[self._range[operator.index(index)]])

    def __iter__(self) -> Iterator[Recorded]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Recording:
    """All that is known of one trace, or of one run of a model."""

    name: str
    model: Model
    sequences: Sequences
    at_hand: frozenset[Need]
    """What a predictor can be told of every sequence."""

    @classmethod
    def of_trace(cls, trace: TraceLike, name: str) -> Recording:
        """A trace, which stays open as long as it is used. Token ids are at hand where its first sequence has them."""
        has_ids = len(trace) > 0 and trace[0].token_ids is not None
        at_hand = {Need.FUTURE, Need.TOKEN_IDS} if has_ids else {Need.FUTURE}
        return cls(name, model_of(trace.header), _Of(trace, 0, len(trace)), frozenset(at_hand))


def model_of(header: TraceHeader) -> Model:
    """What a predictor is told of the model that a trace was recorded from."""
    return Model(
        num_experts=tuple(layer.num_experts for layer in header.layers),
        top_k=tuple(layer.top_k for layer in header.layers),
        name=header.model,
        config_hash=header.config_hash,
    )


def halves(recording: Recording) -> tuple[list[int], list[int]]:
    """The sequences (by index) to train on and those to test on: in order, cut where half of the tokens are over.

    Raises:
        ConfigError: there is one sequence only: two halves of one text would know each other.
    """
    lengths = [len(one.sequence.steps) for one in recording.sequences]
    if len(lengths) < 2:
        raise ConfigError(
            f"{recording.name} has {len(lengths)} sequence ({sum(lengths)} tokens), and to train on some and test on "
            "others takes 2; record more, or test without training (--train nothing)"
        )
    ends = list(accumulate(lengths))
    cut = next(index for index, end in enumerate(ends) if 2 * end >= ends[-1]) + 1
    cut = min(cut, len(lengths) - 1)
    return list(range(cut)), list(range(cut, len(lengths)))


def same_model(one: Recording, other: Recording) -> bool:
    """Whether what was learned from one recording can be used on the other."""
    return (one.model.num_experts, one.model.top_k) == (other.model.num_experts, other.model.top_k)
