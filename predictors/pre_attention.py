"""A layer's experts, told from what its block is given, before the attention."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from moert.predictors._ranking import rank
from moert.predictors._trained import load_trained
from moert.predictors.base import Floats, Model, Need, Prediction, Predictor, Router

EPS = 1e-12
"""Added to a mean square, which may be 0."""


class PreAttention(Predictor):
    """One trained linear map a layer, from the residual stream before its attention to its experts (Zhu et al., arXiv
    2511.10676).

    The prediction comes when the layer's block begins, so the attention is the time that is left; unlike gate-ahead it
    is there for the first layer too. Each token is scaled to a mean square of 1, which stands for the norm before the
    attention, and `sigmoid(W x + b)` is the probability that it chooses each expert. As there, training ranks the
    chosen experts above all others. Changed: there are two maps with nothing in between, which are one of their rank;
    here is one of full rank, and the cross-entropy of each expert is added to the ranking loss, so that probabilities
    are calibrated.

    Memory: L * E * D numbers of 4 bytes; a look multiplies with E * D of them.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FILE, Need.HIDDEN})
    gives_probabilities: ClassVar[bool] = True

    def __init__(self, model: Model, file: str = "") -> None:
        """
        Args:
            model: the model; the file must be for it.
            file: what `moert train-predictor` wrote.

        Raises:
            ConfigError: no file, one of another predictor or model.
            CorruptFileError: it is malformed.
            TransferError: it cannot be read.
        """
        super().__init__(model)
        trained = load_trained(file, "pre_attention", model)
        layers, most = len(trained.about.num_experts), max(trained.about.num_experts)
        weight = torch.from_numpy(trained.tensor("weight", np.float16, (layers, most, None)).astype(np.float32))
        bias = torch.from_numpy(trained.tensor("bias", np.float32, (layers, most)).copy())
        self._maps = [
            Router(weight[layer, :n], bias[layer, :n], None, n, model.top_k[layer])
            for layer, n in enumerate(model.num_experts)
        ]
        self._entered: tuple[int, Floats] | None = None

    def begin_sequence(self) -> None:
        self._entered = None

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        self._entered = None
        known = self._maps[layer]
        if residual.shape[1] != known.weight.shape[1] or not len(residual):
            return None
        scaled = scale(residual)
        logits = torch.nn.functional.linear(scaled, known.weight, known.bias)
        scores: Floats = (1 - (1 - logits.sigmoid()).prod(dim=0)).numpy()
        if not np.isfinite(scores).all():
            return None
        self._entered = (layer, scores)
        if len(residual) == 1:
            return self.best(layer, scores)
        found = rank(layer, known, scaled)
        return found._replace(probabilities=scores[found.experts].tolist())

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if tokens or self._entered is None or self._entered[0] != layer:
            return None
        return self._entered[1]


def scale(residual: torch.Tensor) -> torch.Tensor:
    """Each row of [..., D] over the root of its mean square, in fp32."""
    residual = residual.float()
    return residual * (residual.square().mean(-1, keepdim=True) + EPS).rsqrt()
