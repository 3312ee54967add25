"""Writing trace files, sequence by sequence."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError, TransferError
from moert.tiers.durable import DurableFile, cannot_write, release
from moert.trace.check import validate, validate_header
from moert.trace.layout import (
    KINDS,
    MAX_HEADER_BYTES,
    OPTIONAL_KINDS,
    STORED,
    dtypes_of,
    encode_header,
    row_shape,
    to_spans,
)
from moert.trace.sequence import NO_EXPERT, Sequence, TraceHeader

_PIECE_BYTES = 1 << 20


class _Written(NamedTuple):
    tokens: int
    spans: int
    optional: tuple[str, ...]
    name: str


class TraceWriter:
    """Writes a trace file; use it in a `with` statement.

    Sequences go to nameless files in the target's folder as they are added, one for each kind of tensor, so memory does
    not grow with the trace but for some 100 bytes a sequence. `close` puts the file together, which takes the room of
    the data twice for a moment, and only then replaces a file of that name. After an exception nothing is left.

    Router weights and scores are stored as 16-bit floats: off by at most 0.05 % (2^-11), or by 3e-8 for values below
    6.1e-5. With `exact` they are stored as they are, in 32 bits.

    Raises:
        ConfigError: the header is not valid, or `path` is a folder.
        TransferError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader, *, exact: bool = False) -> None:
        validate_header(header)
        self.path = Path(path)
        self.header = header
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder; give the name of a file")
        self._float_dtype = "F32" if exact else "F16"
        self._written: list[_Written] = []
        self._header_bytes = 4096 + sum(len(text) for text in encode_header(header, []).values())
        self._spools: dict[str, BinaryIO] = {}
        self._open = True
        try:
            for kind in KINDS:
                self._spools[kind] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        except OSError as error:
            self.discard()
            raise cannot_write(error, self.path, 0) from error

    def add(self, sequence: Sequence) -> None:
        """Write a sequence; its arrays may be reused afterwards. Blocks.

        Raises:
            ConfigError: it is not valid (`moert.trace.validate`), or a file holds no more; others may still be added.
            TransferError: the disk failed. The trace is lost.
        """
        assert self._open, "the trace is closed"
        validate(sequence, self.header)
        arrays = self._arrays(sequence)
        # A tensor's entry is at most 28 bytes of names and 64 of numbers and dtype; a name is escaped twice.
        header_bytes = 128 * len(arrays) + 8 * len(sequence.name.encode()) + 8
        if self._header_bytes + header_bytes > MAX_HEADER_BYTES:
            raise ConfigError(
                f"{self.path}: {len(self._written)} sequences are as many as one file holds (its header may be "
                f"{MAX_HEADER_BYTES} bytes long); start another file"
            )
        try:
            for kind, array in arrays.items():
                self._spools[kind].write(array.data.cast("B"))
        except OSError as error:
            self.discard()
            raise cannot_write(error, self.path, sum(array.nbytes for array in arrays.values())) from error
        self._header_bytes += header_bytes
        optional = tuple(kind for kind in OPTIONAL_KINDS if kind in arrays)
        self._written.append(_Written(len(sequence.steps), len(arrays["spans"]), optional, sequence.name))

    def close(self) -> None:
        """Put the file together, and in the place of whatever has its name. Blocks; idempotent.

        Raises:
            TransferError: the disk failed; what was there before still is.
        """
        if not self._open:
            return
        try:
            try:
                self._put_together()
            except TransferError:
                raise
            except OSError as error:
                raise cannot_write(error, self.path, 0) from error
        except BaseException:
            release(self.path.parent, [self.path.name])
            raise
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what was added and leave no file. Idempotent."""
        self._open = False
        while self._spools:
            self._spools.popitem()[1].close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _arrays(self, sequence: Sequence) -> dict[str, npt.NDArray[Any]]:
        """What is stored of a sequence, C-contiguous."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "spans": to_spans(sequence.phases, sequence.steps),
            "experts": sequence.experts,
        }
        arrays.update({kind: value for kind in OPTIONAL_KINDS if (value := getattr(sequence, kind)) is not None})
        return {kind: self._stored(kind, array, sequence.name) for kind, array in arrays.items()}

    def _stored(self, kind: str, array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        # NO_EXPERT is -1: in an unsigned type all its bits are ones.
        assert NO_EXPERT == -1
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array.astype(STORED[self._dtype(kind)]))
        if stored.dtype.kind == "f" and not np.isfinite(stored).all():
            raise ConfigError(
                f"sequence {name!r}: {kind}: {np.abs(array).max()} does not fit 16 bits; store the floats in 32"
            )
        return stored

    def _dtype(self, kind: str) -> str:
        return self._float_dtype if kind in ("weights", "scores") else dtypes_of(kind, self.header)[0]

    def _put_together(self) -> None:
        header = self._header()
        sizes = {kind: spool.seek(0, os.SEEK_END) for kind, spool in self._spools.items()}
        with DurableFile(self.path, len(header) + sum(sizes.values())) as file:
            file.write(header, 0)
            offset = len(header)
            for kind in KINDS:
                with self._spools.pop(kind) as spool:
                    spool.seek(0)
                    while piece := spool.read(_PIECE_BYTES):
                        file.write(piece, offset)
                        offset += len(piece)
            file.commit()

    def _header(self) -> bytes:
        """The first bytes of the file, in the form that the safetensors library writes itself."""
        metadata = encode_header(self.header, [written.name for written in self._written])
        parts = [f'{{"__metadata__":{json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))}']
        end = 0
        for kind in KINDS:
            dtype, shape = self._dtype(kind), row_shape(kind, self.header)
            row_bytes = STORED[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
            for index, written in enumerate(self._written):
                if kind in OPTIONAL_KINDS and kind not in written.optional:
                    continue
                rows = written.spans if kind == "spans" else written.tokens
                begin, end = end, end + rows * row_bytes
                dimensions = ",".join(str(size) for size in (rows, *shape))
                parts.append(
                    f',"{kind}.{index}":{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":[{begin},{end}]}}'
                )
        text = "".join([*parts, "}"]).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
