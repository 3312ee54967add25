"""Which experts of a layer follow which of the layers before it."""

from __future__ import annotations

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors._context import Context
from moert.predictors.base import MOST_LAYERS, Floats, Ints, Model, Predictor


class _Table:
    """How often each expert of one layer followed each of an earlier one."""

    def __init__(self, sources: int, experts: int) -> None:
        self.counts = np.zeros((sources, experts), np.float32)
        self.totals = np.zeros(sources, np.float32)


class SetTransition(Predictor):
    """Inter-layer affinity: the share of tokens with expert i in one layer that had expert j in a later one.

    For each pick of the latest layer there is such a row; an expert's score is the sum of the logarithms of what the
    rows give it over what it has anyway, once for each pick, plus the logarithm of the latter: naive Bayes. Counts are
    halved now and then, so that what changes is forgotten. Nothing is said of later tokens.
    """

    def __init__(self, model: Model, ahead: int = 1, prior: float = 2.0, memory: int = 20_000) -> None:
        """A predictor whose rows begin with `prior` tokens of the average, and which remembers 1-2 times `memory`.

        Raises:
            ConfigError: a parameter is out of range.
        """
        super().__init__(model)
        self.ahead = check_from_to("set_transition", "ahead", ahead, 1, MOST_LAYERS)
        self._prior = np.float32(check_from_to("set_transition", "prior", prior, 1e-3, 1e6))
        self._memory = check_from_to("set_transition", "memory", memory, 1, 1_000_000)
        self._context = Context(model)
        sizes = model.num_experts
        self._uses = [np.full(experts, 0.5, np.float32) for experts in sizes]
        self._tokens = [0] * model.num_layers
        self._tables: dict[tuple[int, int], _Table] = {}
        """(later layer, layers between + 1) -> what follows."""

    def begin_sequence(self) -> None:
        self._context.begin_sequence()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._context.begin_pass(n_tokens, rows)

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        now = self._context.observe(layer, experts)
        if not len(now):
            return
        befores = [self._context.now(layer - gap) for gap in range(1, MOST_LAYERS + 1)]
        uses = self._uses[layer]
        for row, picks in enumerate(now):
            kept = picks[picks >= 0]
            uses[kept] += 1
            for gap, before in enumerate(befores, 1):
                if before is not None and len(before) == len(now):
                    sources = before[row][before[row] >= 0]
                    table = self._table(layer, gap)
                    table.counts[sources[:, None], kept] += 1
                    table.totals[sources] += 1
        self._tokens[layer] += len(now)
        if self._tokens[layer] >= 2 * self._memory:
            self._halve(layer)

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        gap = layer - self._context.layer
        now = self._context.now(self._context.layer)
        if tokens or now is None or not len(now) or not 1 <= gap <= MOST_LAYERS or not self._tokens[layer]:
            return None
        share = self._uses[layer] / np.float32(self._tokens[layer] + 1)
        table = self._table(layer, gap)
        best: Floats | None = None
        for picks in now:
            sources = picks[picks >= 0]
            rows = table.counts[sources] + self._prior * share
            rows /= (table.totals[sources] + self._prior)[:, None] * share
            found = np.log(rows).sum(0, dtype=np.float32) + np.log(share)
            best = found if best is None else np.maximum(best, found)
        assert best is not None
        # Some number above 0, in the same order.
        chances: Floats = np.exp(best - best.max())
        return chances

    def _table(self, layer: int, gap: int) -> _Table:
        table = self._tables.get((layer, gap))
        if table is None:
            sizes = self.model.num_experts
            table = self._tables[layer, gap] = _Table(sizes[layer - gap], sizes[layer])
        return table

    def _halve(self, layer: int) -> None:
        self._tokens[layer] //= 2
        self._uses[layer] *= 0.5
        for gap in range(1, MOST_LAYERS + 1):
            if (layer, gap) in self._tables:
                self._tables[layer, gap].counts *= 0.5
                self._tables[layer, gap].totals *= 0.5
