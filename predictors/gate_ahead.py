"""The next layer's router, asked early."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.predictors._ranking import rank
from moert.predictors.base import Prediction, Predictor, Router


class GateAhead(Predictor):
    """Applies the routers of the next layers to the present hidden state (Eliseev and Mazur, arXiv 2312.17238).

    What a layer adds to the residual stream is small beside what is there already, so the next router would choose much
    the same if it were asked one layer early. Nothing is learned. Unlike there, the ranks go beyond the number of
    picks. The norm before the next router is not applied: its input is taken to be scaled like this layer's.
    """

    def __init__(self, routers: Sequence[Router | None], ahead: int = 1) -> None:
        super().__init__(routers)
        self._ahead = ahead

    def step(self, layer: int, hidden: torch.Tensor) -> Sequence[Prediction]:
        found = []
        for later in range(layer + 1, min(layer + 1 + self._ahead, len(self.routers))):
            router = self.routers[later]
            if router is not None and router.weight.shape[1] == hidden.shape[1]:
                found.append(rank(later, router, hidden))
        return found
