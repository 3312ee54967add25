"""Where the tensors of a safetensors file are: its header, read and checked without reading any tensor.

The file is `u64 N | N bytes of JSON | data`; each tensor's `data_offsets` count from the start of the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moert.errors import CorruptFileError, TransferError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DATA_ALIGNMENT_BYTES = 4096
"""Where the data of the files begins that `make_header` makes: at a multiple of it, as direct reads want it."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `offset` counts bytes from the start of the file."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype in torch, or None where torch has no such dtype."""
        return DTYPES.get(self.dtype)


def read_entries(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file, by name; see `read_header`."""
    return read_header(path)[0]


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every tensor of a safetensors file, by name, and the file's metadata; blocks while the header is read.

    Raises:
        CorruptFileError: the header is malformed or contradicts the size of the file; the file, the tensor and the
            numbers are named.
        TransferError: the file cannot be opened or read.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if size < 8:
                raise CorruptFileError(f"{path}: {size} bytes are too few for a safetensors file")
            if header_bytes > size - 8:
                raise CorruptFileError(
                    f"{path}: its header should be {header_bytes} bytes long, but the file ends after {size} bytes; "
                    "download or copy it again"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise CorruptFileError(f"{path}: a header of {header_bytes} bytes is over {MAX_HEADER_BYTES}")
            text = file.read(header_bytes)
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot read the header", path) from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CorruptFileError(f"{path}: the header is not JSON ({error}); download or copy the file again") from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path}: the header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(f"{path}: its metadata is not names and texts; download or copy the file again")
    entries = {name: _entry(path, name, fields, 8 + header_bytes) for name, fields in header.items()}
    _check_cover(path, list(entries.values()), 8 + header_bytes, size)
    return entries, metadata


def make_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file of `tensors`, (name, dtype, shape, bytes) in the order of their data.

    Padded so that the data begins at a multiple of 4096 bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _entry(path: str, name: str, fields: Any, data_begin: int) -> TensorEntry:
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        well_formed = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CorruptFileError(f"{path}: tensor {name!r} has a malformed header entry {fields!r}")
    known = DTYPES.get(dtype)
    if begin > end or (known is not None and end - begin != math.prod(shape) * known.itemsize):
        raise CorruptFileError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {list(shape)} cannot be the bytes {begin} to {end}"
        )
    return TensorEntry(path, name, dtype, shape, data_begin + begin, end - begin)


def _check_cover(path: str, entries: list[TensorEntry], begin: int, size: int) -> None:
    """The tensors must follow one another without gap or overlap and end with the file."""
    end, last = begin, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else "leaves a gap after"
            raise CorruptFileError(
                f"{path}: tensor {entry.name!r} at byte {entry.offset} {what} {last}, which ends at byte {end}"
            )
        end, last = entry.offset + entry.nbytes, f"tensor {entry.name!r}"
        if end > size:
            needed = max(entry.offset + entry.nbytes for entry in entries)
            raise CorruptFileError(
                f"{path}: tensor {entry.name!r} should end at byte {end}, but the file has {size} bytes: it is "
                f"truncated, {needed - size} bytes are missing; download or copy it again"
            )
    if end != size:
        raise CorruptFileError(f"{path}: {size - end} bytes after {last} belong to no tensor")


def read_index(folder: str | os.PathLike[str], index_name: str = "model.safetensors.index.json") -> list[str] | None:
    """The shard files that a sharded checkpoint's index names, each checked to exist; None without an index.

    Raises:
        CorruptFileError: the index is malformed, or names a file that is not there.
    """
    index = Path(folder) / index_name
    if not index.is_file():
        return None
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptFileError(f"{index}: not a checkpoint index ({error!r})") from error
    paths = [str(Path(folder) / str(name)) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not os.path.isfile(path)]
    if missing:
        raise CorruptFileError(
            f"{index}: names {len(names)} files, of which {len(missing)} are missing, the first {missing[0]!r}; "
            "finish the download"
        )
    return paths
