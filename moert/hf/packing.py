"""`moert pack`: a checkpoint written anew, its experts in records that are used as they are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from moert.config import OffloadConfig
from moert.errors import ConfigError, UnsupportedModelError
from moert.formats import FormatChoice, RecordLayout
from moert.hf.fingerprint import fingerprint
from moert.hf.inspection import Plan, Planner, local_folder, plan_checkpoint
from moert.hf.loading import is_pack_config
from moert.hf.text import read_settings
from moert.kernels.cpu_matrix import FORMATS
from moert.runtime.dense_shard import INDEX, index_bytes, make_shards
from moert.runtime.layer import LayerSpec
from moert.runtime.pack_file import MANIFEST, PACK_VERSION, PackedLayer
from moert.runtime.pack_writer import PackWork, Progress, is_finished, write_parts
from moert.tiers.build_folder import BuildFolder, building
from moert.tiers.durable import write_whole
from moert.tiers.safetensors_file import read_entries

_SMALL_BYTES = 64 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt")
_NOT_COPIED = ("config.json", MANIFEST)
_NOT_DOWNLOADED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.ckpt", "original/*"]


@dataclass(frozen=True)
class Packed:
    """What `pack` has made."""

    folder: Path
    stored_as: str
    dtype: str
    """Of the weights that are not encoded."""
    num_layers: int
    expert_bytes: int
    """Bytes of all experts as they are in memory without a format."""
    packed_bytes: int
    """Bytes of all experts in the pack."""
    dense_bytes: int
    files: int
    files_kept: int
    """Files that an earlier run had finished."""


def pack(
    name: str,
    target: Path,
    *,
    stored_as: FormatChoice,
    moert_version: str,
    dtype: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Write the checkpoint `name` as a pack to `target`, one expert at a time. Blocks.

    All is built in a folder beside `target` and takes its name when it is complete; stopped at any point, the same call
    goes on where it was.

    Args:
        name: a folder, or an id of the hub, which is downloaded if it is not on this machine.
        stored_as: the format of the experts.
        moert_version: noted in every file.
        dtype: of weights in memory, as for `from_pretrained`; what the experts are encoded from.
        overwrite, restart: see `building`.

    Raises:
        ConfigError: the target is in the way, or was begun with other settings.
        UnsupportedModelError: the model cannot be packed so.
        CorruptFileError, TransferError, MoertError: the checkpoint or the disk is at fault, or another process packs.
    """
    folder = local_folder(name, revision)
    if folder is None:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=_NOT_DOWNLOADED))
    if os.path.realpath(target) == os.path.realpath(folder):
        raise ConfigError(f"{target} is the model itself; give another folder for its pack")
    settings = read_settings(str(folder))
    if is_pack_config(settings):
        raise UnsupportedModelError(f"{folder} is a pack already; pack the checkpoint that it was made from")
    plan = plan_checkpoint(folder, Planner(stored_as), dtype=dtype)
    _check_kernels(plan.planner.layers.specs, stored_as)
    source = fingerprint(folder, plan.files)
    work = _plan_files(plan, source["fingerprint"], moert_version)
    manifest: dict[str, Any] = {
        "pack_version": PACK_VERSION,
        "moert_version": moert_version,
        "format": str(stored_as),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "architecture": plan.architecture,
        "source": {"name": name, **source},
        "files": {part.file_name: part.file_bytes for part in work.parts},
    }
    with building(target, MANIFEST, overwrite=overwrite, restart=restart) as build:
        build.begin(manifest)
        kept = [part.file_name for part in work.parts if is_finished(build.path, part)]
        try:
            write_parts(build.path, work, kept, progress)
        except UnsupportedModelError:
            build.discard()  # numbers that the format cannot hold: there is nothing to go on with
            raise
        _write_small_files(build, folder, work, stored_as, dtype)
        build.finish()
    specs = plan.planner.layers.specs
    return Packed(
        folder=Path(target),
        stored_as=str(stored_as),
        dtype=manifest["dtype"],
        num_layers=len(specs),
        expert_bytes=sum(spec.num_experts * sum(tensor.nbytes for tensor in spec.tensors) for spec in specs),
        packed_bytes=sum(layer.num_experts * layer.record_bytes for layer, _, _ in work.layers),
        dense_bytes=sum(shard.data_bytes for shard in work.shards),
        files=len(work.parts),
        files_kept=len(kept),
    )


def _check_kernels(specs: Sequence[LayerSpec], stored_as: FormatChoice) -> None:
    """Refuse to encode experts that no kernel computes from their codes."""
    if stored_as.is_plain or stored_as.name not in FORMATS:
        return
    for spec in specs:
        if spec.fused is None:
            raise UnsupportedModelError(
                f"{spec.name} cannot be packed as {stored_as.name}: {spec.unfused_reason}, and only moert's fused "
                "kernels compute from quantised weights; use --format plain"
            )


def _plan_files(plan: Plan, source: str, moert_version: str) -> PackWork:
    planner = plan.planner
    assert planner.mapping is not None
    expert_keys = planner.mapping.expert_keys
    entries = [entry for path in plan.files for entry in read_entries(path).values() if entry.name not in expert_keys]
    layers = []
    for spec, records in zip(planner.layers.specs, planner.records, strict=True):
        assert spec.storage is not None
        layout = RecordLayout.packed(spec.stored)
        stored_as = str(spec.storage.choice)
        layer = PackedLayer(spec.index, spec.name, spec.num_experts, stored_as, layout, source, moert_version)
        layers.append((layer, spec, records))
    return PackWork(make_shards(entries, source), layers, planner.paths)


def _write_small_files(build: BuildFolder, folder: Path, work: PackWork, stored_as: FormatChoice, dtype: str) -> None:
    """Everything but the weights; config.json last, so that what is unfinished is no model."""
    write_whole(build.path / INDEX, index_bytes(work.shards))
    for path in sorted(folder.iterdir()):
        if _is_copied(path):
            write_whole(build.path / path.name, path.read_bytes())
        elif path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, build.path / path.name, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_bytes())
    if dtype != "auto":
        settings.pop("torch_dtype", None)
        settings["dtype"] = dtype
        _set_dtype(settings, dtype)
    settings["quantization_config"] = {
        "quant_method": OffloadConfig.quant_method,
        "pack_version": PACK_VERSION,
        "format": str(stored_as),
        "source": work.shards[0].source,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_whole(build.path / "config.json", text.encode())


def _is_copied(path: Path) -> bool:
    hidden_or_made = path.name.startswith(".") or path.name in _NOT_COPIED or path.name.endswith(".index.json")
    if hidden_or_made or not path.is_file() or path.name.endswith(_WEIGHTS):
        return False
    return path.stat().st_size <= _SMALL_BYTES


def _set_dtype(settings: dict[str, Any], dtype: str) -> None:
    """Have "auto" mean `dtype` in a configuration and its parts."""
    for key in ("dtype", "torch_dtype"):
        if key in settings:
            settings[key] = dtype
    for part in settings.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype)
