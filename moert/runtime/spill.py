"""Experts of a model in memory, written to an unnamed file so that their memory can be used for something else."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import torch

from moert.config import format_bytes
from moert.errors import TransferError
from moert.formats import RecordLayout
from moert.runtime.layer import LayerSpec
from moert.runtime.records import Record, Span
from moert.tiers.arena import HostArena
from moert.tiers.disk import BLOCK_BYTES, ShardFile

ExpertTensors = Sequence[Mapping[str, torch.Tensor]]
"""One layer's experts: expert -> tensor name -> tensor."""


class SpillSource:
    """The records of experts that `write` put on disk.

    The file has no name from the moment it is complete: it takes no room after the process ends, however it ends.
    """

    def __init__(self, file: ShardFile, records: Sequence[Sequence[Record]]) -> None:
        self.files = [file]
        self._records = records

    @classmethod
    def write(
        cls, specs: Sequence[LayerSpec], layers: Iterable[ExpertTensors], folder: str | None, *, direct: bool
    ) -> SpillSource:
        """Write every expert; blocks. The tensors are read only.

        Args:
            folder: where the file is made; None means the temporary folder.
            direct: read it past the page cache where the file system can.

        Raises:
            TransferError: the folder cannot be written or is full; nothing is left behind.
        """
        where = folder or tempfile.gettempdir()
        records, end = [], 0
        for spec in specs:
            layout = RecordLayout.packed(spec.tensors)
            layer = []
            for _ in range(spec.num_experts):
                span = Span(0, end, layout.nbytes)
                layer.append(Record((span,), (0,), span.window_bytes, layout, None))
                end += span.window_bytes
            records.append(layer)
        try:
            os.makedirs(where, exist_ok=True)
            fd, path = tempfile.mkstemp(prefix="moert-spill-", dir=where)
        except OSError as error:
            raise _cannot_write(error, where, end) from error
        try:
            try:
                os.posix_fallocate(fd, 0, max(end, 1))  # a full disk says so here, not half-way
                for spec, experts, layer in zip(specs, layers, records, strict=True):
                    for tensors, record in zip(experts, layer, strict=True):
                        _write_record(fd, record, {spec.name: tensors[spec.name] for spec in spec.tensors})
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the page cache is charged to the cgroup too
            except OSError as error:
                raise _cannot_write(error, where, end) from error
            file = ShardFile(path, direct=direct)
        finally:
            os.close(fd)
            os.unlink(path)
        return cls(file, records)

    def record(self, layer: int, expert: int) -> Record:
        return self._records[layer][expert]

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """One expert's tensors, read on the calling thread. New memory is the caller's."""
        record = self._records[layer][expert]
        arena = HostArena(record.buffer_bytes)
        try:
            buffer = arena.view(0, record.buffer_bytes)
            (span,) = record.reads
            self.files[span.file].read(span.offset, span.nbytes, buffer)
            return record.layout.views(torch.frombuffer(buffer, dtype=torch.uint8).clone())
        finally:
            arena.close()

    def close(self) -> None:
        for file in self.files:
            file.close()


def _write_record(fd: int, record: Record, tensors: Mapping[str, torch.Tensor]) -> None:
    image = torch.zeros(record.buffer_bytes, dtype=torch.uint8)
    for name, view in record.layout.views(image).items():
        view.copy_(tensors[name])
    data = memoryview(image.numpy())  # type: ignore[arg-type]
    offset = record.reads[0].offset
    assert offset % BLOCK_BYTES == 0
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _cannot_write(error: OSError, folder: str, nbytes: int) -> TransferError:
    hint = "free some space or set cache_dir" if error.errno == errno.ENOSPC else "set cache_dir to a writable folder"
    return TransferError(
        error.errno,
        f"{error.strerror}: cannot write {format_bytes(nbytes)} of experts that do not fit in host memory; {hint}, or "
        "raise host_memory",
        folder,
    )
