"""One expert's memory in the host tier, and its tensors there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert.formats import RecordLayout
from moert.kernels.cpu_ffn import Expert
from moert.runtime.fused import FusedExperts


class Slot:
    """A slot's bytes, and views of them in the layout of the record that was last put there.

    Most records of a layer have one layout, so that one expert after the other is found through the same views.
    """

    def __init__(self, memory: memoryview) -> None:
        """`memory` is the bank's, and must stay for as long as any view is in use."""
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.weights: Mapping[str, torch.Tensor] = {}
        self._layout: RecordLayout | None = None
        self._expert: Expert | None = None

    def lay_out(self, layout: RecordLayout) -> None:
        """Have `weights` be the tensors of a record of this layout from now on."""
        if self._layout is None or layout.offsets != self._layout.offsets or layout.specs != self._layout.specs:
            self.weights = layout.views(self.bytes)
            self._layout = layout
            self._expert = None

    def expert(self, fused: FusedExperts) -> Expert:
        """The weights as the layer's fused kernels take them."""
        if self._expert is None:
            self._expert = fused.expert(self.weights)
        return self._expert
