"""8-bit floating point, e4m3, with an fp32 scale for every block of 128 rows and 128 columns: 8 bits a number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from moert.formats._quantised import QuantisedFormat, largest

BLOCK = 128
LARGEST = 448.0


class Fp8(QuantisedFormat):
    """Codes uint8 [N, K] that carry e4m3, scales fp32 [ceil(N / 128), ceil(K / 128)]."""

    def matrix_specs(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"": ((n, k), torch.uint8), "_scales": ((-(-n // BLOCK), -(-k // BLOCK)), torch.float32)}

    def encode_rows(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        n, k = weight.shape
        blocks = pad(weight, (0, -k % BLOCK, 0, -n % BLOCK)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        amax = largest(blocks, (1, 3))
        scales = (amax / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        codes = (blocks / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"": codes.flatten(2).flatten(0, 1)[:n, :k].contiguous(), "_scales": scales[:, 0, :, 0].contiguous()}

    def decode_matrix(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        n, k = parts[""].shape
        scales = parts["_scales"].repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
        return parts[""].view(torch.float8_e4m3fn).float() * scales
