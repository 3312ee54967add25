"""Reading trace files, one sequence at a time."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.trace.check import MAX_STEP, find_problem
from moert.trace.index import ABSENT, Index, Source
from moert.trace.layout import OPTIONAL_KINDS, STORED, dtypes_of, from_spans, row_shape
from moert.trace.sequence import NO_EXPERT, Phase, Sequence, TraceHeader


@dataclass(frozen=True)
class SequenceSummary:
    """What is known of a sequence without reading its experts."""

    name: str
    n_tokens: int
    tokens_by_phase: dict[Phase, int]
    step_ranges: tuple[tuple[int, int], ...]
    """First and last number of each run of steps in which one of its tokens ran; ascending, apart from one another."""
    has_weights: bool
    has_scores: bool
    has_token_ids: bool


class TraceFile:
    """A trace on disk; close it, or use it in a `with` statement. Threads may share it.

    Only the safetensors header is read at first; it is some 200 bytes a sequence, and half of that stays in memory.
    Each access reads and checks one sequence and returns arrays that are the caller's. Pickled, it is opened anew.

    Raises:
        CorruptFileError: the file is malformed; the tensor is named.
        ConfigError: it is of a newer version, or no trace at all.
        TransferError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._source = Source(self.path)
        try:
            self._index = Index(self._source)
        except BaseException:
            self.close()
            raise

    @property
    def header(self) -> TraceHeader:
        """What is true of the whole trace."""
        return self._index.header

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._source.nbytes

    @property
    def n_tokens(self) -> int:
        """Of all sequences together."""
        return int(self._index.columns["experts"].rows.sum())

    def __len__(self) -> int:
        return len(self._index.columns["experts"].rows)

    def __iter__(self) -> Iterator[Sequence]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sequence:
        """Read a sequence. Blocks.

        Raises:
            CorruptFileError: its tensors contradict the header, or the file has become shorter.
            TransferError: the disk failed.
        """
        index = self._place(index)
        phases, steps = from_spans(self._spans(index))
        stored = self._read("experts", index)
        assert stored is not None
        experts = stored.astype(np.int32)
        experts[stored == np.iinfo(stored.dtype).max] = NO_EXPERT
        token_ids, weights, scores = (self._read(kind, index) for kind in OPTIONAL_KINDS)
        sequence = Sequence(
            experts=experts,
            steps=steps,
            phases=phases,
            weights=None if weights is None else weights.astype(np.float32),
            scores=None if scores is None else scores.astype(np.float32),
            token_ids=None if token_ids is None else token_ids.astype(np.int64),
            name=self._name(index),
        )
        problem = find_problem(sequence, self.header)
        if problem is not None:
            kind = "spans" if problem.array in ("steps", "phases") else problem.array
            raise self._source.corrupt(f"tensor '{kind}.{index}': {problem.text}")
        return sequence

    def summary(self, index: int) -> SequenceSummary:
        """What a sequence is, read from some dozen bytes. Blocks; raises what reading it would."""
        index = self._place(index)
        phase, first, stride, count = self._spans(index).T
        has = {kind: bool(self._index.columns[kind].begin[index] != ABSENT) for kind in OPTIONAL_KINDS}
        return SequenceSummary(
            name=self._name(index),
            n_tokens=int(count.sum()),
            tokens_by_phase={known: int(count[phase == known].sum()) for known in Phase},
            step_ranges=merge_ranges(zip(first.tolist(), (first + stride * (count - 1)).tolist(), strict=True)),
            has_weights=has["weights"],
            has_scores=has["scores"],
            has_token_ids=has["token_ids"],
        )

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._source.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:
            # Never opened, or the interpreter is going and has taken what closing needs: the system closes it then.
            return

    def __reduce__(self) -> tuple[type[TraceFile], tuple[Path]]:
        return TraceFile, (self.path,)

    def _place(self, index: int) -> int:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: there is no sequence {index}, there are {len(self)}")
        return index % len(self)

    def _name(self, index: int) -> str:
        return self._index.names[index] if self._index.names is not None else ""

    def _spans(self, index: int) -> npt.NDArray[np.int64]:
        stored = self._read("spans", index)
        assert stored is not None
        spans = stored.astype(np.int64)
        phase, first, stride, count = spans.T
        tokens = int(self._index.columns["experts"].rows[index])
        wrong = (phase < 0) | (phase > max(Phase)) | (stride < 0) | (stride > 1) | (count < 1) | (count > tokens)
        wrong |= (first < 0) | (first >= MAX_STEP)
        if wrong.any():
            row = int(wrong.argmax())
            raise self._source.corrupt(f"tensor 'spans.{index}': row {row} is {spans[row].tolist()}, which is no span")
        total = sum(count.tolist())
        if total != tokens:
            raise self._source.corrupt(f"tensor 'spans.{index}' is about {total} tokens, there are {tokens}")
        return spans

    def _read(self, kind: str, index: int) -> npt.NDArray[Any] | None:
        column = self._index.columns[kind]
        begin = int(column.begin[index])
        if begin == ABSENT:
            return None
        dtype = STORED[dtypes_of(kind, self.header)[int(column.wide[index])]]
        shape = (int(column.rows[index]), *row_shape(kind, self.header))
        data = self._source.read(dtype.itemsize * int(np.prod(shape, dtype=np.int64)), begin)
        return np.frombuffer(data, dtype=dtype).reshape(shape)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges of whole numbers, first and last, without those that touch or overlap; ascending."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)
