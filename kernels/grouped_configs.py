"""Block sizes of the grouped kernels, as `configs` has those of the others.

How many picks make a block follows from how many an expert can expect, so that its weights are read about once; the
table has the rest for each such size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moert.kernels._launch import power_of_2_from
from moert.kernels.bank import PACKED, BankMatrix
from moert.kernels.configs import Origin
from moert.kernels.dispatch import Blocks, check_tensor, most_blocks


@dataclass(frozen=True)
class GroupedConfig:
    """How a grouped kernel cuts its work; block sizes are powers of two."""

    block_n: int
    """Rows of a weight that one program multiplies; what comes of a gated expert's has half as many columns."""
    block_k: int
    """Numbers of a weight's row that are multiplied at a time."""
    swapped: bool = False
    """Weights on the wide side of the product, for blocks of few picks."""
    num_warps: int = 4
    num_stages: int = 3
    origin: Origin = "compiled"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def fitted(self, matrix: BankMatrix) -> GroupedConfig:
        """Blocks no larger than the work; tensor cores take no less than 16 by 16."""
        return replace(
            self,
            block_n=max(16, min(self.block_n, power_of_2_from(matrix.n))),
            block_k=max(32 if matrix.format in PACKED else 16, min(self.block_k, power_of_2_from(matrix.k))),
        )


def block_m_for(picks: int, experts: int, capability: int) -> int:
    """How many picks make a block: twice what an expert can expect, from 16 on, as in triton_kernels."""
    expected = 2 * picks // max(1, experts)
    return max(16, min(power_of_2_from(expected), _LARGEST[_like(capability)]))


def grouped_config(kernel: str, matrix: BankMatrix, block_m: int, dtype: torch.dtype, capability: int) -> GroupedConfig:
    """The entry for "gate_up" or "down" with such weights and activations, not yet fitted to their size."""
    table = _TABLES[kernel, grouped_kind(matrix, dtype)]
    entries = table[max(size for size in table if size <= max(block_m, 16))]
    return entries.get(capability) or entries.get(_like(capability)) or entries[80]


def check_blocks(blocks: Blocks, experts: tuple[int, int] | None, device: torch.device) -> tuple[int, int]:
    """The places in the dispatch's order from and up to which a launch works.

    Raises:
        ValueError: the blocks' tensors are of another dtype, layout, device or length than `dispatch` makes them, or
            there are no such places.
    """
    for name in ("picks", "slots", "first"):
        check_tensor(f"{name} of the blocks", getattr(blocks, name), 1, (torch.int32,), device)
    count, most = blocks.slots.numel(), blocks.most(blocks.order_length)
    if blocks.picks.numel() != count * blocks.block_m or count != most:
        raise ValueError(
            f"{blocks.picks.numel()} picks in {count} blocks of {blocks.block_m}: {blocks.tokens} tokens with "
            f"{blocks.top_k} picks of {blocks.order_length} experts ask for {most} blocks"
        )
    begin, end = (0, blocks.order_length) if experts is None else experts
    if not 0 <= begin <= end <= blocks.order_length:
        raise ValueError(f"experts={experts} must lie in the order of {blocks.order_length}")
    return begin, end


def grouped_kind(matrix: BankMatrix, dtype: torch.dtype) -> str:
    """By which the table has weights such as `matrix` with activations of `dtype`."""
    if dtype == torch.float32:
        return "fp32"
    return "transposed" if matrix.transposed else "plain" if matrix.format == "plain" else "codes"


def _like(capability: int) -> int:
    """90 for what has that much shared memory and multiplies larger tiles at a time, else 80."""
    return 90 if 90 <= capability < 110 else 80


_LARGEST = {80: 64, 90: 128}
"""Compute capability -> most picks of a block."""

