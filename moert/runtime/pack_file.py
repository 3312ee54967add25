"""A pack's files: the experts of one layer in records that are used as they are read, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from moert.errors import CorruptFileError, TransferError
from moert.formats import RecordLayout, TensorSpec
from moert.runtime.records import Check, Piece, Record, Source, Span, make_record
from moert.tiers.disk import BLOCK_BYTES, Read
from moert.tiers.safetensors_file import DTYPES, TensorEntry, make_header, read_header

PACK_VERSION = 2
CHECKSUM = "xxh3_128"
HEADER_CHECKSUM = "xxh3_128_header"
"""Of the file's bytes up to the data, counted with zeros in its place."""

NO_CHECKSUM = "0" * 32
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PackedLayer:
    """What a pack says of one layer, in the file of its experts."""

    layer: int
    module: str
    """The path of its experts module in the model."""
    num_experts: int
    stored_as: str
    """A `FormatChoice` as text."""
    layout: RecordLayout
    """The tensors of one record."""
    source: str
    """The fingerprint of the checkpoint it was made from."""
    moert_version: str

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.layout.nbytes // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def file_name(self) -> str:
        return f"experts-{self.layer:05d}.safetensors"

    def header(self, checksums: Sequence[str] | None = None) -> bytes:
        """The file's first bytes, as many whatever the checksums are; without them there is only their place."""
        tensors = [(f"experts.{expert:05d}", "U8", (self.record_bytes,), self.record_bytes) for expert in self._experts]
        found = [NO_CHECKSUM for _ in self._experts] if checksums is None else list(checksums)
        return sealed_header(tensors, {**self.metadata, CHECKSUM: ",".join(found)})

    @property
    def file_bytes(self) -> int:
        """The size of its file."""
        return len(self.header()) + self.num_experts * self.record_bytes

    @property
    def _experts(self) -> range:
        return range(self.num_experts)

    @property
    def metadata(self) -> dict[str, str]:
        """What its file says of it, besides the checksums."""
        tensors = [
            {"name": spec.name, "dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "offset": offset}
            for spec, offset in zip(self.layout.specs, self.layout.offsets, strict=True)
        ]
        return {
            "moert_pack": str(PACK_VERSION),
            "moert_version": self.moert_version,
            "layer": str(self.layer),
            "module": self.module,
            "num_experts": str(self.num_experts),
            "weight_format": self.stored_as,
            "record": json.dumps({"bytes": self.layout.nbytes, "tensors": tensors}, separators=(",", ":")),
            "source": self.source,
        }


@dataclass(frozen=True)
class PackFile:
    """The file of one layer, its header read and checked."""

    path: str
    layer: PackedLayer
    checksums: tuple[str, ...]
    data_begin: int

    def span(self, file: int, expert: int) -> Span:
        """One expert's record, as file number `file`."""
        return Span(file, self.data_begin + expert * self.layer.record_bytes, self.layer.layout.nbytes)

    def record(self, file: int, expert: int, specs: Sequence[TensorSpec]) -> Record:
        """One expert's record, as file number `file`, with its tensors as `specs` in its slot; they may be of other
        floating dtypes than in the file. Its checksum is looked at when it is first read.
        """
        sources = []
        begin = self.span(file, expert).offset
        for spec, offset in zip(self.layer.layout.specs, self.layer.layout.offsets, strict=True):
            span = Span(file, begin + offset, spec.nbytes)
            sources.append(Source((Piece(span, spec.shape, spec.dtype, spec.name),), None))
        return replace(make_record(specs, sources), check=self.check(expert))

    def check(self, expert: int) -> Check:
        """Holds the first read of an expert against its checksum; reads it once more before it gives up."""
        where = f"{self.path}: expert {expert} of layer {self.layer.layer} ({self.layer.module})"
        return _FirstRead(self.checksums[expert], where)


class _FirstRead:
    """Checks a record when it is read for the first time, and never again: that would cost more than the read."""

    def __init__(self, checksum: str, where: str) -> None:
        self.is_over = False
        self._checksum = checksum
        self._where = where

    def __call__(self, reads: Sequence[Read]) -> None:
        if self.is_over:
            return
        if _checksum_of(reads) != self._checksum:
            for read in reads:
                read.file.read(read.offset, read.nbytes, read.destination)
            found = _checksum_of(reads)
            if found != self._checksum:
                raise CorruptFileError(
                    f"{self._where} has the checksum {found}, not {self._checksum}, read twice: the file is damaged; "
                    "copy it again, or pack the model again"
                )
        self.is_over = True


def _checksum_of(reads: Sequence[Read]) -> str:
    state = xxhash.xxh3_128()
    for read in reads:
        begin = read.offset % BLOCK_BYTES
        state.update(read.destination[begin : begin + read.nbytes])
    return state.hexdigest()


def checksum(data: memoryview) -> str:
    """The checksum of a record's bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def sealed_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """`make_header` with a checksum of the header itself."""
    blank = make_header(tensors, {**metadata, HEADER_CHECKSUM: NO_CHECKSUM})
    return _with_seal(blank, xxhash.xxh3_128_hexdigest(blank))


def read_sealed(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """`read_header` of a pack's file, as it was written.

    Raises:
        CorruptFileError: the file is truncated, malformed, no file of a pack, or its header is damaged.
        TransferError: it cannot be read.
    """
    name = os.fspath(path)
    entries, metadata = read_header(name)
    version = metadata.get("moert_pack")
    if version != str(PACK_VERSION):
        what = "is no file of a pack" if version is None else f"is of pack version {version}"
        raise CorruptFileError(f"{name} {what}; this moert reads version {PACK_VERSION}: pack the model again")
    try:
        with open(name, "rb") as file:
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot read the header", name) from error
    seal, found = metadata.get(HEADER_CHECKSUM), xxhash.xxh3_128_hexdigest(_with_seal(header, NO_CHECKSUM))
    if found != seal:
        raise CorruptFileError(
            f"{name}: its header has the checksum {found}, not {seal}: the file is damaged; copy it again, or pack the "
            "model again"
        )
    return entries, metadata


def _with_seal(header: bytes, seal: str) -> bytes:
    # Within the names and texts of a header these quotes would be escaped.
    key = f'"{HEADER_CHECKSUM}":"'.encode()
    before, found, rest = header.partition(key)
    return before + found + seal.encode() + rest[len(seal) :] if found else header


def read_pack_file(path: str | os.PathLike[str]) -> PackFile:
    """Read and check the header of a layer's file; no record is read.

    Raises:
        CorruptFileError: the file is truncated, malformed or no file of a pack.
        TransferError: it cannot be read.
    """
    name = os.fspath(path)
    entries, metadata = read_sealed(name)
    try:
        layer = _read_layer(metadata)
        checksums = tuple(metadata[CHECKSUM].split(","))
        if len(checksums) != layer.num_experts or NO_CHECKSUM in checksums:
            raise ValueError(f"{len(checksums)} checksums for {layer.num_experts} experts")
        data_begin = _check_records(layer, entries)
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{name}: its metadata contradict themselves ({error!r}); copy it again") from error
    return PackFile(name, layer, checksums, data_begin)


def _read_layer(metadata: dict[str, str]) -> PackedLayer:
    record = json.loads(metadata["record"])
    specs = tuple(TensorSpec(one["name"], tuple(one["shape"]), DTYPES[one["dtype"]]) for one in record["tensors"])
    layout = RecordLayout(specs, tuple(one["offset"] for one in record["tensors"]), record["bytes"])
    if layout != RecordLayout.packed(specs):
        raise ValueError("the tensors of a record do not lie where they belong")
    return PackedLayer(
        layer=int(metadata["layer"]),
        module=metadata["module"],
        num_experts=int(metadata["num_experts"]),
        stored_as=metadata["weight_format"],
        layout=layout,
        source=metadata["source"],
        moert_version=metadata["moert_version"],
    )


def _check_records(layer: PackedLayer, entries: dict[str, TensorEntry]) -> int:
    """Where the first record begins."""
    begin = min(entry.offset for entry in entries.values())
    if len(entries) != layer.num_experts or begin % BLOCK_BYTES:
        raise ValueError(f"{len(entries)} records from byte {begin} for {layer.num_experts} experts")
    for expert in range(layer.num_experts):
        entry = entries[f"experts.{expert:05d}"]
        if (entry.offset, entry.nbytes) != (begin + expert * layer.record_bytes, layer.record_bytes):
            raise ValueError(f"the record of expert {expert} is not where it belongs")
    return begin


def is_pack(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a pack."""
    return (Path(folder) / MANIFEST).is_file()


MANIFEST = "moert-pack.json"
"""The file of a pack's folder that says what it holds."""
