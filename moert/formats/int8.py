"""8-bit integers with an fp16 scale for every 32 numbers of a row: 8.5 bits a number."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert.formats._quantised import QuantisedFormat, half_scale, largest, reciprocal

GROUP = 32
LARGEST = 127


class Int8(QuantisedFormat):
    """Codes int8 [N, K] in -127..127, scales fp16 [N, K / 32]; no number is off by more than half its scale."""

    multiple = GROUP

    def matrix_specs(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"": ((n, k), torch.int8), "_scales": ((n, k // GROUP), torch.float16)}

    def encode_rows(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, GROUP))
        scales = half_scale(largest(groups), LARGEST)
        codes = (groups * reciprocal(scales.float())).round_().clamp_(-LARGEST, LARGEST)
        return {"": codes.to(torch.int8).flatten(1), "_scales": scales.squeeze(-1)}

    def decode_matrix(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales = parts["_scales"].float().unsqueeze(-1)
        return (parts[""].float().unflatten(1, (-1, GROUP)) * scales).flatten(1)
