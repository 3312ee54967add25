"""What predictions are held against: the picks that came."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RATIOS = (1.0, 1.5, 2.0)
"""How many experts are named, in picks of a token (k)."""
BINS = 10
"""Of the reliability plot."""


@dataclass(frozen=True)
class Row:
    """How good one predictor is at one horizon. Rates are from 0 to 1, None where nothing was named or counted."""

    ahead_layers: int
    """0: the layer whose block begins, or, with `ahead_tokens`, any layer."""
    ahead_tokens: int
    cells: int
    """Times that a token ran a layer which could have been predicted."""
    answered: float
    """Share of these for which the predictor said anything."""
    recall: dict[str, float]
    """Of the picks, the share that was named, by how many experts are named; where nothing was said none was."""
    precision: dict[str, float | None]
    """Of the experts named, the share that was picked."""
    exact: float
    """Share of cells whose picks were named, and no other."""
    calibration_error: float | None
    """Of the 2k likeliest experts: how far the probability that is named and the share that was picked are apart, on
    average over ten bins by their size. None: the predictor gives no probabilities."""
    reliability: list[tuple[float, float, int]] | None
    """Of each bin the mean probability, the share that was picked, and how many there were."""
    ask_us: float
    """Microseconds that an answer took, besides `Result.observe_us`."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Tally:
    """Sums over the cells of one horizon."""

    def __init__(self, top_k: npt.NDArray[np.int64], are_probabilities: bool) -> None:
        """`top_k` [L]: picks of a token in each layer."""
        self._top_k = top_k
        self._named = np.stack([(ratio * top_k).astype(np.int64) for ratio in RATIOS])
        """[3, L]"""
        self._are_probabilities = are_probabilities
        self.cells = self._answered = self._picks = self._exact = 0
        self._hits = np.zeros(len(RATIOS), np.int64)
        self._offered = np.zeros(len(RATIOS), np.int64)
        self._bins = np.zeros((BINS, 3))
        self.ask_ns = 0
        self.asks = 0

    def add(
        self,
        layers: npt.NDArray[np.int64],
        scores: npt.NDArray[np.float32],
        answered: npt.NDArray[np.bool_],
        truth: npt.NDArray[np.int32],
    ) -> tuple[int, int]:
        """Count n cells.

        Args:
            layers: [n] whose they are.
            scores: [n, E], -inf where a layer has no such expert.
            answered: [n] whether the row of `scores` is one.
            truth: [n, K] picks, negative where there is none.

        Returns:
            Picks that were named by the first k, and all picks.
        """
        n, experts = scores.shape
        rows = np.arange(n)[:, None]
        chosen = np.zeros((n, experts + 1), np.bool_)
        chosen[rows, np.where(truth < 0, experts, truth)] = True
        chosen = chosen[:, :experts]
        most = min(experts, int(self._named[-1].max()))
        order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        ordered = np.take_along_axis(scores, order, 1)
        # What scores nothing is not named: its place in the order is that of its id.
        offered = answered[:, None] & (ordered > 0)
        found = np.take_along_axis(chosen, order, 1) & offered
        places = np.arange(most)[None]
        picks = chosen.sum(1)
        hits_of_k = 0
        for place, named in enumerate(self._named):
            within = places < named[layers][:, None]
            hits = (found & within).sum(1)
            count = (offered & within).sum(1)
            self._hits[place] += hits.sum()
            self._offered[place] += count.sum()
            if place == 0:
                hits_of_k = int(hits.sum())
                self._exact += int(((hits == picks) & (count == picks)).sum())
        self.cells += n
        self._answered += int(answered.sum())
        self._picks += int(picks.sum())
        if self._are_probabilities:
            within = offered & (places < self._named[-1][layers][:, None])
            chances, came = ordered[within].astype(np.float64), found[within]
            bins = np.minimum((chances * BINS).astype(np.int64), BINS - 1)
            for column, values in enumerate((chances, came, None)):
                self._bins[:, column] += np.bincount(bins, values, BINS)
        return hits_of_k, int(picks.sum())

    def row(self, ahead_layers: int, ahead_tokens: int) -> Row:
        """What was counted."""
        cells = max(1, self.cells)
        total = self._bins[:, 2].sum()
        known = self._are_probabilities and total > 0
        return Row(
            ahead_layers=ahead_layers,
            ahead_tokens=ahead_tokens,
            cells=self.cells,
            answered=self._answered / cells,
            recall={
                _label(ratio): hits / max(1, self._picks)
                for ratio, hits in zip(RATIOS, self._hits.tolist(), strict=True)
            },
            precision={
                _label(ratio): hits / offered if offered else None
                for ratio, hits, offered in zip(RATIOS, self._hits.tolist(), self._offered.tolist(), strict=True)
            },
            exact=self._exact / cells,
            calibration_error=float(np.abs(self._bins[:, 0] - self._bins[:, 1]).sum() / total) if known else None,
            reliability=[
                (chance / count, came / count, int(count)) for chance, came, count in self._bins.tolist() if count
            ]
            if known
            else None,
            ask_us=self.ask_ns / max(1, self.asks) / 1000,
        )


def _label(ratio: float) -> str:
    return "k" if ratio == 1 else f"{ratio:g}k"
