"""Picks of the layers before, of the token before and of late, in one model that learns as it runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors._context import Context, Ids
from moert.predictors.base import MOST_LAYERS, Floats, Ints, Model, Predictor

START = np.float32(1e-8)
"""Of the sums that steps are divided by."""


class _Layer:
    """What is learned of one layer. All float32."""

    def __init__(self, num_experts: int, sources: tuple[int, int], top_k: int) -> None:
        """`sources` are the experts of the layers one and two before."""
        one, two = sources
        rows = max(num_experts, one, two)
        self.tables = np.zeros((4, rows, num_experts), np.float32)
        """[4, E, E] what a pick (row) adds to the log-odds of each expert."""
        self.sums = np.full((4, rows), START, np.float32)
        self.bias = np.zeros((2, num_experts), np.float32)
        self.bias_sums = np.full((2, num_experts), START, np.float32)
        self.gain = np.ones((2, num_experts), np.float32)
        self.gain_sums = np.full((2, num_experts), START, np.float32)
        at_first = min(max(top_k / max(1, num_experts), 1e-3), 1 - 1e-3)
        self.rate = np.full(num_experts, at_first, np.float32)
        self._slope = np.empty(num_experts, np.float32)
        self._picked = np.empty(num_experts, np.float32)

    def learn(self, loops: Any, one: Ids, two: Ids, last: Ids, now: Ids, speed: np.float32, alpha: np.float32) -> None:
        """See `_joint.learn`."""
        loops.learn(
            self.tables,
            self.sums,
            self.bias,
            self.bias_sums,
            self.gain,
            self.gain_sums,
            self.rate,
            one,
            two,
            last,
            now,
            self._slope,
            self._picked,
            speed,
            np.float32(speed / 5),
            alpha,
        )

    def predict(
        self, loops: Any, n: int, one: Ids, one_likely: Floats, two: Ids, two_likely: Floats, last: Ids
    ) -> Floats:
        """[n, E]; see `_joint.predict`."""
        out = np.empty((n, len(self.rate)), np.float32)
        loops.predict(self.tables, self.bias, self.gain, self.rate, one, one_likely, two, two_likely, last, out)
        return out

    def predict_token(self, loops: Any, n: int, picks: Ids, likely: Floats) -> Floats:
        """[n, E]; see `_joint.predict_token`."""
        out = np.empty((n, len(self.rate)), np.float32)
        loops.predict_token(self.tables, self.bias, self.gain, self.rate, picks, likely, out)
        return out


class Joint(Predictor):
    """One logistic regression for each expert, learned pass by pass from picks alone; no hidden state is needed.

    Its inputs are the picks one and two layers before, those of the token before in the same layer, and how often the
    expert was picked of late. Steps go down the slope of the log-loss, each source's divided by the root of what its
    squares have added up to (Adagrad, Duchi et al. 2011), so that what is rare is learned fast and the chances stay
    calibrated. Layers farther on are predicted through the expected picks of those in between, and tokens farther on
    through a table of its own from one token's picks to the next one's, step by step.

    It costs 4 E^2 numbers of 4 bytes a layer: 16 KiB for 32 experts, 1 MiB for 256. A pass of several tokens teaches
    what as many passes of one token would, of its last 64.
    """

    gives_probabilities = True

    def __init__(self, model: Model, speed: float = 0.1, alpha: float = 0.03, ahead: int = 1) -> None:
        """A predictor that learns at `speed`, and for which "of late" is 1 / `alpha` tokens.

        Raises:
            ConfigError: a parameter is out of range.
        """
        from moert.predictors import _joint

        super().__init__(model)
        self._loops = _joint
        self._speed = np.float32(check_from_to("joint", "speed", speed, 1e-6, 10.0))
        self._alpha = np.float32(check_from_to("joint", "alpha", alpha, 1e-6, 1.0))
        self.ahead = check_from_to("joint", "ahead", ahead, 1, MOST_LAYERS)
        self._context = Context(model)
        self._layers: dict[int, _Layer] = {}
        self._chances: dict[int, Floats] = {}
        """Layer -> [n, E] of the layers after the latest observed, as far as they were asked for."""
        self._later: dict[int, list[Floats]] = {}
        """Layer -> [rows, E] for each pass after its newest picks, as far as it was asked for."""
        self._none = np.empty((0, 1), np.int32)
        self._no_chance = np.empty((0, 1), np.float32)
        self._compile()

    def begin_sequence(self) -> None:
        self._context.begin_sequence()
        self._forget()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._context.begin_pass(n_tokens, rows)
        self._forget()

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        context = self._context
        now = context.observe(layer, experts)
        self._forget()
        n = len(now)
        if not n or not self.model.num_experts[layer]:
            return
        one, two, last = self._picks(layer - 1, n), self._picks(layer - 2, n), context.before(layer, n)
        self._layer(layer).learn(self._loops, one, two, last, now, self._speed, self._alpha)

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        if not self.model.num_experts[layer]:
            return None
        if tokens:
            return _any_of(self._after(layer, tokens))
        if layer - self._context.layer > MOST_LAYERS:
            return _any_of(self._after(layer, 0))
        return _any_of(self._next(layer)) if self._context.n_tokens else None

    def _compile(self) -> None:
        """Have the loops ready. The first time in an installation that takes seconds, which no token should."""
        layer, ids = _Layer(1, (1, 1), 1), np.zeros((1, 1), np.int32)
        layer.learn(self._loops, ids, ids, ids, ids, self._speed, self._alpha)
        layer.predict(self._loops, 1, ids, self._no_chance, ids, self._no_chance, ids)
        layer.predict_token(self._loops, 1, ids, self._no_chance)

    def _forget(self) -> None:
        if self._chances:
            self._chances.clear()
        if self._later:
            self._later.clear()

    def _layer(self, layer: int) -> _Layer:
        known = self._layers.get(layer)
        if known is None:
            sizes = self.model.num_experts
            before = (sizes[layer - 1] if layer > 0 else 0, sizes[layer - 2] if layer > 1 else 0)
            known = self._layers[layer] = _Layer(sizes[layer], before, self.model.top_k[layer])
        return known

    def _picks(self, layer: int, n: int) -> Ids:
        """[n, K] of this pass, or nothing."""
        picks = self._context.now(layer)
        return picks if picks is not None and len(picks) == n else self._none

    def _next(self, layer: int) -> Floats:
        """[n, E] in this pass."""
        found = self._chances.get(layer)
        if found is None:
            context = self._context
            n = context.looked_at
            if layer - 1 > context.layer and layer - 1 >= 0 and self.model.num_experts[layer - 1]:
                self._next(layer - 1)
            last = context.last(layer)
            found = self._chances[layer] = self._layer(layer).predict(
                self._loops,
                n,
                self._picks(layer - 1, n),
                self._chances.get(layer - 1, self._no_chance),
                self._picks(layer - 2, n),
                self._chances.get(layer - 2, self._no_chance),
                last if n == 1 and last is not None else context.before(layer, n),
            )
        return found

    def _after(self, layer: int, tokens: int) -> Floats:
        """[rows, E] of the pass that runs `tokens` after this one."""
        known = self._layer(layer)
        picks, age = self._context.newest(layer)
        if picks is None:
            return known.rate[None]
        chain = self._later.setdefault(layer, [])
        passes = max(1, tokens + age)
        while len(chain) < passes:
            of, likely = (self._none, chain[-1]) if chain else (picks, self._no_chance)
            chain.append(known.predict_token(self._loops, len(picks), of, likely))
        return chain[passes - 1]


def _any_of(chances: Floats) -> Floats:
    """[n, E] -> [E]: that at least one of n tokens picks it, if they do not know of each other."""
    if len(chances) == 1:
        return chances[0]
    any_of: Floats = 1 - np.prod(1 - chances, axis=0, dtype=np.float32)
    return any_of
