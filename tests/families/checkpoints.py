"""Checkpoints of the tiny models, in the layouts that real ones come in, and what transformers makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .models import build, expert_bytes, greedy_tokens, inputs_for, logits, silent_experts, use_eager_experts
from .names import FAMILIES, model_class


@dataclass(frozen=True)
class Specimen:
    """A checkpoint with what transformers itself makes of it: eager experts, the dtype of the checkpoint."""

    family: str
    path: Path
    model: Any
    inputs: dict[str, Any]
    logits: torch.Tensor
    """[2, 12, vocabulary], fp32."""
    silent_logits: torch.Tensor
    """The logits with every routed expert contributing nothing."""
    tokens: torch.Tensor
    """8 greedy tokens of each prompt, [2, 8]."""
    expert_bytes: int


class Zoo:
    """Checkpoints below one folder, each family built, saved and run by transformers once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._specimens: dict[tuple[str, torch.dtype], Specimen] = {}

    def specimen(self, family: str, dtype: torch.dtype = torch.float32) -> Specimen:
        """The family's checkpoint under hub names. Its model is shared by the whole session: leave it as it is.

        A test that asks for a family which this transformers does not have is skipped.
        """
        if family not in FAMILIES:
            import pytest

            pytest.skip(f"{family} is not in this transformers")
        key = (family, dtype)
        if key not in self._specimens:
            path = self.root / f"{family}-{str(dtype).removeprefix('torch.')}"
            save(build(family, dtype=dtype), path)
            model = plain_load(family, path, dtype)
            inputs = inputs_for(family, model)
            with silent_experts(model):
                silent = logits(model, inputs)
            self._specimens[key] = Specimen(
                family=family,
                path=path,
                model=model,
                inputs=inputs,
                logits=logits(model, inputs),
                silent_logits=silent,
                tokens=greedy_tokens(model, inputs),
                expert_bytes=expert_bytes(model),
            )
        return self._specimens[key]

    def fresh(self, family: str, dtype: torch.dtype = torch.float32) -> Any:
        """The family's checkpoint loaded anew by transformers, for a test that changes the model."""
        return plain_load(family, self.specimen(family, dtype).path, dtype)


@cache
def zoo_at(root: Path) -> Zoo:
    """The one zoo of a folder, so that test modules share it."""
    return Zoo(root)


def plain_load(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers alone loads from the checkpoint, in eval mode with eager experts."""
    model = model_class(family).from_pretrained(path, dtype=dtype).eval()
    use_eager_experts(model)
    return model


def save(model: Any, path: Path, *, fused: bool = False, shard_bytes: int | None = None) -> None:
    """Write the model under hub names; `fused` writes transformers' own, with all experts of a layer in one tensor.

    Args:
        model: Written as it is.
        path: The folder of the checkpoint.
        fused: Keep transformers' names and shapes.
        shard_bytes: Split the checkpoint into files of about that size; None keeps one file.
    """
    options = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(path, save_original_format=not fused, **options)


def transpose_fused_experts(path: Path) -> None:
    """Rewrite fused experts as [E, in, out], the way the Qwen3-VL-MoE checkpoints on the hub hold them."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim == 3 and ".experts." in name:
                tensors[name] = tensor.transpose(1, 2).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
