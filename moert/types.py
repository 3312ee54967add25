"""Small values that every part of moert shares; no tensor and no file in here."""

from __future__ import annotations

from typing import NamedTuple


class ExpertId(NamedTuple):
    """One routed expert: the index of its experts module in the model (in module order) and its index within it."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer}"
