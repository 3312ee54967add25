"""Activation matrices: the sequence seen before that is most like this one says what is needed next."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from moert.policies._checks import check_at_least
from moert.policies.base import Policy
from moert.types import ExpertId

Floats = npt.NDArray[np.float64]

EPSILON = 1e-6
"""Added to shares, so that one that is 0 does not hide the other factors."""


class _Layer:
    """One layer's row of every matrix. Columns are added as higher experts turn up."""

    def __init__(self, matrices: int) -> None:
        self.stored: Floats = np.zeros((matrices, 0))
        self.stored_norms: Floats = np.zeros(matrices)
        self.totals: Floats = np.zeros(0)
        """Events that had each expert, in all sequences."""
        self.restart()

    def restart(self) -> None:
        """A sequence begins."""
        self.current: Floats = np.zeros(self.stored.shape[1])
        self.products: Floats = np.zeros(len(self.stored))
        """Inner products of the current row with the stored ones."""
        self.cosines: Floats = np.zeros(len(self.stored))

    def count(self, experts: list[int]) -> None:
        more = max(experts) + 1 - self.stored.shape[1]
        if more > 0:
            self.stored = np.pad(self.stored, ((0, 0), (0, more)))
            self.totals = np.pad(self.totals, (0, more))
            self.current = np.pad(self.current, (0, more))
        self.current[experts] += 1
        self.totals[experts] += 1
        self.products += self.stored[:, experts].sum(axis=1)
        norms = self.stored_norms * np.linalg.norm(self.current)
        self.cosines = np.divide(self.products, norms, out=np.zeros_like(norms), where=norms > 0)

    def store(self, place: int) -> None:
        self.stored[place] = self.current
        self.stored_norms[place] = np.linalg.norm(self.current)


class ActivationMatrix(Policy):
    """Evicts the resident that the most similar earlier sequence needed least (MoE-Infinity, arXiv 2401.14361).

    A sequence is described by a matrix: how many events of each layer had each expert. The `matrices` latest are kept;
    once there are so many, a new one takes the place of that which it resembles most. Similarity is the average of the
    rows' cosines over the layers that the current sequence has been through, and nearest is the most similar of them.
    A resident is worth the product of three: its share of its layer in the nearest matrix (in the current one as long
    as nothing is stored), its share of its layer's uses ever, and 1 - d / L, where its layer runs after d others of the
    L layers of this cache. Where sizes differ, the worth is per byte.

    Unlike the published code, which leaves out just those rows that it has seen and takes the first matrix before the
    first layer; and distance goes around, as the first layer follows the last one. Sequences end where `begin_sequence`
    is called; if it never is, they are all one. In a cache of one layer the matrices have one row.
    """

    def __init__(self, capacity: int, matrices: int = 128) -> None:
        super().__init__(capacity)
        self._n_matrices = check_at_least("activation_matrix", "matrices", matrices, 1)
        self._layers: dict[int, _Layer] = {}
        self._stored = 0
        self._observed: set[int] = set()
        """Layers that the current sequence has been through."""
        self._similarity: Floats = np.zeros(matrices)
        """Sum of the cosines of the observed layers."""
        self._layer = 0
        self._events = 0
        self._last: dict[ExpertId, int] = {}
        self._residents: dict[ExpertId, None] = {}
        self._worths: dict[int, list[float]] = {}
        """By layer, worked out when a victim is asked for, until the next event."""

    def begin_sequence(self) -> None:
        if not self._observed:
            return
        place = self._stored if self._stored < self._n_matrices else int(np.argmax(self._similarity))
        self._stored = max(self._stored, place + 1)
        for layer in self._layers.values():
            layer.store(place)
            layer.restart()
        self._observed.clear()
        self._similarity[:] = 0
        self._worths.clear()

    def access(self, event: Sequence[ExpertId]) -> None:
        if not event:
            return
        self._worths.clear()
        self._events += 1
        self._layer = event[0].layer
        self._observed.add(self._layer)
        layer = self._layers.setdefault(self._layer, _Layer(self._n_matrices))
        before = layer.cosines
        layer.count([expert.expert for expert in event])
        self._similarity += layer.cosines - before
        for expert in event:
            self._last[expert] = self._events

    def admit(self, expert: ExpertId) -> None:
        self._residents[expert] = None

    def evict(self, expert: ExpertId) -> None:
        del self._residents[expert]

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return min((expert for expert in self._residents if expert not in locked), key=self._rank)

    def nearest(self) -> int | None:
        """The place of the stored matrix that is most like the current one, or None if there is nothing to compare."""
        return int(np.argmax(self._similarity[: self._stored])) if self._stored and self._observed else None

    def _rank(self, expert: ExpertId) -> tuple[float, int, ExpertId]:
        worths = self._worths.get(expert.layer)
        if worths is None:
            worths = self._worths[expert.layer] = self._worths_of(expert.layer)
        worth = worths[expert.expert] if expert.expert < len(worths) else 0.0
        return worth / self.size(expert), self._last.get(expert, 0), expert

    def _worths_of(self, index: int) -> list[float]:
        layer = self._layers.get(index)
        if layer is None:
            return []
        nearest = self.nearest()
        row = layer.current if nearest is None else layer.stored[nearest]
        order = sorted(self._layers)
        distance = (order.index(index) - order.index(self._layer) - 1) % len(order)
        closeness = 1 - distance / len(order)
        worths: list[float] = (closeness * (_shares(row) + EPSILON) * (_shares(layer.totals) + EPSILON)).tolist()
        return worths


def _shares(counts: Floats) -> Floats:
    return counts / max(float(counts.sum()), 1.0)
