"""Opening a pack: its records for a model's layers, checked against what the model wants."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moert.errors import CorruptFileError
from moert.formats import FormatChoice, TensorSpec
from moert.hf.layers import Layers
from moert.runtime.layer import LayerSpec
from moert.runtime.pack_file import MANIFEST, PACK_VERSION, PackFile, read_pack_file, read_sealed
from moert.runtime.records import Record
from moert.tiers.build_folder import read_manifest

_AGAIN = "copy the pack again, or pack the model again"


@dataclass(frozen=True)
class Pack:
    """A pack's folder and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def stored_as(self) -> FormatChoice:
        """The format of its experts."""
        return FormatChoice.parse(self.manifest["format"])

    @property
    def source(self) -> str:
        """The fingerprint of the checkpoint it was made from."""
        found: str = self.manifest["source"]["fingerprint"]
        return found

    @property
    def expert_files(self) -> list[str]:
        """The paths of its experts' files, in the order of the layers."""
        return [str(self.folder / name) for name in sorted(self.manifest["files"]) if name.startswith("experts-")]

    def check_files(self) -> None:
        """Check that all files are there, of the sizes that they should have.

        Raises:
            CorruptFileError: one is not.
        """
        for name, nbytes in self.manifest["files"].items():
            try:
                found = os.stat(self.folder / name).st_size
            except OSError:
                raise CorruptFileError(f"{self.folder / name} is missing; {_AGAIN}") from None
            if found != nbytes:
                what = "truncated" if found < nbytes else "too long"
                raise CorruptFileError(f"{self.folder / name} is {what}: {found} bytes, not {nbytes}; {_AGAIN}")

    def open_file(self, path: str) -> PackFile:
        """One of `expert_files`, its header read.

        Raises:
            CorruptFileError: it is malformed, or of another pack.
            TransferError: it cannot be read.
        """
        file = read_pack_file(path)
        layer = file.layer
        if (layer.source, layer.stored_as) != (self.source, self.manifest["format"]):
            raise CorruptFileError(
                f"{path} is of another pack (from checkpoint {layer.source[:12]} as {layer.stored_as}, this pack is "
                f"from {self.source[:12]} as {self.manifest['format']}); {_AGAIN}"
            )
        if os.path.basename(path) != layer.file_name:
            raise CorruptFileError(f"{path} holds layer {layer.layer}, whose file is {layer.file_name}; {_AGAIN}")
        return file

    def check_dense_files(self) -> None:
        """Check that the files of the weights that are no experts belong to this pack. Reads headers.

        Raises:
            CorruptFileError: one does not, or is malformed.
            TransferError: one cannot be read.
        """
        for name in sorted(self.manifest["files"]):
            if name.startswith("experts-"):
                continue
            source = read_sealed(self.folder / name)[1].get("source", "")
            if source != self.source:
                raise CorruptFileError(
                    f"{self.folder / name} is of another pack (from checkpoint {source[:12]}, this pack is from "
                    f"{self.source[:12]}); {_AGAIN}"
                )

    def records(self, layers: Layers) -> tuple[list[str], list[list[Record]]]:
        """The files of the experts, and each layer's records, which count files by them. Reads headers.

        Raises:
            CorruptFileError: the pack is incomplete or damaged, or is not of such layers.
        """
        self.check_files()
        self.check_dense_files()
        paths = self.expert_files
        if len(paths) != len(layers.specs):
            raise CorruptFileError(
                f"{self.folder} has experts of {len(paths)} layers, this model has {len(layers.specs)}: the pack was "
                f"made from another architecture, or by another version of transformers; {_AGAIN}"
            )
        records = []
        for number, (path, spec) in enumerate(zip(paths, layers.specs, strict=True)):
            file = self.open_file(path)
            _check_layer(file, spec, layers.paths_of[spec.index])
            records.append([file.record(number, expert, spec.stored) for expert in range(spec.num_experts)])
        return paths, records


def open_pack(folder: Path) -> Pack | None:
    """The pack in a folder; None where there is no manifest of one.

    Raises:
        CorruptFileError: the manifest is malformed, or of a version that this moert does not read.
    """
    path = folder / MANIFEST
    manifest = read_manifest(path)
    if manifest is None:
        return None
    version = manifest.get("pack_version")
    if version != PACK_VERSION:
        raise CorruptFileError(f"{path} is of version {version}, this moert reads {PACK_VERSION}; pack the model again")
    pack = Pack(folder, manifest)
    try:
        _ = (pack.stored_as, pack.source, dict(manifest["files"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is malformed ({error}); {_AGAIN}") from error
    return pack


def _check_layer(file: PackFile, spec: LayerSpec, paths: Sequence[str]) -> None:
    layer = file.layer
    # The same experts have longer or shorter paths in other classes for the same model.
    if not any(f".{layer.module}".endswith(f".{path}") or f".{path}".endswith(f".{layer.module}") for path in paths):
        raise CorruptFileError(f"{file.path} has the experts of {layer.module!r}, not of {spec.name!r}; {_AGAIN}")
    if layer.num_experts != spec.num_experts or not _same(layer.layout.specs, spec.stored):
        raise CorruptFileError(
            f"{file.path} has {layer.num_experts} experts of {_written(layer.layout.specs)}; the model wants "
            f"{spec.num_experts} of {_written(spec.stored)}: the pack is of another architecture than its config.json"
        )


def _same(packed: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> bool:
    """Whether records of the one can be slots of the other; floating-point numbers are cast."""
    return len(packed) == len(wanted) and all(
        a.name == b.name
        and a.shape == b.shape
        and (a.dtype == b.dtype or (a.dtype.is_floating_point and b.dtype.is_floating_point))
        for a, b in zip(packed, wanted, strict=True)
    )


def _written(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {list(spec.shape)} {str(spec.dtype).removeprefix('torch.')}" for spec in specs)
