"""Banks and steps without memory, in the sizes of a real model: what the compile check compiles kernels for."""

from __future__ import annotations

import torch

from moert.kernels.bank import Bank, bank_matrix
from moert.kernels.gate import Gate

HIDDEN, WIDTH, EXPERTS, PICKS = 2048, 768, 128, 8
"""Of Qwen3-30B-A3B."""


def _tensors(kind: str, n: int, k: int) -> tuple[str, dict[str, torch.Tensor]]:
    """Format and tensors of one weight."""
    half, codes = torch.float16, torch.uint8
    stored: dict[str, tuple[str, dict[str, tuple[torch.dtype, int, int]]]] = {
        "bf16": ("plain", {"w": (torch.bfloat16, n, k)}),
        "transposed": ("plain", {"w": (torch.bfloat16, k, n)}),
        "int8": ("int8", {"w": (torch.int8, n, k), "w_scales": (half, n, k // 32)}),
        "int4": ("int4", {"w": (codes, n, k // 2), "w_scales": (half, n, k // 32)}),
        "int4 zeros": (
            "int4",
            {"w": (codes, n, k // 2), "w_scales": (half, n, k // 128), "w_zeros": (codes, n, k // 128)},
        ),
        "fp8": ("fp8", {"w": (codes, n, k), "w_scales": (torch.float32, n // 128, k // 128)}),
        "mxfp4": ("mxfp4", {"w": (codes, n, k // 2), "w_scales": (codes, n, k // 32)}),
    }
    name, parts = stored[kind]
    return name, {part: _empty(dtype, EXPERTS, *shape) for part, (dtype, *shape) in parts.items()}


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


GATES = {
    "mxfp4": Gate(interleaved=True, alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0),
    "int4 zeros": Gate(gated=False, activation="relu2"),
    "transposed": Gate(activation="gelu_tanh"),
    "int8": Gate(activation="gelu"),
}
"""Other than SiLU, gated: between them they reach what a gate may be."""


def sample_banks() -> dict[str, Bank]:
    """A bank of every format by its name; the one in mxfp4 is laid out as gpt-oss is, with biases."""
    banks = {}
    for kind in ("bf16", "transposed", "int8", "int4", "int4 zeros", "fp8", "mxfp4"):
        gate = GATES.get(kind, Gate())
        matrices = []
        for n, k in ((WIDTH * (2 if gate.gated else 1), HIDDEN), (HIDDEN, WIDTH)):
            name, tensors = _tensors(kind, n, k)
            if kind == "mxfp4":
                tensors["w_bias"] = _empty(torch.bfloat16, EXPERTS, n)
            matrices.append(bank_matrix(name, tensors, "w", transposed=kind == "transposed"))
        up, down = matrices
        banks[kind] = Bank(up, down, gate)
    return banks


def sample_step(
    bank: Bank, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], ids, weights and the slot table of a step."""
    return (
        _empty(dtype, tokens, bank.hidden),
        _empty(torch.int64, tokens, PICKS),
        _empty(torch.float32, tokens, PICKS),
        _empty(torch.int32, EXPERTS),
    )
