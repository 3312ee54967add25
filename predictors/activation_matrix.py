"""The sequence seen before that is most like this one says what comes next."""

from __future__ import annotations

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors._context import Context
from moert.predictors.base import Floats, Ints, Model, Predictor


class ActivationMatrix(Predictor):
    """Expects what the most similar earlier sequence chose (MoE-Infinity, arXiv 2401.14361).

    A sequence is described by a matrix: how many of its tokens chose each expert of each layer. The `matrices` latest
    are kept; once there are so many, a new one takes the place of the one that it resembles most. Similarity is the
    average cosine of the rows over the layers that the sequence has been through, all its tokens together. The score
    is the expert's share of its layer in the nearest matrix, times 1 - d / L for a layer d layers after the next one;
    as long as nothing is stored, the sequence's own matrix stands in.

    Unlike the published code, which leaves out just those rows that it has seen, and takes the first matrix before the
    first layer. Sequences end where `begin_sequence` is called; if it never is, they are all one.
    """

    def __init__(self, model: Model, matrices: int = 128) -> None:
        """A predictor that keeps so many `matrices`, each of L times E numbers of 4 bytes.

        Raises:
            ConfigError: `matrices` is out of range.
        """
        super().__init__(model)
        self._matrices = check_from_to("activation_matrix", "matrices", matrices, 1, 1_000_000)
        self._context = Context(model)
        self._stored = [np.zeros((experts, 0), np.float32) for experts in model.num_experts]
        """Of each layer [E, M] counts, a column for each matrix."""
        self._norms = np.zeros((model.num_layers, 0), np.float32)
        self._start()

    def _start(self) -> None:
        """A sequence begins."""
        self._current = [np.zeros(experts, np.float32) for experts in self.model.num_experts]
        self._products = np.zeros_like(self._norms)
        """[L, M] of the current rows with the stored ones."""
        self._cosines = np.zeros_like(self._norms)
        self._similarity = np.zeros(self._norms.shape[1], np.float32)
        """[M] sum of the cosines of the layers that the sequence has been through."""
        self._observed = False

    def begin_sequence(self) -> None:
        self._context.begin_sequence()
        if self._observed:
            self._store()
        self._start()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._context.begin_pass(n_tokens, rows)

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        now = self._context.observe(layer, experts)
        picks = now[now >= 0]
        if not len(picks):
            return
        self._observed = True
        current = self._current[layer]
        np.add.at(current, picks, 1)
        if current.max() >= 1 << 20:  # before adding one to a single float is lost; cosines know no scale
            current /= 2
            self._products[layer] /= 2
        if not len(self._similarity):
            return
        self._products[layer] += self._stored[layer][picks].sum(0)
        norms = self._norms[layer] * np.linalg.norm(current)
        cosines = np.divide(self._products[layer], norms, out=np.zeros_like(norms), where=norms > 0)
        self._similarity += cosines - self._cosines[layer]
        self._cosines[layer] = cosines

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if not self._observed or not self.model.num_experts[layer]:
            return None
        nearest = self.nearest()
        row = self._current[layer] if nearest is None else self._stored[layer][:, nearest]
        layers = self.model.num_layers
        distance = layer - self._context.layer - 1 + tokens * layers
        closeness = max(1 - distance / layers, 1 / layers)
        scores: Floats = row * np.float32(min(closeness, 1.0) / max(float(row.sum()), 1.0))
        return scores

    def nearest(self) -> int | None:
        """The place of the stored matrix that is most like the current one; None: there is none."""
        return int(np.argmax(self._similarity)) if len(self._similarity) and self._observed else None

    def _store(self) -> None:
        place = len(self._similarity)
        if place < self._matrices:
            self._stored = [np.pad(stored, ((0, 0), (0, 1))) for stored in self._stored]
            self._norms = np.pad(self._norms, ((0, 0), (0, 1)))
        else:
            place = int(np.argmax(self._similarity))
        for layer, current in enumerate(self._current):
            self._stored[layer][:, place] = current
            self._norms[layer, place] = np.linalg.norm(current)
