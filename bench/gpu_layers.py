"""Layers for the GPU benchmark: random experts of every format, routings, transformers' layer on the same weights, and
what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moert.kernels import reference
from moert.kernels.bank import Bank, BankMatrix, bank_matrix
from moert.kernels.gate import Gate

FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")

TOLERANCE = 1e-2
"""Of the length of the right output: bf16 holds 0.4 % of a number, and h and the output are each rounded to it."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer."""

    hidden: int
    width: int
    experts: int
    top_k: int

    @property
    def operations(self) -> int:
        """Of one pick."""
        return 6 * self.hidden * self.width


QWEN3_30B = Shape(2048, 768, 128, 8)
TINY = Shape(64, 32, 8, 2)


@dataclass(frozen=True)
class Setting:
    """Where and at which size a step of the session runs."""

    device: torch.device
    shape: Shape
    trace: Path | None = None
    """Of recorded routing; None: it is synthetic."""

    @property
    def is_dry(self) -> bool:
        """Under the interpreter, where times mean nothing."""
        return self.device.type == "cpu"

    def of(self, real: Sequence[int], dry: Sequence[int]) -> Sequence[int]:
        return dry if self.is_dry else real


@dataclass(frozen=True)
class Routing:
    """A step's input."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    """fp32, as most families' routers give it."""

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def distinct(self) -> int:
        """Experts that are needed. Waits for the device."""
        return int(self.ids.unique().numel())


def _numbers(choice: str, setting: Setting, n: int, k: int) -> dict[str, torch.Tensor]:
    experts, device = setting.shape.experts, setting.device

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (experts, *shape), dtype=torch.uint8, device=device)

    def scales(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return (torch.rand(experts, *shape, device=device) + 0.5).mul_(k**-0.5 / 8).to(dtype)

    if choice == "bf16":
        return {"w": torch.randn(experts, n, k, dtype=torch.bfloat16, device=device).mul_(k**-0.5)}
    if choice == "int8":
        return {"w": codes(n, k).view(torch.int8), "w_scales": scales(torch.float16, n, k // 32).div_(16)}
    if choice == "int4":
        return {"w": codes(n, k // 2), "w_scales": scales(torch.float16, n, k // 32)}
    if choice == "fp8":
        # Without the bit that all of NaN's codes have.
        return {"w": codes(n, k).bitwise_and_(0xF7), "w_scales": scales(torch.float32, -(-n // 128), -(-k // 128))}
    exponents = torch.randint(118, 123, (experts, n, k // 32), dtype=torch.uint8, device=device)
    return {"w": codes(n, k // 2), "w_scales": exponents}


def make_bank(choice: str, setting: Setting) -> Bank:
    """A layer's experts with random weights, all in slots."""
    shape = setting.shape
    name = "plain" if choice == "bf16" else choice
    up = bank_matrix(name, _numbers(choice, setting, 2 * shape.width, shape.hidden), "w")
    down = bank_matrix(name, _numbers(choice, setting, shape.hidden, shape.width), "w")
    return Bank(up, down, Gate())


def expert_bytes(bank: Bank) -> int:
    """Of one expert."""
    return sum(matrix_bytes(matrix) for matrix in (bank.up, bank.down)) // bank.slots


def matrix_bytes(matrix: BankMatrix) -> int:
    return sum(part.nbytes for part in (matrix.codes, matrix.scales, matrix.zeros) if part is not None)


def slot_table(setting: Setting) -> torch.Tensor:
    """Each expert in the slot of its number."""
    return torch.arange(setting.shape.experts, dtype=torch.int32, device=setting.device)


def make_routing(setting: Setting, tokens: int) -> Routing:
    """Random tokens with distinct picks."""
    shape = setting.shape
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=setting.device)
    weights, ids = torch.rand(tokens, shape.experts, device=setting.device).topk(shape.top_k)
    return Routing(x, ids, weights / weights.sum(1, keepdim=True))


def exact(bank: Bank, routing: Routing, slot_of: torch.Tensor) -> torch.Tensor:
    """fp64 [T, D] on the CPU, for few tokens."""
    step = routing.ids, routing.weights, slot_of
    return reference.decode_down(bank, reference.decode_gate_up(bank, routing.x, *step), *step)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The length of the difference over that of what is right; infinite if anything is not a number."""
    difference = (got.double().cpu() - wanted).norm() / wanted.norm()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def few_of(routing: Routing, most: int = 2) -> tuple[torch.Tensor, Routing]:
    """Some tokens of a step, by their places, and their step: enough to tell whether all of it is right."""
    places = torch.linspace(0, routing.tokens - 1, min(most, routing.tokens)).round().long().unique()
    places = places.to(routing.x.device)
    return places, Routing(routing.x[places], routing.ids[places], routing.weights[places])


def transformers_experts(bank: Bank, implementation: str, setting: Setting) -> Any:
    """Transformers' module for Qwen3-MoE on the very weights of a bf16 bank; `implementation` is what it runs by."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = setting.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(bank.up.codes, requires_grad=False)
    module.down_proj = torch.nn.Parameter(bank.down.codes, requires_grad=False)
    return module
