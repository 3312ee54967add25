"""Experts that csrc/ computes whole: which of a layer's tensors are what, and one expert of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moert.formats import TensorSpec
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.cpu_matrix import NUMBERS, matrix
from moert.kernels.gate import Gate


@dataclass(frozen=True)
class FfnLayout:
    """Where an expert's up and down products are among its tensors; biases are called "..._bias"."""

    up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False
    """Weights are [D, U] and [F, D]."""


class FusedExperts:
    """The experts of one layer, for the kernels that compute a step of them at once."""

    def __init__(
        self, layout: FfnLayout, gate: Gate, specs: Sequence[TensorSpec], weight_format: str = "plain"
    ) -> None:
        """`specs` are one expert's tensors as its module has them, `can_fuse` holds for them; `weight_format` is how
        they are stored: matrices in another one than plain lie as rows whatever the layout says."""
        shapes = {spec.name: spec.shape for spec in specs}
        width, hidden = shapes[layout.down] if layout.transposed else reversed(shapes[layout.down])
        self.layout = layout
        self._format = weight_format
        self._transposed = layout.transposed and weight_format == "plain"
        self.ffn = ExpertFfn(gate, hidden, width, specs[0].dtype)

    @staticmethod
    def can_fuse(specs: Sequence[TensorSpec]) -> bool:
        """Whether all tensors are of one type that the kernels read."""
        return len({spec.dtype for spec in specs}) == 1 and specs[0].dtype in NUMBERS

    def expert(self, weights: Mapping[str, torch.Tensor]) -> Expert:
        """One expert of these tensors, which it keeps alive."""
        layout = self.layout
        return self.ffn.expert(
            matrix(self._format, weights, layout.up, transposed=self._transposed),
            matrix(self._format, weights, layout.down, transposed=self._transposed),
            weights.get(f"{layout.up}_bias"),
            weights.get(f"{layout.down}_bias"),
        )
