"""4-bit integers with an fp16 scale for every 32 or 128 numbers of a row: 4.5 or 4.13 bits a number."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert.errors import ConfigError
from moert.formats._quantised import (
    QuantisedFormat,
    half_scale,
    largest,
    pack_nibbles,
    reciprocal,
    unpack_nibbles,
)

MIDDLE = 8
LAST = 15
STEPS = (8.0, 7.5, 8.6)
"""Symmetric: how many steps a group's largest number may be away. More than 8 cut it off, for the others' sake."""

SHRINK = (1.0, 0.93, 0.86)
"""With zero points: which parts of the range of a group may be covered."""


class Int4(QuantisedFormat):
    """Codes 0..15, two a byte, uint8 [N, K / 2], and scales fp16 [N, K / group]; a number is (code - zero) * scale.

    Symmetric: the zero is 8, and a scale may be negative, so that the largest number of a group, of either sign, has
    the side with one code more. Else zeros are uint8 [N, K / group], 0..15. Of a few scales for each group, the one is
    taken that leaves the smallest squared error.
    """

    def __init__(self, group: int = 32, symmetric: bool = True) -> None:
        if group not in (32, 128):
            raise ConfigError(f"int4 has groups of 32 or 128 numbers, not {group}")
        self.group, self.symmetric = group, symmetric
        self.multiple = group

    def matrix_specs(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        of_groups = (n, k // self.group)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "": ((n, k // 2), torch.uint8),
            "_scales": (of_groups, torch.float16),
        }
        return specs if self.symmetric else {**specs, "_zeros": (of_groups, torch.uint8)}

    def encode_rows(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, self.group))
        amax = largest(groups)
        tried = self._symmetric(groups, amax) if self.symmetric else self._with_zeros(groups)
        least = torch.full_like(amax, torch.inf)
        best_scale = torch.zeros_like(amax, dtype=torch.float16)
        best_zero = torch.full_like(amax, MIDDLE)
        best_codes = torch.empty_like(groups, dtype=torch.uint8)
        for scale, zero in tried:
            codes = (groups * reciprocal(scale.float())).round_().add_(zero).clamp_(0, LAST)
            error = ((codes - zero) * scale.float() - groups).square_().sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best_codes = torch.where(better, codes.to(torch.uint8), best_codes)
        parts = {"": pack_nibbles(best_codes.flatten(1)), "_scales": best_scale.squeeze(-1)}
        return parts if self.symmetric else {**parts, "_zeros": best_zero.squeeze(-1).to(torch.uint8)}

    def decode_matrix(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        groups = unpack_nibbles(parts[""]).float().unflatten(1, (-1, self.group))
        zeros = parts["_zeros"].float().unsqueeze(-1) if "_zeros" in parts else MIDDLE
        return ((groups - zeros) * parts["_scales"].float().unsqueeze(-1)).flatten(1)

    def _symmetric(self, groups: torch.Tensor, amax: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sign = torch.where(groups.amax(-1, keepdim=True) == amax, -1.0, 1.0).half()
        zero = torch.full_like(amax, MIDDLE)
        return [(half_scale(amax, steps) * sign, zero) for steps in STEPS]

    def _with_zeros(self, groups: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        low = groups.amin(-1, keepdim=True).clamp_(max=0)
        span = groups.amax(-1, keepdim=True).clamp_(min=0) - low
        tried = []
        for part in SHRINK:
            scale = half_scale(span * part, LAST)
            zero = (-low * part * reciprocal(scale.float())).round_().clamp_(0, LAST)
            tried.append((scale, zero))
        return tried
