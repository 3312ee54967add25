"""4-bit floating point, e2m1, with a power of two for every 32 numbers of a row (OCP MX): 4.25 bits a number."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert.formats._quantised import QuantisedFormat, largest, pack_nibbles, unpack_nibbles

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_EXPONENT = 2
BIAS = 127


class Mxfp4(QuantisedFormat):
    """Codes 0..15, two a byte, uint8 [N, K / 2], bit 3 the sign; scales e8m0, uint8 [N, K / 32].

    The scale is the power of two that brings the largest number of a group into 4..8; above 6 it saturates.
    """

    multiple = GROUP

    def matrix_specs(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"": ((n, k // 2), torch.uint8), "_scales": ((n, k // GROUP), torch.uint8)}

    def encode_rows(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, GROUP))
        amax = largest(groups)
        # frexp's fraction is in 0.5..1, so its exponent is one more than that of the OCP rule.
        exponent = (torch.frexp(amax).exponent - 1 - LARGEST_EXPONENT).clamp_(min=-BIAS)
        exponent = torch.where(amax == 0, -BIAS, exponent)
        sizes = torch.ldexp(groups.abs(), -exponent)
        fine, middle, coarse = (sizes * 2).round(), sizes.round() + 2, (sizes / 2).round() + 4
        codes = torch.where(sizes < 2, fine, torch.where(sizes < 4, middle, coarse)).clamp_(max=7)
        codes = codes.to(torch.uint8) | (groups.signbit().to(torch.uint8) << 3)
        return {"": pack_nibbles(codes.flatten(1)), "_scales": (exponent + BIAS).to(torch.uint8).squeeze(-1)}

    def decode_matrix(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = torch.tensor([*VALUES, *(-value for value in VALUES)])
        groups = values[unpack_nibbles(parts[""]).int()].unflatten(1, (-1, GROUP))
        scales = parts["_scales"].unsqueeze(-1)
        powers = torch.exp2(scales.double() - BIAS).float()  # exp2 of fp32 is not exact, and rounds 2^-127 to 0
        return (groups * torch.where(scales == 255, torch.nan, powers)).flatten(1)
