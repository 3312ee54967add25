"""Next-token reuse: how much of what a token chose in a layer the token before it had chosen there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moert.trace.sequence import NO_EXPERT, Phase, Sequence

_CHUNK_TOKENS = 256


class Reuse:
    """Sums reuse over sequences. Only pairs of neighbours count of which both ran the layer and neither is padding."""

    def __init__(self, num_layers: int) -> None:
        self.shared = np.zeros(num_layers, dtype=np.int64)
        """[L] picks that the token before had too."""
        self.picks = np.zeros(num_layers, dtype=np.int64)
        """[L] picks of tokens that have a token before."""

    def add(self, sequence: Sequence) -> None:
        """Count the pairs of a sequence."""
        kept = sequence.phases != Phase.PADDING
        for begin in range(0, len(kept) - 1, _CHUNK_TOKENS):
            chunk = slice(begin, begin + _CHUNK_TOKENS + 1)
            self._add(sequence.experts[chunk], kept[chunk])

    def _add(self, experts: npt.NDArray[np.int32], kept: npt.NDArray[np.bool_]) -> None:
        before, after = experts[:-1], experts[1:]
        # Fills are at the end, so a layer that has a pick has one in the first place.
        paired = (before[:, :, 0] != NO_EXPERT) & (after[:, :, 0] != NO_EXPERT) & (kept[:-1] & kept[1:])[:, None]
        picked = (after != NO_EXPERT) & paired[:, :, None]
        found = np.zeros(after.shape, dtype=np.bool_)
        for place in range(before.shape[2]):
            found |= after == before[:, :, place : place + 1]
        self.shared += (found & picked).sum(axis=(0, 2))
        self.picks += picked.sum(axis=(0, 2))

    @property
    def per_layer(self) -> list[float | None]:
        """[L] shares from 0 to 1; None where no pair ran the layer."""
        return [
            int(shared) / int(picks) if picks else None for shared, picks in zip(self.shared, self.picks, strict=True)
        ]

    @property
    def mean(self) -> float | None:
        """Over all pairs and layers."""
        picks = int(self.picks.sum())
        return int(self.shared.sum()) / picks if picks else None