_TABLES: dict[tuple[str, str], dict[int, dict[int, GroupedConfig]]] = {
    ("gate_up", "plain"): {
        16: {80: GroupedConfig(64, 128), 90: GroupedConfig(64, 128, swapped=True)},
        32: {80: GroupedConfig(64, 64), 90: GroupedConfig(128, 64, swapped=True)},
        64: {80: GroupedConfig(128, 64), 90: GroupedConfig(128, 64)},
        128: {80: GroupedConfig(128, 32, num_warps=8), 90: GroupedConfig(256, 64, num_warps=8)},
    },
    ("down", "plain"): {
        16: {80: GroupedConfig(64, 128), 90: GroupedConfig(64, 128, swapped=True)},
        32: {80: GroupedConfig(64, 64), 90: GroupedConfig(128, 64, swapped=True)},
        64: {80: GroupedConfig(128, 64), 90: GroupedConfig(128, 64)},
        128: {80: GroupedConfig(128, 32, num_warps=8), 90: GroupedConfig(256, 64, num_warps=8)},
    },
    ("gate_up", "transposed"): {
        16: {80: GroupedConfig(64, 64), 90: GroupedConfig(64, 64, swapped=True)},
        64: {80: GroupedConfig(128, 64), 90: GroupedConfig(128, 64)},
        128: {80: GroupedConfig(128, 32, num_warps=8), 90: GroupedConfig(256, 64, num_warps=8)},
    },
    ("down", "transposed"): {
        16: {80: GroupedConfig(64, 64), 90: GroupedConfig(64, 64, swapped=True)},
        64: {80: GroupedConfig(128, 64), 90: GroupedConfig(128, 64)},
        128: {80: GroupedConfig(128, 32, num_warps=8), 90: GroupedConfig(256, 64, num_warps=8)},
    },
    ("gate_up", "codes"): {
        16: {80: GroupedConfig(64, 64), 90: GroupedConfig(64, 64, swapped=True)},
        64: {80: GroupedConfig(64, 64), 90: GroupedConfig(128, 64)},
        128: {80: GroupedConfig(64, 64, num_warps=8), 90: GroupedConfig(128, 64, num_warps=8)},
    },
    ("down", "codes"): {
        16: {80: GroupedConfig(64, 64), 90: GroupedConfig(64, 64, swapped=True)},
        64: {80: GroupedConfig(64, 64), 90: GroupedConfig(128, 64)},
        128: {80: GroupedConfig(64, 64, num_warps=8), 90: GroupedConfig(128, 64, num_warps=8)},
    },
    ("gate_up", "fp32"): {
        16: {80: GroupedConfig(32, 32, num_stages=2)},
        64: {80: GroupedConfig(32, 32, num_warps=8, num_stages=2)},
        128: {80: GroupedConfig(16, 32, num_warps=8, num_stages=2)},
    },
    ("down", "fp32"): {
        16: {80: GroupedConfig(32, 32, num_stages=2)},
        64: {80: GroupedConfig(32, 32, num_warps=8, num_stages=2)},
        128: {80: GroupedConfig(16, 32, num_warps=8, num_stages=2)},
    },
}
"""Kernel and kind of weight -> smallest block of picks -> compute capability, or one it is like -> entry."""


@dataclass(frozen=True)
class Sample:
    """A configuration of the table that the compile check compiles."""

    label: str
    block_m: int
    config: GroupedConfig
    dtype: torch.dtype
    """Of the activations."""
    needs: tuple[str, ...]
    lacks: tuple[str, ...]


def samples(kernel: str, matrix: BankMatrix, capability: int) -> Iterator[Sample]:
    """Every configuration that weights such as `matrix` use there: with bf16 or their own dtype, or with fp32."""
    half = torch.float16 if matrix.codes.dtype == torch.float16 else torch.bfloat16
    plain = matrix.codes.dtype == torch.bfloat16 and not matrix.transposed
    for dtype in (half, torch.float32) if plain else (half,):
        for block_m in (16, 32, 64, 128):
            if block_m > _LARGEST[_like(capability)]:
                continue
            config = grouped_config(kernel, matrix, block_m, dtype, capability)
            needs: tuple[str, ...] = ()
            lacks: tuple[str, ...] = ("atomic",)
            if dtype == torch.float32:
                lacks += ("mma", "wgmma")  # which would round to 10 bits
            else:
                wide = capability == 90 and (config.swapped or block_m >= 64)
                needs = ("load128", "wgmma") if wide else ("load128", "mma")
            yield Sample(f"{block_m}{',fp32' if dtype == torch.float32 else ''}", block_m, config, dtype, needs, lacks)


def sample_blocks(block_m: int) -> Blocks:
    """Blocks without memory, of 4,096 tokens with 8 picks of 128 experts."""
    tokens, top_k, experts = 4096, 8, 128
    most = most_blocks(tokens * top_k, experts, block_m)

    def empty(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device="meta")

    return Blocks(empty(most * block_m), empty(most), empty(experts + 1), block_m, tokens, top_k)
