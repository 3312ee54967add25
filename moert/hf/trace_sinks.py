"""Where recorded sequences go: into a trace in memory, or into its file as they end."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from moert.errors import ConfigError, MoertError
from moert.trace.recorder import widened
from moert.trace.sequence import NO_EXPERT, Sequence, TraceHeader
from moert.trace.trace import Trace
from moert.trace.writer import TraceWriter


class Sink(Protocol):
    """Where sequences go."""

    def add(self, sequence: Sequence, header: TraceHeader) -> None:
        """One that is over; `header` as it is so far."""

    def close(self, header: TraceHeader, trace: Trace) -> None:
        """All are over."""

    def discard(self) -> None:
        """Leave nothing behind, unless it has been closed."""


class MemorySink:
    """Keeps all of them, for the trace that is filled in at the end."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def add(self, sequence: Sequence, header: TraceHeader) -> None:
        self._sequences.append(sequence)

    def close(self, header: TraceHeader, trace: Trace) -> None:
        object.__setattr__(trace, "header", header)
        for sequence in sorted(self._sequences, key=lambda sequence: int(sequence.steps[0])):
            weights = sequence.weights
            trace.sequences.append(
                replace(
                    sequence,
                    experts=widened(sequence.experts, header.top_k, NO_EXPERT),
                    weights=None if weights is None else widened(weights, header.top_k, 0),
                )
            )

    def discard(self) -> None:
        self._sequences = []


class FileSink:
    """Hands each to the file's writer when it is over; the trace gets the header only."""

    def __init__(self, path: str | os.PathLike[str], *, exact: bool) -> None:
        """`exact` is that of `TraceWriter`.

        Raises:
            ConfigError: nothing can be written to `path`.
        """
        self._path = path
        self._exact = exact
        self._writer: TraceWriter | None = None
        writable = Path(path).absolute()
        if writable.is_dir() or not writable.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: give the name of a file in a folder that exists")

    def _open(self, header: TraceHeader) -> TraceWriter:
        if self._writer is None:
            self._writer = TraceWriter(self._path, header, exact=self._exact)
        return self._writer

    def add(self, sequence: Sequence, header: TraceHeader) -> None:
        writer = self._open(header)
        if writer.header.layers != header.layers:
            raise MoertError("the model's experts were called with more picks a token than at first; record in memory")
        writer.add(sequence)

    def close(self, header: TraceHeader, trace: Trace) -> None:
        writer = self._open(header)
        writer.header = replace(header, layers=writer.header.layers)
        writer.close()
        object.__setattr__(trace, "header", writer.header)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()
