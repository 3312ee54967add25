"""What the present sequences have chosen lately, for predictors that go by picks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moert.predictors.base import NO_EXPERT, Ints, Model

MOST_ROWS = 64
"""Of a pass with more tokens only the last ones are looked at: predictions for it are of no use, and time is short."""

Ids = npt.NDArray[np.int32]


class Context:
    """Picks of this pass and of the one before, layer by layer.

    A pass ends with `begin_pass`, and where a layer comes that is not after the one before.
    """

    def __init__(self, model: Model) -> None:
        self._num_experts = model.num_experts
        self._nothing = tuple(np.full((1, max(1, k)), NO_EXPERT, dtype=np.int32) for k in model.top_k)
        self.layer = -1
        """The latest that was observed in this pass; -1: none yet."""
        self.n_tokens = 1
        """Of this pass."""
        self.rows = 1
        """Sequences in this pass."""
        self.looked_at = 1
        """Tokens of this pass whose picks are kept."""
        self._now: dict[int, Ids] = {}
        self._last: dict[int, Ids] = {}
        """[rows, K] of the tokens before this pass."""

    def begin_sequence(self) -> None:
        """Forget all."""
        self._now.clear()
        self._last.clear()
        self.layer = -1

    def begin_pass(self, n_tokens: int, rows: int) -> None:
        """See `Predictor.begin_pass`."""
        self._end_pass()
        self._resize(n_tokens, max(1, rows))

    def observe(self, layer: int, experts: Ints) -> Ids:
        """Take in [T, K]; returns [n, K] of the tokens that are looked at.

        In it, what names no expert is `NO_EXPERT`.
        """
        if layer <= self.layer:
            self._end_pass()
        picks = experts.astype(np.int32)
        if picks.size:
            if picks.min() < 0 or picks.max() >= self._num_experts[layer]:
                picks[(picks < 0) | (picks >= self._num_experts[layer])] = NO_EXPERT
            if len(picks) != self.n_tokens:
                self._resize(len(picks), self.rows if len(picks) % self.rows == 0 else 1)
            if len(picks) > MOST_ROWS:
                picks = self._cut(picks)
        self.layer = layer
        self._now[layer] = picks
        return picks

    def now(self, layer: int) -> Ids | None:
        """[n, K] of this pass; None: not observed."""
        return self._now.get(layer)

    def last(self, layer: int) -> Ids | None:
        """[rows, K] of the token before this pass, of each sequence; None: unknown."""
        last = self._last.get(layer)
        return last if last is not None and len(last) == min(self.rows, MOST_ROWS) else None

    def newest(self, layer: int) -> tuple[Ids | None, int]:
        """[rows, K] of each sequence's last token that was observed there, and how many passes ago that was."""
        now = self._now.get(layer)
        if now is not None and len(now):
            return self._ends(now), 0
        return self.last(layer), 1

    def before(self, layer: int, n: int) -> Ids:
        """[n, K]: for each token that is looked at, the picks of the one before it in its sequence, where known."""
        last, now = self.last(layer), self._now.get(layer)
        if n == 1:
            return last if last is not None else self._nothing[layer]
        k = (now if now is not None else last if last is not None else self._nothing[layer]).shape[1]
        found = np.full((n, k), NO_EXPERT, dtype=np.int32)
        rows = min(self.rows, n)
        by_row = found.reshape(rows, n // rows, k)
        if now is not None and len(now) == n:
            by_row[:, 1:] = now.reshape(by_row.shape)[:, :-1]
        if last is not None and last.shape == (rows, k) and self.n_tokens <= MOST_ROWS:
            by_row[:, 0] = last
        return found

    def _resize(self, n_tokens: int, rows: int) -> None:
        if rows != self.rows:
            self._last.clear()
        self.n_tokens, self.rows = n_tokens, rows
        kept = min(rows, MOST_ROWS)
        self.looked_at = n_tokens if n_tokens <= MOST_ROWS else kept * min(n_tokens // rows, MOST_ROWS // kept)

    def _end_pass(self) -> None:
        for layer, picks in self._now.items():
            if len(picks):
                self._last[layer] = self._ends(picks)
        self._now.clear()
        self.layer = -1

    def _ends(self, picks: Ids) -> Ids:
        """The last token of each sequence."""
        rows = min(self.rows, len(picks))
        if len(picks) == rows:
            return picks
        return np.ascontiguousarray(picks.reshape(rows, len(picks) // rows, -1)[:, -1])

    def _cut(self, picks: Ids) -> Ids:
        """The last tokens of each sequence."""
        rows = min(self.rows, MOST_ROWS)
        each = self.looked_at // rows
        by_row = picks.reshape(self.rows, len(picks) // self.rows, -1)[:rows, -each:]
        return np.ascontiguousarray(by_row).reshape(-1, picks.shape[1])
