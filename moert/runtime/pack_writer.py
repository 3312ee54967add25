"""Writing the weights of a pack: the experts of each layer and the dense weights, file after file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from moert.errors import UnsupportedModelError
from moert.kernels.cpu import threads
from moert.runtime.dense_shard import CHUNK_BYTES, DenseShard
from moert.runtime.layer import LayerSpec
from moert.runtime.pack_file import PackedLayer, checksum
from moert.runtime.read_ahead import read_ahead
from moert.runtime.records import Record
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, ShardFile
from moert.tiers.durable import DurableFile, release, reserve
from moert.tiers.safetensors_file import read_header

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

READS_AT_ONCE = 4
MOST_BUFFER_BYTES = 1 << 30
"""Fewer experts are read and encoded at once where they are so large that more memory would be taken, but two are."""


@dataclass(frozen=True)
class PackWork:
    """All files of weights that the pack has."""

    shards: list[DenseShard]
    layers: list[tuple[PackedLayer, LayerSpec, list[Record]]]
    paths: list[str]
    """The checkpoint's files, as spans count them."""

    @property
    def parts(self) -> list[DenseShard | PackedLayer]:
        """The files, in the order in which they are written."""
        return [*self.shards, *(layer for layer, _, _ in self.layers)]


def is_finished(folder: Path, part: DenseShard | PackedLayer) -> bool:
    """Whether an earlier run has completed a file: it has its name only then, so its size and header tell."""
    path = folder / part.file_name
    if not path.is_file() or path.stat().st_size != part.file_bytes:
        return False
    _, found = read_header(path)
    wanted = part.metadata
    return all(found.get(key) == value for key, value in wanted.items())


def write_parts(folder: Path, work: PackWork, kept: Sequence[str], progress: Progress | None) -> None:
    """Write all files but those of the names in `kept` to `folder`, each whole or not at all. Blocks.

    Raises:
        UnsupportedModelError: numbers that the format cannot hold.
        CorruptFileError, TransferError: the checkpoint or the disk is at fault.
    """
    missing = {part.file_name: part.file_bytes for part in work.parts if part.file_name not in kept}
    if not missing:
        return
    reserve(folder, missing)
    report = _Report(progress, sum(part.file_bytes for part in work.parts), _kept_bytes(work, kept))
    try:
        with _Streams(work) as streams:
            for shard in work.shards:
                if shard.file_name in missing:
                    _write_shard(folder, shard, streams, report)
            for layer, spec, records in work.layers:
                if layer.file_name in missing:
                    _write_layer(folder, layer, spec, records, streams, report)
    except OSError:
        release(folder, missing)  # a full disk gets its room back; finished files stay
        raise


def _kept_bytes(work: PackWork, kept: Sequence[str]) -> int:
    return sum(part.file_bytes for part in work.parts if part.file_name in kept)


class _Report:
    """Counts what has been written."""

    def __init__(self, progress: Progress | None, total: int, done: int) -> None:
        self._progress, self._total, self._done = progress, total, done

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Streams:
    """The checkpoint's files, open, and the memory through which they are read and encoded: a few records."""

    def __init__(self, work: PackWork) -> None:
        self._numbers = {path: number for number, path in enumerate(work.paths)}
        records = [record for _, _, of_layer in work.layers for record in of_layer]
        window = max([CHUNK_BYTES + 2 * BLOCK_BYTES, *(record.buffer_bytes for record in records)])
        window = -(-window // BLOCK_BYTES) * BLOCK_BYTES
        slot = max(record.slot_bytes for record in records)
        image = max(layer.record_bytes for layer, _, _ in work.layers)
        lanes = max(2, min(max(READS_AT_ONCE, threads()), MOST_BUFFER_BYTES // (window + slot + image)))
        with contextlib.ExitStack() as stack:
            self.files: list[ShardFile] = [stack.enter_context(ShardFile(path)) for path in work.paths]
            arena = stack.enter_context(contextlib.closing(HostArena(lanes * (window + slot + image))))
            self._bank = SlotBank(arena, 0, window, lanes)
            self._slots = SlotBank(arena, lanes * window, slot, lanes)
            self._images = SlotBank(arena, lanes * (window + slot), image, lanes)
            stack.enter_context(_one_torch_thread())
            self._reader = stack.enter_context(DiskReader(lanes))
            self._close = stack.pop_all().close

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def shard(self, shard: DenseShard) -> Iterator[memoryview]:
        """The bytes of a shard's tensors, in order, in pieces."""
        wanted = ((span, (span,), (0,)) for span in shard.chunks(self._numbers))
        for span, _, buffer in read_ahead(self._reader, self.files, self._bank, wanted):
            begin = span.offset % BLOCK_BYTES
            yield buffer[begin : begin + span.nbytes]

    def experts(
        self, layer: PackedLayer, spec: LayerSpec, records: Sequence[Record]
    ) -> Iterator[tuple[memoryview, str]]:
        """A layer's records as they are to be written, in order, with their checksums; each valid until the next."""
        assert spec.storage is not None
        storage = spec.storage
        images = [self._images.slot(lane)[: layer.record_bytes] for lane in range(len(self._images))]
        checksums = [""] * len(images)

        def encode(wanted: tuple[int, Record], lane: int, buffer: memoryview) -> None:
            expert, record = wanted
            read = torch.frombuffer(buffer, dtype=torch.uint8)
            if not record.is_direct:
                slot = torch.frombuffer(self._slots.slot(lane), dtype=torch.uint8)
                record.fill(read, slot)
                read = slot
            try:
                encoded = storage.encode(record.layout.views(read))
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"expert {expert} of {spec.name}: {error}") from error
            raw = torch.frombuffer(images[lane], dtype=torch.uint8)
            raw.zero_()  # what lies between the tensors is the same in every record
            for name, view in layer.layout.views(raw).items():
                view.copy_(encoded[name])
            checksums[lane] = checksum(images[lane][: layer.layout.nbytes])

        numbered = (((expert, record), record.reads, record.positions) for expert, record in enumerate(records))
        for _, lane, _ in read_ahead(self._reader, self.files, self._bank, numbered, encode):
            yield images[lane], checksums[lane]


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Experts are encoded side by side, each on one thread: torch's own would wait for each other at every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(folder: Path, shard: DenseShard, streams: _Streams, report: _Report) -> None:
    with DurableFile(folder / shard.file_name, shard.file_bytes) as file:
        offset = len(shard.header())
        state = xxhash.xxh3_128()
        for piece in streams.shard(shard):
            file.write(piece, offset)
            state.update(piece)
            offset += len(piece)
            report.add(len(piece))
        file.write(shard.header(state.hexdigest()), 0)
        file.commit()


def _write_layer(
    folder: Path, layer: PackedLayer, spec: LayerSpec, records: Sequence[Record], streams: _Streams, report: _Report
) -> None:
    with DurableFile(folder / layer.file_name, layer.file_bytes) as file:
        offset = len(layer.header())
        checksums = []
        for image, found in streams.experts(layer, spec, records):
            checksums.append(found)
            file.write(image, offset)
            offset += layer.record_bytes
            report.add(layer.record_bytes)
        file.write(layer.header(checksums), 0)
        file.commit()
