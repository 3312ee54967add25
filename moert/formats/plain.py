"""The weights as the model has them: bf16, fp16 or fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moert.formats.base import Format, TensorSpec


class Plain(Format):
    """Stored tensors are the expert's own tensors, bit for bit."""

    def stored(self, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(specs)

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(tensors)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(tensors)
