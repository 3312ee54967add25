"""A pack's other files: the weights that are no experts, under the names and in the dtypes of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moert.runtime.pack_file import CHECKSUM, NO_CHECKSUM, PACK_VERSION, sealed_header
from moert.runtime.records import Span
from moert.tiers.safetensors_file import TensorEntry

SHARD_BYTES = 4 << 30
CHUNK_BYTES = 4 << 20
"""What is read and written at once."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class DenseShard:
    """One file of tensors, copied as they are."""

    file_name: str
    entries: tuple[TensorEntry, ...]
    source: str
    """The fingerprint of the checkpoint they come from."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return len(self.header()) + self.data_bytes

    def header(self, checksum: str = NO_CHECKSUM) -> bytes:
        """The file's first bytes, as many whatever the checksum of the data is."""
        tensors = [(entry.name, entry.dtype, entry.shape, entry.nbytes) for entry in self.entries]
        return sealed_header(tensors, {**self.metadata, CHECKSUM: checksum})

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself besides its checksum; HuggingFace asks for "format"."""
        return {"format": "pt", "moert_pack": str(PACK_VERSION), "source": self.source}

    def chunks(self, files: Mapping[str, int]) -> Iterator[Span]:
        """The data, in order, in pieces of at most `CHUNK_BYTES`; `files` numbers the checkpoint's files."""
        for entry in self.entries:
            for begin in range(0, entry.nbytes, CHUNK_BYTES):
                nbytes = min(CHUNK_BYTES, entry.nbytes - begin)
                yield Span(files[entry.path], entry.offset + begin, nbytes)


def make_shards(entries: Sequence[TensorEntry], source: str) -> list[DenseShard]:
    """Share tensors out over files of about `SHARD_BYTES`, in the order in which they are on disk."""
    groups: list[list[TensorEntry]] = [[]]
    room = SHARD_BYTES
    for entry in sorted(entries, key=lambda entry: (entry.path, entry.offset)):
        if entry.nbytes > room and groups[-1]:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(entry)
        room -= entry.nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        # Wide numbers first, so that each tensor begins at a multiple of its own.
        group.sort(key=lambda entry: (-_width(entry), entry.name))
        shards.append(DenseShard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group), source))
    return shards


def index_bytes(shards: Sequence[DenseShard]) -> bytes:
    """The index by which HuggingFace's loader finds the tensors."""
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {entry.name: shard.file_name for shard in shards for entry in shard.entries},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _width(entry: TensorEntry) -> int:
    dtype = entry.torch_dtype
    return dtype.itemsize if dtype is not None else 1
