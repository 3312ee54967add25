"""How good predictions are, token by token and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moert.trace.sequence import NO_EXPERT

WIDTHS = (1.0, 1.5, 2.0)
"""So many times a layer's picks are predicted."""


@dataclass(frozen=True)
class Measures:
    """Over all tokens of all layers that ran; `recall[1.5]` is that of 1.5 * k predicted experts, rounded down."""

    recall: dict[float, float]
    """Of the experts that were chosen: how many were predicted."""
    precision: dict[float, float]
    """Of those that were predicted: how many were chosen."""
    exact: float
    """Tokens and layers of which the best k are all the experts chosen and no other."""
    recall_by_layer: list[float]
    """At k; NaN for a layer that never ran."""
    recall_after_first: float
    """At k, without the first layer, which what looks at the layer before cannot predict."""
    n_tokens: int


class Tally:
    """Counts towards `Measures`."""

    def __init__(self, top_k: tuple[int, ...]) -> None:
        self._sizes = [[max(1, int(width * k)) for k in top_k] for width in WIDTHS]
        layers = len(top_k)
        self._right = np.zeros((len(WIDTHS), layers), dtype=np.int64)
        self._predicted = np.zeros((len(WIDTHS), layers), dtype=np.int64)
        self._chosen = np.zeros(layers, dtype=np.int64)
        self._exact = np.zeros(layers, dtype=np.int64)
        self._ran = np.zeros(layers, dtype=np.int64)
        self._tokens = 0

    def add(self, scores: npt.NDArray[np.float32], experts: npt.NDArray[np.int32]) -> None:
        """Scores [T, L, E], higher is likelier, below 0 for no expert at all, and what was chosen [T, L, K]."""
        self._tokens += len(experts)
        there = experts != NO_EXPERT
        n_chosen = there.sum(axis=2)
        most = min(max(map(max, self._sizes)), scores.shape[2])
        order = np.argsort(-scores, axis=2, kind="stable")[..., :most]
        right = ((order[..., None] == experts[:, :, None]) & there[:, :, None]).any(axis=3).cumsum(axis=2)
        ran = n_chosen > 0
        self._ran += ran.sum(axis=0)
        self._chosen += n_chosen.sum(axis=0)
        for place, sizes in enumerate(self._sizes):
            for layer, size in enumerate(sizes):
                size = min(size, most)
                found = right[:, layer, size - 1]
                self._right[place, layer] += int(found.sum())
                self._predicted[place, layer] += size * int(ran[:, layer].sum())
                if place == 0:
                    full = ran[:, layer] & (found == n_chosen[:, layer]) & (n_chosen[:, layer] == size)
                    self._exact[layer] += int(full.sum())

    def result(self) -> Measures:
        """What has been counted; NaN where there was nothing to count."""
        with np.errstate(invalid="ignore", divide="ignore"):
            by_layer = self._right[0] / self._chosen
            recall = self._right.sum(axis=1) / self._chosen.sum()
            precision = self._right.sum(axis=1) / self._predicted.sum(axis=1)
            return Measures(
                dict(zip(WIDTHS, recall.tolist(), strict=True)),
                dict(zip(WIDTHS, precision.tolist(), strict=True)),
                float(self._exact.sum() / self._ran.sum()),
                by_layer.tolist(),
                float(self._right[0, 1:].sum() / self._chosen[1:].sum()),
                self._tokens,
            )
