"""Block sizes of the Triton kernels, by kernel, format and compute capability. Nothing is searched at run time.

`origin` of an entry says where it comes from: "compiled" entries have been compiled for the architecture without
spills and within its shared memory, and their speed was never measured; "measured" ones won a search on a GPU.
An architecture without an entry of its own takes that of the nearest older one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moert.kernels._launch import power_of_2_from
from moert.kernels.bank import BankMatrix

Origin = Literal["compiled", "measured"]


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernels for a few tokens cut their work; every number a power of two."""

    block_n: int
    """Rows of an expert's result that one program makes."""
    block_k: int
    """Numbers of a weight's row that are read at a time."""
    block_picks: int = 1
    """Picks of a token that are read at a time, in the down product."""
    num_warps: int = 4
    origin: Origin = "compiled"

    def fitted(self, matrix: BankMatrix, rows: int, picks: int = 1) -> DecodeConfig:
        """Blocks no larger than the work, and of whole groups."""
        return replace(
            self,
            block_n=min(self.block_n, power_of_2_from(rows)),
            block_k=max(matrix.group, min(self.block_k, power_of_2_from(matrix.k))),
            block_picks=min(self.block_picks, power_of_2_from(picks)),
        )


_TABLES: dict[tuple[str, str], dict[int, DecodeConfig]] = {
    ("decode_gate_up", "plain"): {80: DecodeConfig(8, 256)},
    ("decode_gate_up", "transposed"): {80: DecodeConfig(64, 32)},
    ("decode_gate_up", "int8"): {80: DecodeConfig(8, 512)},
    ("decode_gate_up", "int4"): {80: DecodeConfig(8, 512)},
    ("decode_gate_up", "fp8"): {80: DecodeConfig(8, 512)},
    ("decode_gate_up", "mxfp4"): {80: DecodeConfig(8, 512)},
    ("decode_down", "plain"): {80: DecodeConfig(4, 256, block_picks=4)},
    ("decode_down", "transposed"): {80: DecodeConfig(64, 16, block_picks=4)},
    ("decode_down", "int8"): {80: DecodeConfig(4, 256, block_picks=4)},
    # On 120 four picks at a time spill: int4 and mxfp4 with triton 3.6, fp8 with 3.7.
    ("decode_down", "int4"): {80: DecodeConfig(4, 256, block_picks=4), 120: DecodeConfig(8, 256, block_picks=2)},
    ("decode_down", "fp8"): {80: DecodeConfig(4, 256, block_picks=4), 120: DecodeConfig(8, 256, block_picks=2)},
    ("decode_down", "mxfp4"): {80: DecodeConfig(4, 256, block_picks=4), 120: DecodeConfig(8, 256, block_picks=2)},
}
"""Kernel and kind of weight -> compute capability -> entry."""


def decode_config(kernel: str, matrix: BankMatrix, capability: int) -> DecodeConfig:
    """The entry for "decode_gate_up" or "decode_down" with weights as `matrix` has them, not yet fitted to its size."""
    entries = _TABLES[kernel, decode_kind(matrix)]
    return entries[max(known for known in entries if known <= capability)]


def decode_kind(matrix: BankMatrix) -> str:
    """By which the table has weights such as `matrix`."""
    return "transposed" if matrix.transposed else matrix.format
