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


_GATE_UP: dict[tuple[str, int], DecodeConfig] = {
    ("plain", 80): DecodeConfig(block_n=8, block_k=256),
    ("transposed", 80): DecodeConfig(block_n=64, block_k=32),
    ("int8", 80): DecodeConfig(block_n=8, block_k=512),
    ("int4", 80): DecodeConfig(block_n=8, block_k=512),
    ("fp8", 80): DecodeConfig(block_n=8, block_k=512),
    ("mxfp4", 80): DecodeConfig(block_n=8, block_k=512),
}

_DOWN: dict[tuple[str, int], DecodeConfig] = {
    ("plain", 80): DecodeConfig(block_n=4, block_k=256, block_picks=4),
    ("transposed", 80): DecodeConfig(block_n=64, block_k=16, block_picks=4),
    ("int8", 80): DecodeConfig(block_n=4, block_k=256, block_picks=4),
    ("int4", 80): DecodeConfig(block_n=4, block_k=256, block_picks=4),
    ("fp8", 80): DecodeConfig(block_n=4, block_k=256, block_picks=4),
    ("mxfp4", 80): DecodeConfig(block_n=4, block_k=256, block_picks=4),
    # Four picks at a time spill here.
    ("fp8", 120): DecodeConfig(block_n=8, block_k=256, block_picks=2),
}

_TABLES = {"decode_gate_up": _GATE_UP, "decode_down": _DOWN}


def decode_config(kernel: str, matrix: BankMatrix, capability: int) -> DecodeConfig:
    """The entry for "decode_gate_up" or "decode_down" with weights as `matrix` has them, not yet fitted to its size."""
    kind = "transposed" if matrix.transposed else matrix.format
    table = _TABLES[kernel]
    known = [entry for name, entry in table if name == kind and entry <= capability]
    return table[kind, max(known)]
