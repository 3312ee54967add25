"""How often each expert is chosen of late."""

from __future__ import annotations

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors._context import Context
from moert.predictors.base import Floats, Ints, Model, Predictor


class Frequency(Predictor):
    """Expects what was chosen often: for each expert an exponential moving average over tokens of whether it was.

    It is what the policy `ema` would evict by if it counted all uses alike, read as a probability. The same for all
    horizons.
    """

    gives_probabilities = True

    def __init__(self, model: Model, alpha: float = 0.03) -> None:
        """A predictor to which "of late" is 1 / `alpha` tokens.

        Raises:
            ConfigError: `alpha` is out of range.
        """
        super().__init__(model)
        self._alpha = np.float32(check_from_to("frequency", "alpha", alpha, 1e-6, 1.0))
        self._context = Context(model)
        self._rates = [
            np.full(experts, picks / max(1, experts), np.float32)
            for experts, picks in zip(model.num_experts, model.top_k, strict=True)
        ]

    def begin_sequence(self) -> None:
        self._context.begin_sequence()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._context.begin_pass(n_tokens, rows)

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        rates = self._rates[layer]
        for picks in self._context.observe(layer, experts):
            kept = picks[picks >= 0]
            if len(kept):
                rates *= 1 - self._alpha
                rates[kept] += self._alpha

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        rates = self._rates[layer]
        if not len(rates):
            return None
        n = self._context.rows if tokens else self._context.n_tokens
        return rates if n == 1 else 1 - (1 - np.minimum(rates, 1)) ** np.float32(n)
