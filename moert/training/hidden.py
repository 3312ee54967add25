"""Hidden states recorded beside a trace: what the layers' blocks were given, token by token.

A file is a safetensors file with a tensor `hidden.N` [T, L, D] of 16-bit floats for each sequence of the trace, each
token and layer scaled to a mean square of 1. Its metadata has `moert_hidden`, the version, and `trace_hash`, that of
the trace (`moert.training.examples.trace_hash`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError, CorruptFileError, TransferError
from moert.tiers.durable import DurableFile, cannot_write, release
from moert.tiers.safetensors_file import make_header, read_header

VERSION = 1
VERSION_KEY = "moert_hidden"
_PIECE_BYTES = 1 << 20


class HiddenWriter:
    """Writes such a file, sequence by sequence; memory does not grow with it. Use it in a `with` statement.

    Until `close` the states are in a nameless file in the target's folder.

    Raises:
        TransferError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._shapes: list[tuple[int, ...]] = []
        try:
            self._spool = tempfile.TemporaryFile(dir=self.path.absolute().parent)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(error, self.path, 0) from error

    def add(self, hidden: npt.NDArray[np.float16]) -> None:
        """The states [T, L, D] of the next sequence; not kept. Blocks.

        Raises:
            TransferError: the disk failed.
        """
        try:
            self._spool.write(np.ascontiguousarray(hidden, dtype="<f2").data.cast("B"))
        except OSError as error:
            raise cannot_write(error, self.path, hidden.nbytes) from error
        self._shapes.append(hidden.shape)

    def close(self, trace_hash: str) -> None:
        """Put the file together, for the trace of this hash. Blocks.

        Raises:
            TransferError: the disk failed; what was there before still is.
        """
        sizes = [2 * int(np.prod(shape, dtype=np.int64)) for shape in self._shapes]
        header = make_header(
            [
                (f"hidden.{n}", "F16", shape, size)
                for n, (shape, size) in enumerate(zip(self._shapes, sizes, strict=True))
            ],
            {VERSION_KEY: str(VERSION), "trace_hash": trace_hash},
        )
        try:
            with DurableFile(self.path, len(header) + sum(sizes)) as file:
                file.write(header, 0)
                at = len(header)
                self._spool.seek(0)
                while piece := self._spool.read(_PIECE_BYTES):
                    file.write(piece, at)
                    at += len(piece)
                file.commit()
        except BaseException:
            release(self.path.parent, [self.path.name])
            raise

    def __enter__(self) -> HiddenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._spool.close()


class HiddenFile:
    """Such a file, read one sequence at a time.

    Raises:
        ConfigError: it holds no hidden states, or is of a newer version.
        CorruptFileError: it is malformed.
        TransferError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._entries, metadata = read_header(self.path)
        if VERSION_KEY not in metadata:
            raise ConfigError(f"{self.path} holds no hidden states; `moert train-predictor MODEL --keep FOLDER` does")
        if metadata[VERSION_KEY] != str(VERSION):
            raise ConfigError(
                f"{self.path} is of version {metadata[VERSION_KEY]!r}, this moert reads version {VERSION}"
            )
        self._trace_hash = metadata.get("trace_hash", "")
        for index in range(len(self._entries)):
            entry = self._entries.get(f"hidden.{index}")
            if entry is None or entry.dtype != "F16" or len(entry.shape) != 3:
                raise CorruptFileError(f"{self.path}: tensor 'hidden.{index}' is missing or no F16 [T, L, D]")

    @property
    def width(self) -> int:
        """D; 0 without any sequence."""
        return self._entries["hidden.0"].shape[2] if self._entries else 0

    def check(self, trace_hash: str, name: str) -> None:
        """See to it that these are the states of the trace of this hash, called `name` in the message.

        Raises:
            ConfigError: they are another trace's.
        """
        if trace_hash != self._trace_hash:
            raise ConfigError(
                f"{self.path} was recorded beside a trace of hash {self._trace_hash or 'unknown'}, and {name} has "
                f"{trace_hash}: give the two that were recorded together"
            )

    def read(self, index: int) -> npt.NDArray[np.float16]:
        """[T, L, D] of a sequence. Blocks.

        Raises:
            CorruptFileError: there is no such sequence, or the file has become shorter.
            TransferError: the disk failed.
        """
        entry = self._entries.get(f"hidden.{index}")
        if entry is None:
            raise CorruptFileError(f"{self.path} has {len(self._entries)} sequences, and no {index}")
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.offset)
                data = file.read(entry.nbytes)
        except OSError as error:
            raise TransferError(error.errno, f"{error.strerror}; cannot read it", str(self.path)) from error
        if len(data) < entry.nbytes:
            raise CorruptFileError(f"{self.path}: tensor 'hidden.{index}' is truncated; record it again")
        return np.frombuffer(data, dtype="<f2").reshape(entry.shape)
