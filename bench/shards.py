"""A sharded safetensors checkpoint, written as a stream: headers from shapes, bytes chunk by chunk, all or nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moert.config import format_bytes
from moert.errors import CapacityError, ConfigError

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK_BYTES = 16 << 20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name in the checkpoint, its shape and its safetensors dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_shards(specs: list[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut `specs`, kept in order, into shards of at most `shard_bytes` (a larger tensor has a shard of its own).

    Within a shard the order is that of HuggingFace's writer: wide dtypes first, then by name.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return [sorted(shard, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.dtype, spec.name)) for shard in shards]


def header(specs: list[TensorSpec]) -> bytes:
    """The first bytes of a safetensors file holding `specs` in this order: length, then JSON padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end of the block, or vanishes if the block raises.

    A killed process leaves only `.<name>.partial` beside the target; the next writer of the same target clears it.

    Raises:
        ConfigError: `target` exists and is not an empty folder, or another process is writing it.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists; remove it or choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {target}; wait for it or choose another place") from None
        for leftover in partial.iterdir():
            leftover.unlink()
        try:
            yield partial
            for path in partial.iterdir():
                _sync(path)
            os.fsync(lock)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Fill = Callable[[TensorSpec], Callable[[npt.NDArray[np.generic], int], None]]


def write_shards(
    folder: Path, shards: list[list[TensorSpec]], fill: Fill, wrote: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Write `shards` and their index into `folder`, durably; blocks until all is on the disk.

    `fill(spec)(out, start)` puts elements start .. start + len(out) of a tensor into `out` as bit patterns; `wrote` is
    told the bytes as they go. Memory use is one chunk, whatever the tensors' sizes.

    Raises:
        CapacityError: the disk cannot hold the checkpoint; nothing but empty space has been written then.
    """
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    heads = [header(shard) for shard in shards]
    sizes = [len(head) + sum(spec.nbytes for spec in shard) for head, shard in zip(heads, shards, strict=True)]
    for name, size in zip(names, sizes, strict=True):
        with open(folder / name, "xb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                reason = error.strerror
            else:
                continue
        raise CapacityError(
            f"the checkpoint needs {format_bytes(sum(sizes))} in {folder.parent}: {reason} at {name}; "
            f"free space there, or give fewer layers"
        )
    for name, head, shard in zip(names, heads, shards, strict=True):
        with open(folder / name, "r+b", buffering=0) as file:
            _write(file.fileno(), memoryview(head))
            for spec in shard:
                _write_tensor(file.fileno(), spec, fill(spec), wrote)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    total = sum(spec.nbytes for shard in shards for spec in shard)
    parameters = sum(math.prod(spec.shape) for shard in shards for spec in shard)
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _write_tensor(
    descriptor: int,
    spec: TensorSpec,
    fill: Callable[[npt.NDArray[np.generic], int], None],
    wrote: Callable[[int], None],
) -> None:
    unit = np.dtype(f"u{ITEM_BYTES[spec.dtype]}")
    elements = math.prod(spec.shape)
    buffer = np.empty(min(elements, CHUNK_BYTES // unit.itemsize), unit)
    for start in range(0, elements, max(1, len(buffer))):
        chunk = buffer[: elements - start]
        fill(chunk, start)
        _write(descriptor, chunk.data.cast("B"))
        wrote(chunk.nbytes)


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
