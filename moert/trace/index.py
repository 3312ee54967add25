"""Where the tensors of a trace file are: its header, read and checked."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError, CorruptFileError, TransferError
from moert.trace.check import find_header_problem
from moert.trace.layout import (
    HEADER_KEY,
    KINDS,
    MAX_HEADER_BYTES,
    OPTIONAL_KINDS,
    STORED,
    VERSION,
    VERSION_KEY,
    decode_header,
    dtypes_of,
    row_shape,
)
from moert.trace.sequence import TraceHeader

ABSENT = -1
"""Stands for the begin of a tensor that a sequence does not have."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,14}", re.ASCII)


class Source:
    """The bytes of an open file, and how to complain about them. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(error.errno, f"{error.strerror}; cannot read the trace", str(path)) from error
        self.nbytes = os.fstat(self._fd).st_size

    def corrupt(self, text: str) -> CorruptFileError:
        """The error for what is wrong with the file."""
        return CorruptFileError(f"{self.path}: {text}")

    def read(self, nbytes: int, offset: int) -> bytearray:
        """Exactly these bytes. Blocks.

        Raises:
            CorruptFileError: the file has become shorter.
            TransferError: the disk failed.
        """
        data = bytearray(nbytes)
        view, done = memoryview(data), 0
        while done < nbytes:
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise TransferError(error.errno, f"{error.strerror}; cannot read", str(self.path)) from error
            if count == 0:
                raise self.corrupt(f"it ends at byte {offset + done}, it had {self.nbytes}: it was cut while in use")
            done += count
        return data

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class Column:
    """Where the tensors of one kind are, by sequence."""

    def __init__(self, num_sequences: int) -> None:
        self.begin = np.full(num_sequences, ABSENT, dtype=np.int64)
        """Byte of the file."""
        self.rows = np.zeros(num_sequences, dtype=np.int64)
        self.wide = np.zeros(num_sequences, dtype=np.bool_)
        """Whether of the second of the types that the kind may have."""


class Index:
    """What the header of a file says, in some 100 bytes a sequence.

    Raises:
        CorruptFileError: the header is malformed, or contradicts itself or the file's size; the tensor is named.
        ConfigError: the file is of a newer version, or no trace at all.
        TransferError: the disk failed.
    """

    header: TraceHeader
    names: list[str] | None
    columns: dict[str, Column]

    def __init__(self, source: Source) -> None:
        self._source = source
        if source.nbytes < 8:
            raise source.corrupt(f"{source.nbytes} bytes are too few for a safetensors file")
        header_bytes = int.from_bytes(source.read(8, 0), "little")
        if not 2 <= header_bytes <= min(source.nbytes - 8, MAX_HEADER_BYTES):
            raise source.corrupt(
                f"a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}, in a file of {source.nbytes}: it is "
                "truncated, or no trace of moert's; traces of other programs are read by `moert trace import`"
            )
        self._data = 8 + header_bytes
        """Where the tensors' bytes begin."""
        try:
            tensors = json.loads(source.read(header_bytes, 8), object_pairs_hook=_compact)
        except (ValueError, RecursionError) as error:
            raise source.corrupt(f"the header is not sound JSON ({error}); copy the file again") from error
        if not isinstance(tensors, dict):
            raise source.corrupt("the header is no JSON object")
        metadata = tensors.pop("__metadata__", None)
        num_sequences = self._read_metadata(metadata, len(tensors))
        self.columns = {kind: Column(num_sequences) for kind in KINDS}
        self._read_entries(tensors, num_sequences)

    def _read_metadata(self, metadata: Any, num_tensors: int) -> int:
        path = self._source.path
        if not isinstance(metadata, dict) or VERSION_KEY not in metadata:
            raise ConfigError(
                f"{path} is a safetensors file but no trace: its metadata has no {VERSION_KEY!r}. Traces of other "
                "programs are read by `moert trace import`"
            )
        version = metadata[VERSION_KEY]
        if not isinstance(version, str) or not _NUMBER.fullmatch(version) or int(version) == 0:
            raise self._source.corrupt(f"{version!r} is no version of the trace format")
        if int(version) > VERSION:
            raise ConfigError(
                f"{path} is of version {version} of the trace format, this moert knows up to {VERSION}: update it"
            )
        text = metadata.get(HEADER_KEY)
        if not isinstance(text, str):
            raise self._source.corrupt(f"its metadata has no {HEADER_KEY!r}")
        try:
            self.header, num_sequences, self.names = decode_header(text)
        except ValueError as error:
            raise self._source.corrupt(f"the trace's header is malformed: {error}") from error
        problem = find_header_problem(self.header)
        if problem is not None:
            raise self._source.corrupt(f"the trace's header: {problem}")
        # Each sequence has tensors of its own; a false number must not make the columns huge.
        if num_sequences > num_tensors:
            raise self._source.corrupt(f"{num_sequences} sequences cannot be in {num_tensors} tensors")
        return num_sequences

    def _read_entries(self, tensors: dict[str, Any], num_sequences: int) -> None:
        corrupt = self._source.corrupt
        ranges = np.empty((len(tensors), 2), dtype=np.int64)
        for row, (name, entry) in enumerate(tensors.items()):
            kind, _, number = name.partition(".")
            if kind not in KINDS or not _NUMBER.fullmatch(number):
                raise corrupt(f"tensor {name!r} does not belong in a trace")
            index = int(number)
            if index >= num_sequences:
                raise corrupt(f"tensor {name!r}, but the trace has {num_sequences} sequences")
            self._check_entry(name, kind, entry)
            column = self.columns[kind]
            column.begin[index] = self._data + entry.begin
            column.rows[index] = entry.shape[0]
            column.wide[index] = entry.dtype != dtypes_of(kind, self.header)[0]
            ranges[row] = entry.begin, entry.end
        for kind in KINDS:
            there = self.columns[kind].begin != ABSENT
            if kind not in OPTIONAL_KINDS and not there.all():
                raise corrupt(f"tensor '{kind}.{int(there.argmin())}' is missing")
        tokens = self.columns["experts"].rows
        for kind, column in self.columns.items():
            there = column.begin != ABSENT
            wrong = there & ((column.rows > tokens) if kind == "spans" else (column.rows != tokens))
            if wrong.any():
                index = int(wrong.argmax())
                raise corrupt(
                    f"tensor '{kind}.{index}' has {column.rows[index]} rows, 'experts.{index}' has {tokens[index]}"
                )
        self._check_cover(list(tensors), ranges)

    def _check_entry(self, name: str, kind: str, entry: Any) -> None:
        corrupt, end_of_data = self._source.corrupt, self._source.nbytes - self._data
        if not isinstance(entry, _Entry):
            raise corrupt(f"tensor {name!r} has a malformed entry in the header")
        dtypes, shape = dtypes_of(kind, self.header), row_shape(kind, self.header)
        if entry.dtype not in dtypes or tuple(entry.shape[1:]) != shape or not entry.shape or entry.shape[0] < 1:
            raise corrupt(
                f"tensor {name!r} is {entry.dtype} {entry.shape}; it must be {' or '.join(dtypes)} "
                f"[{', '.join(['n', *map(str, shape)])}] with at least one row"
            )
        nbytes = STORED[entry.dtype].itemsize * entry.shape[0] * int(np.prod(shape, dtype=np.int64))
        if entry.end - entry.begin != nbytes:
            raise corrupt(f"tensor {name!r}: bytes {entry.begin} to {entry.end} cannot be {nbytes} bytes")
        if entry.end > end_of_data:
            missing = entry.end - end_of_data
            raise corrupt(f"tensor {name!r} ends {missing} bytes after the file: it is truncated; copy it again")

    def _check_cover(self, names: list[str], ranges: npt.NDArray[np.int64]) -> None:
        """The tensors follow one another without gap or overlap, and end with the file."""
        order = np.argsort(ranges[:, 0], kind="stable")
        begins = np.append(ranges[order, 0], self._source.nbytes - self._data)
        ends = np.append(0, ranges[order, 1])
        wrong = begins != ends
        if wrong.any():
            place = int(wrong.argmax())
            what = f"tensor {names[order[place]]!r}" if place < len(order) else "the end of the file"
            raise self._source.corrupt(
                f"{what} at byte {begins[place]} of the data does not follow what ends at {ends[place]}"
            )


class _Entry(NamedTuple):
    dtype: str
    shape: list[int]
    begin: int
    end: int


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object; a tensor's entry in a third of the memory."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name twice in an object that begins with {pairs[0][0]!r}")
    if found.keys() != {"dtype", "shape", "data_offsets"}:
        return found
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return found
    if not all(type(number) is int and 0 <= number < 2**62 for number in (*shape, *offsets)):
        return found
    return _Entry(dtype, shape, *offsets)
