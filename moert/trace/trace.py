"""A trace as whoever replays it sees it, and one that is held in memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from moert.trace.check import validate, validate_header
from moert.trace.sequence import Sequence, TraceHeader


class TraceLike(Protocol):
    """A header and sequences in order: `Trace` in memory, `TraceFile` on disk. Both hold valid sequences only."""

    @property
    def header(self) -> TraceHeader:
        """What is true of the whole trace."""
        ...

    @property
    def n_tokens(self) -> int:
        """Of all sequences together."""
        ...

    def __len__(self) -> int:
        """How many sequences there are."""
        ...

    def __getitem__(self, index: int) -> Sequence:
        """One sequence; a file reads it now, and only it."""
        ...

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences one after another."""
        ...


@dataclass(frozen=True)
class Trace:
    """A trace in memory. The list and the arrays in it are the caller's.

    Raises:
        ConfigError: the header or a sequence is not valid; see `moert.trace.validate`.
    """

    header: TraceHeader
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        validate_header(self.header)
        for sequence in self.sequences:
            validate(sequence, self.header)

    @property
    def n_tokens(self) -> int:
        """Of all sequences together."""
        return sum(len(sequence.steps) for sequence in self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self.sequences[operator.index(index)]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)
