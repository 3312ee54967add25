"""The token seen before whose way through the layers is most like this one's says where it goes on."""

from __future__ import annotations

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors._context import Context
from moert.predictors.base import Floats, Ints, Model, Predictor


class ExpertMap(Predictor):
    """Follows the most similar earlier tokens (FineMoE, arXiv 2502.05370).

    A token is described by its map: the router's weights of its picks, layer by layer. A store holds `entries` maps.
    Similarity is the cosine of what has been observed of the present token with the same layers of a stored one. The
    score is the sum of the `nearest` maps' weights there, each times its similarity less that of the first one left
    out, so that the nearest counts most. A full store gives up the map that the new one resembles most.

    Unlike the published one: before the first layer the map of the token before is compared, where FineMoE has an
    embedding of the prompt, which is not at hand here; and several maps are followed, where FineMoE follows one
    (`nearest=1` does). A pass of several tokens is looked at through its last one. Nothing is said of later tokens.
    """

    def __init__(self, model: Model, entries: int = 1000, nearest: int = 16) -> None:
        """A predictor that keeps so many maps, each of L times E numbers of 4 bytes.

        Raises:
            ConfigError: a parameter is out of range.
        """
        super().__init__(model)
        self._entries = check_from_to("expert_map", "entries", entries, 1, 1_000_000)
        self._nearest = check_from_to("expert_map", "nearest", nearest, 1, 10_000)
        self._context = Context(model)
        self._maps: list[Floats] = []
        """Of each layer [E, N]."""
        self._squares = np.zeros((0, 0), np.float32)
        """[L, N] of each map's layers."""
        self._stored = 0
        self._begin_token()

    def _begin_token(self) -> None:
        self._path: list[tuple[int, Ints, Floats]] = []
        self._dots = np.zeros(self._squares.shape[1], np.float32)
        self._seen_squares = np.zeros(self._squares.shape[1], np.float32)

    def begin_sequence(self) -> None:
        self._context.begin_sequence()
        self._store()
        self._before: Floats | None = None

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._context.begin_pass(n_tokens, rows)
        self._store()

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        if layer <= self._context.layer:
            self._store()
        now = self._context.observe(layer, experts)
        if not len(now):
            return
        kept = now[-1] >= 0
        picks = now[-1][kept]
        if not len(picks):
            return
        known = None if weights is None else np.nan_to_num(weights[-1][kept]).astype(np.float32).clip(0, None)
        total = 0.0 if known is None else float(known.sum())
        shares = known / np.float32(total) if known is not None and 0 < total < np.inf else None
        if shares is None:
            shares = np.full(len(picks), 1 / len(picks), np.float32)
        self._path.append((layer, picks, shares))
        if self._stored:
            self._dots += shares @ self._maps[layer][picks]
            self._seen_squares += self._squares[layer]

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if tokens or not self._stored or not self.model.num_experts[layer]:
            return None
        similarity = self._similarity()
        if similarity is None:
            return None
        n = min(self._nearest, self._stored)
        if n < self._stored:
            best = np.argpartition(-similarity, n)[: n + 1]
            best = best[np.lexsort((best, -similarity[best]))]
            shares = similarity[best[:n]] - similarity[best[n]]
        else:
            best, shares = np.arange(n), similarity
        scores: Floats = self._maps[layer][:, best[:n]] @ (shares + np.float32(1e-6))
        return scores

    def _similarity(self) -> Floats | None:
        """[N] of the present token with the stored ones."""
        if not self._path:
            return self._before if self._before is not None and len(self._before) >= self._stored else None
        own = sum(float(shares @ shares) for _, _, shares in self._path)
        found: Floats = (self._dots / np.sqrt(np.maximum(self._seen_squares * np.float32(own), 1e-12)))[: self._stored]
        return found

    def _store(self) -> None:
        """The token is over: keep its map, and what it was like."""
        if not self._path:
            return
        if not self._maps:
            self._maps = [np.zeros((experts, self._entries), np.float32) for experts in self.model.num_experts]
            self._squares = np.zeros((self.model.num_layers, self._entries), np.float32)
        similarity = self._similarity() if self._stored else None
        place = self._stored
        if place < self._entries:
            self._stored += 1
        else:
            assert similarity is not None
            place = int(np.argmax(similarity))
        for layer in range(self.model.num_layers):
            self._maps[layer][:, place] = 0
            self._squares[layer, place] = 0
        for layer, picks, shares in self._path:
            self._maps[layer][picks, place] = shares
            self._squares[layer, place] = shares @ shares
        self._before = None if similarity is None else self._with(similarity, place)
        self._begin_token()

    def _with(self, similarity: Floats, place: int) -> Floats:
        """What the token before was like, itself among them."""
        found = np.ones(self._stored, np.float32)
        found[: len(similarity)] = similarity
        found[place] = 1
        return found
