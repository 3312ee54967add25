"""Counts of the experts that follow a token's id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from moert.predictors._trained import About, Array, Trained
from moert.predictors.base import Model, Need
from moert.predictors.token_table import Table
from moert.training.examples import Example, Examples, ran, targets
from moert.training.loop import Effort, Point
from moert.training.measures import Tally
from moert.training.recipes.base import Fitted, Recipe, check_from_to

PRIOR_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""What is tried; the weight that predicts the validation sequences best is taken."""

PARTS = 4
"""Points of the learning curve: after so many equal parts of the sequences."""

MOST_COUNTED = np.iinfo(np.uint16).max


class TokenTableRecipe(Recipe):
    """One pass of counting over the most frequent ids, then the weight of the prior by validation."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TOKEN_IDS})
    least_tokens: ClassVar[int] = 500
    epochs: ClassVar[int] = 0

    def __init__(self, vocabulary: int = 8192, kept: float = 4.0) -> None:
        """
        Args:
            vocabulary: ids that are kept, the most frequent ones.
            kept: experts that are kept of a token and layer, in multiples of the picks.
        """
        check_from_to("token_table", "vocabulary", vocabulary, 1, 1 << 22)
        check_from_to("token_table", "kept", kept, 1, 1000)
        self.vocabulary = vocabulary
        self.kept = kept

    def train(self, model: Model, train: Examples, validation: Examples, effort: Effort) -> Fitted:
        counts = _Counts(model, self._frequent(train))
        points: list[Point] = []
        tensors: dict[str, Array] = {}
        ends = sorted({max(1, round(len(train) * part / PARTS)) for part in range(1, PARTS + 1)})
        for place, example in enumerate(train, start=1):
            counts.add(example)
            if effort.report is not None:
                effort.report(place, len(train), "counting")
            if place in ends:
                tensors, recall = self._best(model, counts, validation)
                points.append(Point(0, counts.n_tokens, None, None, recall))
        return Fitted(tensors, points)

    def scores(self, model: Model, tensors: Mapping[str, Array], example: Example) -> npt.NDArray[np.float32]:
        table = _table(model, tensors)
        assert example.token_ids is not None
        rows = table.rows_of(example.token_ids)
        found = np.full((len(rows), model.num_layers, max(model.num_experts)), -1, dtype=np.float32)
        for layer, n in enumerate(model.num_experts):
            found[:, layer, :n] = table.rows(layer, rows)
        return found

    def _frequent(self, train: Examples) -> npt.NDArray[np.int64]:
        counter: Counter[int] = Counter()
        for example in train:
            assert example.token_ids is not None
            counter.update(example.token_ids.tolist())
        return np.array(sorted(token for token, _ in counter.most_common(self.vocabulary)), dtype=np.int64)

    def _best(self, model: Model, counts: _Counts, validation: Examples) -> tuple[dict[str, Array], float]:
        made = counts.tensors(max(1, int(self.kept * max(model.top_k))))
        tried = []
        for weight in PRIOR_WEIGHTS:
            tensors = {**made, "prior_weight": np.array([weight], dtype=np.float32)}
            tally = Tally(model.top_k)
            for example in validation:
                tally.add(self.scores(model, tensors, example), example.experts)
            tried.append((tally.result().recall[1.0], tensors))
        recall, tensors = max(tried, key=lambda one: one[0])
        return tensors, recall


class _Counts:
    def __init__(self, model: Model, ids: npt.NDArray[np.int64]) -> None:
        self._ids = ids
        self._most = max(model.num_experts)
        shape = (len(ids), model.num_layers)
        self._seen = np.zeros(shape, dtype=np.int64)
        self._chosen = np.zeros((*shape, self._most), dtype=np.uint32)
        self._all_seen = np.zeros(model.num_layers, dtype=np.int64)
        self._all = np.zeros((model.num_layers, self._most), dtype=np.int64)
        self.n_tokens = 0

    def add(self, example: Example) -> None:
        assert example.token_ids is not None
        chosen = targets(example.experts, self._most)
        there = ran(chosen)
        self.n_tokens += len(chosen)
        self._all += chosen.sum(axis=0)
        self._all_seen += there.sum(axis=0)
        places = np.searchsorted(self._ids, example.token_ids).clip(max=len(self._ids) - 1)
        known = self._ids[places] == example.token_ids
        np.add.at(self._chosen, places[known], chosen[known])
        np.add.at(self._seen, places[known], there[known])

    def tensors(self, kept: int) -> dict[str, Array]:
        kept = min(kept, self._most)
        # Of equal counts the lower id, on every machine.
        order = np.argsort(-self._chosen.astype(np.int64), axis=2, kind="stable")[..., :kept]
        counts = np.take_along_axis(self._chosen, order, axis=2).astype(np.float64)
        shrink = np.minimum(1, MOST_COUNTED / np.maximum(1, self._seen))
        prior = self._all / np.maximum(1, self._all_seen)[:, None]
        return {
            "token_ids": self._ids,
            "seen": np.rint(self._seen * shrink).astype(np.uint16),
            "experts": order.astype(np.uint16),
            "counts": np.rint(counts * shrink[..., None]).astype(np.uint16),
            "prior": prior.astype(np.float32),
        }


def _table(model: Model, tensors: Mapping[str, Array]) -> Table:
    from pathlib import Path

    return Table(Trained(Path(), About("token_table", model.num_experts, model.top_k), dict(tensors)))
