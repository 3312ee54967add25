"""What the tokens before chose."""

from __future__ import annotations

import numpy as np

from moert.predictors.base import Floats, Ints, Model, Predictor


class PreviousToken(Predictor):
    """Expects a layer to choose again what it chose for the token before; next come the picks of the one before that,
    and so on, each token's in the router's order.

    Text changes its subject slowly, so neighbouring tokens share experts far more often than chance has them do. The
    same for all horizons. It starts anew with each sequence.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._passes = [0] * model.num_layers
        self._latest = [np.zeros(experts, np.float32) for experts in model.num_experts]
        """Of each expert, the number of the pass that chose it last, more for the better picks; 0: none."""

    def begin_sequence(self) -> None:
        self._passes = [0] * self.model.num_layers
        for latest in self._latest:
            latest[:] = 0

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        latest = self._latest[layer]
        for place in range(experts.shape[1] - 1, -1, -1):
            ids = experts[:, place]
            kept = ids[(ids >= 0) & (ids < len(latest))]
            latest[kept] = self._passes[layer] + 1 - place / experts.shape[1]
        self._passes[layer] += 1
        if self._passes[layer] >= 1 << 16:  # where single floats would begin to take neighbours for the same
            latest -= 1 << 15
            np.maximum(latest, 0, out=latest)
            self._passes[layer] -= 1 << 15

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if not self._passes[layer] or not len(self._latest[layer]):
            return None
        scores: Floats = np.float32(1) / (self._passes[layer] + 1 - self._latest[layer]) * (self._latest[layer] > 0)
        return scores
