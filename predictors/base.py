"""The interface of a predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Prediction(NamedTuple):
    """The experts that a layer is expected to ask for at its next step, the likeliest first."""

    layer: int
    experts: list[int]
    ranks: list[int]
    """Of each expert: 0 if some token's first guess is this one, 1 if it is some token's second, and so on."""


class Router(NamedTuple):
    """What decides a layer's picks; tensors of the model, read only."""

    weight: torch.Tensor
    """[E, D], in the model's dtype or fp32."""
    bias: torch.Tensor | None = None
    """[E], added to the products."""
    correction: torch.Tensor | None = None
    """[E], added to the sigmoid of the logits, for the choice alone (DeepSeek-V3)."""
    num_experts: int = 0
    """Those that have weights; the ids after them are never predicted."""
    top_k: int = 1


class Predictor(ABC):
    """Guesses at the experts that layers will need. It owns no weights, moves nothing and decides nothing.

    The same object runs live and over a recording. In the order of the model's layers it is told what their blocks and
    their experts are given, and may answer either with what it expects.
    """

    def __init__(self, routers: Sequence[Router | None]) -> None:
        """A predictor for a model of `len(routers)` layers; None where a layer's router is unknown."""
        self.routers = routers

    @abstractmethod
    def step(self, layer: int, hidden: torch.Tensor) -> Sequence[Prediction]:
        """The experts of `layer` are to be computed: what will later layers need, nearest first? Blocks while it
        computes.

        Args:
            layer: whose picks have just been made.
            hidden: [T, D] what its experts are given; not written to.
        """

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        """The block that holds `layer` begins: what will its experts be? None: nothing to add to what `step` said.

        Not called for models whose blocks are not known.

        Args:
            layer: whose picks are made after this block's attention.
            residual: [T, D] what the block is given; not written to.
        """
        return None
