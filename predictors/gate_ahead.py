"""The next layer's router, asked early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moert.predictors._checks import check_from_to
from moert.predictors.base import MOST_LAYERS, Floats, Model, Need, Prediction, Predictor

if TYPE_CHECKING:
    import torch


class GateAhead(Predictor):
    """Applies the routers of the next layers to the present hidden state (Eliseev and Mazur, arXiv 2312.17238).

    What a layer adds to the residual stream is small beside what is there already, so the next router would choose much
    the same if it were asked one layer early. Nothing is learned. Unlike there, the ranks go beyond the number of
    picks. The norm before the next router is not applied: its input is taken to be scaled like this layer's.
    """

    needs = frozenset({Need.HIDDEN, Need.ROUTERS})

    def __init__(self, model: Model, ahead: int = 1) -> None:
        from moert.predictors._ranking import Looks

        super().__init__(model)
        self.ahead = check_from_to("gate_ahead", "ahead", ahead, 1, MOST_LAYERS)
        self._looks = Looks()

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> Sequence[Prediction]:
        found: list[Prediction] = []
        self._looks.forget()
        if hidden is None:
            return found
        for later in range(layer + 1, min(layer + 1 + self.ahead, self.model.num_layers)):
            router = self.model.router(later)
            if router is not None and router.weight.shape[1] == hidden.shape[1]:
                prediction = self._looks.look(later, router, hidden)
                if prediction is not None:
                    found.append(prediction)
        return found

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        return None if tokens else self._looks.scores(layer, self.model.num_experts[layer])
