"""torch and transformers as contenders of the CPU expert benchmark."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from cpu_layers import Layer, Shape, Step
from cpu_measure import Job

INT4_GROUP = 32


class TorchLinear:
    """Two `F.linear` an expert, over the very memory that moert reads."""

    def __init__(self, shape: Shape, layers: list[Layer]) -> None:
        self.name = "torch F.linear"
        self.detail = "bf16, an expert at a time"
        self.expert_bytes = 2.0 * shape.expert_numbers
        self.copies = len(layers)
        self._layers = layers

    def begin(self) -> None:
        pass

    def prepare(self, step: Step, copy: int) -> Job:
        layer = self._layers[copy]

        def product(x: torch.Tensor, expert: int, which: int) -> torch.Tensor:
            return F.linear(x, (layer.up, layer.down)[which][expert])

        return lambda: by_expert(step, product)

    def close(self) -> None:
        self._layers = []


class TorchGrouped(TorchLinear):
    """`torch.nn.functional.grouped_mm` over all experts, tokens sorted by expert."""

    def __init__(self, shape: Shape, layers: list[Layer]) -> None:
        super().__init__(shape, layers)
        self.name = "torch grouped_mm"
        self.detail = "bf16, all experts in one call"
        self._experts = shape.experts

    def prepare(self, step: Step, copy: int) -> Job:
        layer = self._layers[copy]
        picks = step.ids.shape[1]

        def job() -> torch.Tensor:
            ids, places = step.ids.flatten().sort(stable=True)
            ends = ids.bincount(minlength=self._experts).cumsum(0).to(torch.int32)
            tokens = places // picks
            gate, value = F.grouped_mm(step.x[tokens], layer.up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
            y = F.grouped_mm(F.silu(gate).mul_(value), layer.down.transpose(1, 2), offs=ends)
            out = torch.zeros(step.x.shape, dtype=torch.float32)
            return out.index_add_(0, tokens, y.float() * step.weights.flatten()[places, None])

        return job


class TorchQuantised:
    """An expert at a time through one of torch's products with packed integer weights."""

    def __init__(self, shape: Shape, layers: list[Layer], kind: str, copies: int) -> None:
        self.name, self.detail, pack = {
            "fbgemm": ("torch fbgemm", "quantized.linear_dynamic, int8, a scale a row", _pack_fbgemm),
            "int8pack": ("torch int8pack", "_weight_int8pack_mm, a scale a row", _pack_int8),
            "int4pack": ("torch int4pack", "_weight_int4pack_mm, asymmetric, groups of 32", _pack_int4),
        }[kind]
        scale_bytes = {"fbgemm": 4 / shape.hidden, "int8pack": 2 / shape.hidden, "int4pack": 4 / INT4_GROUP}[kind]
        self.expert_bytes = shape.expert_numbers * ((0.5 if kind == "int4pack" else 1.0) + scale_bytes)
        self._product = {"fbgemm": _run_fbgemm, "int8pack": _run_int8, "int4pack": _run_int4}[kind]
        self.copies = copies
        self._held = [[[pack(one) for one in stack] for stack in (layers[0].up, layers[0].down)] for _ in range(copies)]

    def begin(self) -> None:
        pass

    def prepare(self, step: Step, copy: int) -> Job:
        held = self._held[copy]
        return lambda: by_expert(step, lambda x, expert, which: self._product(x, held[which][expert]))

    def close(self) -> None:
        self._held = []


def by_expert(step: Step, product: Any) -> torch.Tensor:
    """The layer, an expert at a time. `product(x, expert, 0 or 1)` multiplies with its up or down projection."""
    out = torch.zeros(step.x.shape, dtype=torch.float32)
    if step.x.shape[0] == 1:
        for expert, weight in zip(step.ids[0].tolist(), step.weights[0].tolist(), strict=True):
            gate, value = product(step.x, expert, 0).chunk(2, dim=-1)
            out.add_(product(F.silu(gate).mul_(value), expert, 1), alpha=weight)
        return out
    picks = step.ids.shape[1]
    places = step.ids.flatten().argsort(stable=True)
    counts = step.ids.flatten().bincount().tolist()
    tokens, weights = (places // picks).split(counts), step.weights.flatten()[places].split(counts)
    for expert, count in enumerate(counts):
        if count:
            gate, value = product(step.x[tokens[expert]], expert, 0).chunk(2, dim=-1)
            y = product(F.silu(gate).mul_(value), expert, 1)
            out.index_add_(0, tokens[expert], y.float() * weights[expert][:, None])
    return out


def _row_scales(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().abs().amax(1).clamp_min(1e-8) / 127


def _pack_fbgemm(weight: torch.Tensor) -> Any:
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_channel(weight.float(), _row_scales(weight), zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(codes, None)


def _run_fbgemm(x: torch.Tensor, packed: Any) -> torch.Tensor:
    # It takes and gives fp32 only; h stays fp32, as nothing makes it round.
    y: torch.Tensor = torch.ops.quantized.linear_dynamic(x.float(), packed, reduce_range=False)
    return y


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _row_scales(weight).bfloat16()
    return (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _run_int8(x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch._weight_int8pack_mm(x, *packed)


def _pack_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.float().unflatten(-1, (-1, INT4_GROUP))
    least, most = groups.amin(-1), groups.amax(-1)
    scales = ((most - least) / 15).clamp_min(1e-8)
    codes = ((groups - least[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.int32).flatten(-2)
    scales_and_middles = torch.stack([scales, least + 8 * scales], -1).transpose(0, 1).contiguous().bfloat16()
    return torch._convert_weight_to_int4pack_for_cpu(codes, 2), scales_and_middles


def _run_int4(x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed[0], INT4_GROUP, packed[1])


class Transformers:
    """The library's own expert module of OLMoE under one of its implementations, over the memory that moert reads."""

    def __init__(self, shape: Shape, layers: list[Layer], implementation: str) -> None:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        self.name = f"transformers {implementation}"
        self.detail = "OlmoeExperts, bf16"
        self.expert_bytes = 2.0 * shape.expert_numbers
        self.copies = len(layers)
        config = OlmoeConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.picks,
        )
        config._experts_implementation = implementation
        self._modules = []
        for layer in layers:
            with torch.device("meta"):
                module = OlmoeExperts(config)
            module.gate_up_proj = torch.nn.Parameter(layer.up, requires_grad=False)
            module.down_proj = torch.nn.Parameter(layer.down, requires_grad=False)
            self._modules.append(module)

    def begin(self) -> None:
        pass

    def prepare(self, step: Step, copy: int) -> Job:
        module = self._modules[copy]
        # As the model does: its router gives weights in the dtype of the hidden states.
        weights = step.weights.to(step.x.dtype)

        def job() -> torch.Tensor:
            result: torch.Tensor = module(step.x, step.ids, weights)
            return result

        return job

    def close(self) -> None:
        self._modules = []
