"""What a checkpoint holds and what it will take to run it, from its configuration and file headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedModel

from moert.config import OffloadConfig
from moert.errors import CorruptFileError
from moert.formats import FormatChoice
from moert.hf.checkpoint import CheckpointMap
from moert.hf.layers import Layers
from moert.hf.loading import check_folder, check_not_packed, model_class
from moert.hf.quantizer import MoertQuantizer
from moert.hf.text import read_settings
from moert.plan import LayerNeed
from moert.runtime.records import Record
from moert.tiers.safetensors_file import read_entries, read_index


@dataclass(frozen=True)
class Inspection:
    """The experts of a checkpoint as moert would keep them."""

    architecture: str
    dtype: str
    """In memory."""
    needs: tuple[LayerNeed, ...]
    """One entry for each layer of experts."""
    dense_bytes: int
    """Everything that is no expert: always in memory."""
    is_direct: bool
    """Whether every expert can be used as it lies in the file."""
    files: tuple[str, ...]
    """Where the experts are."""
    stored_as: tuple[str, ...]
    """The format that they are packed in; empty where they are not."""
    gates: tuple[str, ...]
    """The activations of the layers that the fused kernels compute; each once."""
    unfused_reasons: tuple[str, ...]
    """Why other layers' experts are computed one by one, through their module; each once."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(need.num_experts * need.expert_bytes for need in self.needs)


class Planner(MoertQuantizer):
    """Goes as far as the plan that loading begins with."""

    def __init__(self, stored_as: FormatChoice | None = None) -> None:
        """`stored_as` is the format that an ordinary checkpoint's experts are to get; None: their own."""
        super().__init__(OffloadConfig())
        self._stored_as = stored_as

    def _reserve(self, model: PreTrainedModel, experts: list[str]) -> None:
        return  # whoever plans asks for it himself

    def _plan(
        self,
        model: PreTrainedModel,
        layers: Layers,
        paths: list[str],
        records: list[list[Record]],
        mapping: CheckpointMap | None = None,
    ) -> None:
        self.layers = layers
        self.paths = paths
        self.records = records
        self.mapping = mapping


@dataclass(frozen=True)
class Plan:
    """A checkpoint as loading would begin with it."""

    architecture: str
    dtype: torch.dtype
    """In memory."""
    files: list[str]
    """Its safetensors files."""
    planner: Planner
    model: PreTrainedModel
    """On the meta device, without its experts."""


def local_folder(path_or_id: str, revision: str | None = None) -> Path | None:
    """The folder of a checkpoint that is on this machine: itself, or the hub cache's copy; None if there is none."""
    if os.path.isdir(path_or_id):
        return Path(path_or_id)
    try:
        return Path(snapshot_download(path_or_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def shard_files(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint's folder.

    Raises:
        CorruptFileError: a file of the index is missing.
    """
    indexed = read_index(folder)
    return indexed if indexed is not None else sorted(str(path) for path in folder.glob("*.safetensors"))


def inspection_of(plan: Plan) -> Inspection:
    """What a plan says of its checkpoint."""
    planner, model = plan.planner, plan.model
    return Inspection(
        architecture=plan.architecture,
        dtype=str(plan.dtype).removeprefix("torch."),
        files=tuple(planner.paths),
        stored_as=_each_once(str(spec.storage.choice) for spec in planner.layers.specs if spec.storage is not None),
        needs=_needs(planner.layers, planner.records),
        dense_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        is_direct=all(record.is_direct for layer in planner.records for record in layer),
        gates=_each_once(spec.fused.ffn.gate.activation for spec in planner.layers.specs if spec.fused is not None),
        unfused_reasons=_each_once(spec.unfused_reason for spec in planner.layers.specs if spec.unfused_reason),
    )


def plan_checkpoint(folder: Path, planner: Planner, *, dtype: str = "auto") -> Plan:
    """Have `planner` plan the checkpoint in `folder`; reads headers, no weights.

    Args:
        dtype: as for `from_pretrained`.

    Raises:
        ConfigError, UnsupportedModelError, CorruptFileError, TransferError: loading would raise the same.
    """
    check_folder(folder)
    settings = read_settings(str(folder))
    check_not_packed(settings)
    files = shard_files(folder)
    if not files:
        raise CorruptFileError(f"{folder} has a config.json but no weights; finish the download")
    cls = model_class(settings)
    config = (getattr(cls, "config_class", None) or AutoConfig).from_pretrained(str(folder))
    memory_dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or _first_dtype(files)
    with torch.device("meta"):
        model = (getattr(cls, "from_config", None) or cls._from_config)(config, dtype=memory_dtype)
    architecture = type(model).__name__
    planner._process_model_before_weight_loading(model, dtype=memory_dtype, checkpoint_files=files)
    return Plan(architecture, memory_dtype, files, planner, model)


def _first_dtype(files: Sequence[str]) -> torch.dtype:
    """What transformers takes for the dtype of a checkpoint whose configuration does not say."""
    dtypes = (entry.torch_dtype for entry in read_entries(files[0]).values())
    return next((dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), torch.float32)


def _each_once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _needs(layers: Layers, records: Sequence[Sequence[Record]]) -> tuple[LayerNeed, ...]:
    return tuple(
        LayerNeed(
            name=spec.name,
            num_experts=spec.num_experts,
            slot_bytes=max(record.slot_bytes for record in layer),
            expert_bytes=spec.expert_bytes,
            top_k=spec.top_k,
        )
        for spec, layer in zip(layers.specs, records, strict=True)
    )
