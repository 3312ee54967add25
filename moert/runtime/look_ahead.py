"""What predictions become: reads of missing experts before anybody waits for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from time import perf_counter

import torch

from moert.predictors.base import Ints, Prediction, Predictor
from moert.runtime.layer import LayerCache
from moert.runtime.pipeline import Pipeline
from moert.runtime.predictor_guard import PredictorGuard
from moert.trial import Trial
from moert.types import ExpertId

MOST_TOKENS = 32
"""Steps of more tokens need most experts of every layer, which no prediction has to tell."""

WORTH = 0.5
"""Reads are started for ranks that lately were needed at least so often, of those that were not resident."""

SHARE = 1 / 32
"""Of the latest step in what is known of a rank."""


class _Look(IntEnum):
    STEP = 0
    ENTRY = 1


class LookAhead:
    """Prefetches what `predictor` expects, as far as that has been worth it.

    A predictor's ranks are judged by what the steps then needed, each rank, look and layer for itself, so that
    predictions which do not come true cost reads for a short while only. Now and then tokens with it are timed against
    tokens without, and it is left off where it does not gain (`Trial`). A predictor that fails or takes too long is not
    called again (`PredictorGuard`). Used by one step at a time.
    """

    def __init__(
        self,
        predictor: Predictor,
        layers: Sequence[LayerCache],
        pipeline: Pipeline,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._clock = clock
        self._trial = Trial()
        self._last: tuple[int, float] | None = None
        """Tokens of the first layer's latest step, and when it began."""
        self._predictor = predictor
        self._guard = PredictorGuard(predictor, [layer.spec.num_experts for layer in layers], clock)
        self._layers = layers
        self._pipeline = pipeline
        self._missing: dict[int, dict[_Look, dict[ExpertId, int]]] = {}
        """Layer -> of each look, the experts expected there next that were not resident, and their ranks."""
        self._worths: dict[tuple[int, _Look], list[float]] = {}
        self._observes = type(predictor).observe is not Predictor.observe

    def begin(self, layer: int, needed: Collection[ExpertId], n_tokens: int = 1) -> None:
        """A step of `layer` needs these experts: learn from it, and give up on the others that were expected."""
        self._guard.begin_layer(layer)
        if layer == 0 and self._guard.is_on:
            self._note_token(n_tokens)
        for look, missing in self._missing.pop(layer, {}).items():
            worths = self._worths[layer, look]
            for expert, rank in missing.items():
                worths[rank] += SHARE * ((expert in needed) - worths[rank])
            self._pipeline.withdraw(expert for expert in missing if expert not in needed)

    def begin_sequence(self) -> None:
        """The passes from here on are of another sequence, or batch of them."""
        self._guard.begin_sequence()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        """A forward pass of T tokens begins; see `Predictor.begin_pass`."""
        self._guard.begin_pass(n_tokens, token_ids, rows)

    def hint(self, token_ids: Ints) -> None:
        """These tokens [n] are expected after those of this pass; see `Predictor.hint`."""
        self._guard.hint(token_ids)

    def observe(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        """The tokens have chosen so, both [T, K] on the CPU; for predictors that learn from it."""
        if self._observes and not self.rests(layer):
            experts, weights = top_k_index.detach().numpy(), top_k_weights.detach().float().numpy()
            # They may be the step's own memory.
            experts.flags.writeable = weights.flags.writeable = False
            self._guard.observe(layer, experts, weights)

    def step(self, layer: int, hidden: torch.Tensor) -> None:
        """The experts of `layer` are given `hidden` [T, D]: ask for what later layers will need. Starts nothing."""
        if self.rests(layer):
            return
        with torch.inference_mode():
            for prediction in self._guard.step(layer, hidden):
                self._ask(_Look.STEP, prediction, len(hidden))

    def enters(self, layer: int) -> bool:
        """Whether `enter` would do anything."""
        return not self._is_idle(layer)

    def enter(self, layer: int, residual: torch.Tensor) -> None:
        """The block of `layer` is given `residual` [T, D]: ask for what its experts will be. Starts nothing."""
        if self._is_idle(layer):
            return
        with torch.inference_mode():
            prediction = self._guard.enter(layer, residual)
            if prediction is not None:
                self._ask(_Look.ENTRY, prediction, len(residual))

    def _note_token(self, n_tokens: int) -> None:
        """Steps of as many tokens as the one before are compared, with and without prefetches."""
        now = self._clock()
        if self._last is not None and n_tokens == self._last[0] <= MOST_TOKENS and not self._is_complete(0):
            self._trial.note(now - self._last[1])
        self._last = (n_tokens, now)

    def rests(self, layer: int) -> bool:
        """Whether `step` would do nothing."""
        return self._is_idle(layer) and self._is_idle(min(layer + 1, len(self._layers) - 1))

    def _is_idle(self, layer: int) -> bool:
        return not self._guard.is_on or not self._trial.is_on or self._is_complete(layer)

    def _is_complete(self, layer: int) -> bool:
        """Whether there is nothing to bring up: predicting costs time too."""
        cache = self._layers[layer]
        return len(cache.residency) >= cache.spec.num_experts

    def _ask(self, look: _Look, prediction: Prediction, n_tokens: int) -> None:
        layer, experts, ranks, _ = prediction
        if n_tokens > MOST_TOKENS or not experts:
            return
        residency = self._layers[layer].residency
        worths = self._worths.setdefault((layer, look), [])
        worths.extend([WORTH] * (max(ranks) + 1 - len(worths)))
        # Room for the likeliest only, resident or not: what is brought up for the others would displace them.
        within = [(ExpertId(layer, expert), rank) for expert, rank in zip(experts, ranks, strict=True)]
        within = within[: residency.capacity]
        missing = {expert: rank for expert, rank in within if expert not in residency}
        wanted = [expert for expert, rank in missing.items() if worths[rank] >= WORTH]
        before = self._missing.setdefault(layer, {})
        for earlier in before.values():
            self._pipeline.withdraw(expert for expert in earlier if expert not in missing)
        before[look] = missing
        residency.expect(expert for expert, rank in within if expert not in missing or worths[rank] >= WORTH)
        self._pipeline.prefetch(wanted)
