"""What predictions become: reads of missing experts before anybody waits for them, and better choices of who leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from time import perf_counter

import torch

from moert.predictors.base import Ints, Prediction, Predictor
from moert.residency import Residency
from moert.runtime.expectations import Expectations, keys_of
from moert.runtime.layer import LayerCache
from moert.runtime.link import IdleTimes
from moert.runtime.pipeline import Pipeline
from moert.runtime.predictor_guard import PredictorGuard
from moert.schedule._prefetch import Wanted, worth_reading
from moert.trial import Trial
from moert.types import ExpertId

MOST_TOKENS = 32
"""Steps of more tokens need most experts of every layer, which no prediction has to tell."""

WORTH = 0.5
"""As long as the link's idle time is unknown, what is needed at least so often is read."""


ALIKE = 0.05
"""Chances that differ by less are as good as equal."""


class _Look(IntEnum):
    STEP = 0
    ENTRY = 1
    NEXT_PASS = 2


class LookAhead:
    """Prefetches what `predictor` expects, as far as that is worth it, and tells policies that look ahead.

    How often what it expects is needed is learned as it runs (`Expectations`), and so is the time in which nobody waits
    for the link (`IdleTimes`); what is expected to gain more time than it costs is read. Now and then tokens with
    prefetches are timed against tokens without, and they are left off where they do not gain (`Trial`). A predictor
    that fails or takes too long is not called again (`PredictorGuard`). Used by one step at a time.
    """

    def __init__(
        self,
        predictor: Predictor,
        layers: Sequence[LayerCache],
        pipeline: Pipeline,
        clock: Callable[[], float] = perf_counter,
        *,
        prefetch: bool = True,
    ) -> None:
        """Without `prefetch`, policies are told and nothing is read."""
        self._clock = clock
        self._trial = Trial(is_on=prefetch)
        self._prefetches = prefetch
        self._last: tuple[int, float] | None = None
        """Tokens of the first layer's latest step, and when it began."""
        self._predictor = predictor
        self._guard = PredictorGuard(predictor, [layer.spec.num_experts for layer in layers], clock)
        self._layers = layers
        self._pipeline = pipeline
        self._expectations = Expectations()
        self._idle = IdleTimes(len(layers))
        self._hint: Ints | None = None
        self._is_resting = False
        self._passes = 0
        self._observes = type(predictor).observe is not Predictor.observe
        self._has_step = type(predictor).step is not Predictor.step
        self.has_passes = any(
            getattr(type(predictor), name) is not getattr(Predictor, name) for name in ("begin_sequence", "begin_pass")
        )
        """Whether the predictor makes anything of where sequences and passes begin."""
        ahead = [layer.residency.policy.tokens_ahead for layer in layers]
        self._ahead = ahead if predictor.gives_probabilities else [0] * len(layers)
        """Tokens ahead that each layer's policy wants to know of."""

    def begin(self, layer: int, needed: Collection[ExpertId], n_tokens: int = 1) -> None:
        """A step of `layer` needs these experts: learn from it, and give up on the others that were expected."""
        self._is_resting = False
        self._guard.begin_layer(layer)
        if layer == 0:
            self._passes += 1
        if not self._prefetches:
            return
        if layer == 0 and self._guard.is_on:
            self._note_token(n_tokens)
        if n_tokens <= MOST_TOKENS:
            self._idle.begin(layer, self._clock(), self._pipeline.link.drained)
        wrong = self._expectations.begin(layer, needed)
        if wrong:
            self._pipeline.withdraw(wrong)

    def begin_sequence(self) -> None:
        """The passes from here on are of another sequence, or batch of them."""
        self._guard.begin_sequence()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        """A forward pass of T tokens begins; see `Predictor.begin_pass`."""
        self._guard.begin_pass(n_tokens, token_ids, rows)
        hint, self._hint = self._hint, None
        if hint is not None:
            self._guard.hint(hint)

    def hint(self, token_ids: Ints) -> None:
        """These tokens [n] are expected after those of the next pass; see `Predictor.hint`."""
        self._hint = token_ids

    def observe(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        """The tokens have chosen so, both [T, K] on the CPU; for predictors that learn from it."""
        if self._observes and not self.rests(layer):
            experts, weights = top_k_index.detach().numpy(), top_k_weights.detach().float().numpy()
            # They may be the step's own memory.
            experts.flags.writeable = weights.flags.writeable = False
            self._guard.observe(layer, experts, weights)

    def tells(self, layer: int) -> bool:
        """Whether the policy of `layer` goes by what is told, and somebody may have to leave."""
        return self._ahead[layer] > 0 and self._guard.is_on and not self._is_complete(layer)

    def tell(self, layer: int, event: Sequence[ExpertId]) -> None:
        """A step of `layer` is about to begin that needs `event`: tell the policy what will be needed after it.

        Only if somebody may have to leave for it.
        """
        if not self.tells(layer):
            return
        residency = self._layers[layer].residency
        if all(expert in residency for expert in event):
            return
        chances = self._guard.ahead(layer, self._ahead[layer])
        if chances:
            residency.policy.observe_ahead(layer, chances)

    def step(self, layer: int, hidden: torch.Tensor) -> None:
        """The experts of `layer` are given `hidden` [T, D]: ask for what later layers will need. Starts nothing."""
        if self.rests(layer) or not (self._asks or self._has_step):
            return
        with torch.inference_mode():
            predictions = self._guard.step(layer, hidden)
            if not self._asks or len(hidden) > MOST_TOKENS:
                return
            for prediction in predictions:
                self._ask(_Look.STEP, prediction, self._idle_until(layer, prediction.layer))
            if 0 < layer == len(self._layers) - 1:
                following = self._guard.next_pass(0)
                if following is not None:
                    self._ask(_Look.NEXT_PASS, following, self._idle_until(layer, layer + 1))

    def enters(self, layer: int) -> bool:
        """Whether `enter` would do anything."""
        return self._asks and not self._is_idle(layer)

    def enter(self, layer: int, residual: torch.Tensor) -> None:
        """The block of `layer` is given `residual` [T, D]: ask for what its experts will be. Starts nothing."""
        if not self.enters(layer):
            return
        self._idle.enter(layer, self._clock())
        with torch.inference_mode():
            prediction = self._guard.enter(layer, residual)
            if prediction is not None and len(residual) <= MOST_TOKENS:
                self._ask(_Look.ENTRY, prediction, self._idle.until(layer))

    @property
    def _asks(self) -> bool:
        """Whether there are prefetches now."""
        return self._prefetches and self._trial.is_on

    def _note_token(self, n_tokens: int) -> None:
        """Steps of as many tokens as the one before are compared, with and without prefetches."""
        now = self._clock()
        if self._last is not None and n_tokens == self._last[0] <= MOST_TOKENS and not self._is_complete(0):
            self._trial.note(now - self._last[1])
        self._last = (n_tokens, now)

    def rest(self) -> bool:
        """A token goes through all layers, in none of which there is anything to do: whether `begin` may go without."""
        if self.has_passes:
            return False  # what it does there is to be held against what the layers take
        self._passes += 1
        if not self._is_resting:
            self._is_resting = True
            # The time until a step begins again is not that between two layers.
            self._last = None
            self._idle.pause()
            self._guard.pause()
            self._expectations.forget()
        return True

    def rests(self, layer: int) -> bool:
        """Whether `step` would do nothing."""
        return self._is_idle(layer) and self._is_idle(min(layer + 1, len(self._layers) - 1))

    def _is_idle(self, layer: int) -> bool:
        return not self._guard.is_on or not (self._asks or self._ahead[layer]) or self._is_complete(layer)

    def _is_complete(self, layer: int) -> bool:
        """Whether there is nothing to bring up: predicting costs time too."""
        return self._layers[layer].is_complete

    def _idle_until(self, layer: int, later: int) -> float | None:
        """Seconds in which nobody waits for the link, between the events of two layers; None: unknown."""
        waits = self._pipeline.waits
        idle_s: float | None = 0.0
        for between in range(layer, later):
            one = self._idle.after(between, waits)
            idle_s = None if one is None or idle_s is None else idle_s + one
            waits = True
        return idle_s

    def _ask(self, look: _Look, prediction: Prediction, idle_s: float | None) -> None:
        layer, experts = prediction.layer, prediction.experts
        if not experts:
            return
        cache, pipeline = self._layers[layer], self._pipeline
        residency = cache.residency
        # Room for the likeliest only, resident or not: what is brought up for the others would displace them.
        within = [cache.ids[expert] for expert in experts[: residency.capacity]]
        told = {
            expert: key for expert, key in zip(within, keys_of(prediction), strict=False) if expert not in residency
        }
        pipeline.withdraw(self._expectations.expected(layer).difference(told))
        chances = self._expectations.expect(layer, look, told)
        pipeline.dequeue(told)
        under_way = {expert for expert in told if pipeline.is_coming(expert)}
        stays = None if prediction.chances is None else _chances_of_residents(residency, cache.ids, prediction.chances)
        chosen = self._choose(
            {expert: chance for expert, chance in chances.items() if expert not in under_way},
            idle_s,
            None if stays is None else [0.0] * residency.n_free + [chance for chance, _ in stays],
        )
        if stays is None:
            kept = [expert for expert in within if expert not in told]
        else:
            # Who leaves is the policy's to say, among those that are hardly needed now.
            most = max((chance for chance, _ in stays[: max(0, len(chosen) - residency.n_free)]), default=0.0)
            kept = [expert for chance, expert in stays if chance > most + ALIKE]
        residency.expect([*kept, *under_way, *chosen])
        passes = self._passes + (look is _Look.NEXT_PASS)
        pipeline.prefetch(chosen, due=passes * len(self._layers) + layer)

    def _choose(
        self, chances: dict[ExpertId, float], idle_s: float | None, losses: Sequence[float] | None
    ) -> list[ExpertId]:
        """Those to read, in order. `losses` are chances that those who leave for them are needed; None: unknown."""
        link = self._pipeline.link
        busy_s = link.read_s(self._pipeline.bytes_ahead)
        if idle_s is None or busy_s is None:
            return [expert for expert, chance in chances.items() if chance >= WORTH]
        wanted = []
        for expert, chance in chances.items():
            layer = self._layers[expert.layer]
            read_s = link.read_s(layer.read_bytes(expert.expert))
            begun_s = link.read_s(layer.begun_bytes(expert.expert))
            assert read_s is not None and begun_s is not None
            wanted.append(Wanted(expert, chance, read_s, begun_s))
        return worth_reading(wanted, idle_s - busy_s, losses)


def _chances_of_residents(
    residency: Residency, ids: Sequence[ExpertId], chances: Sequence[float]
) -> list[tuple[float, ExpertId]]:
    """Those who may leave with the chances that they are needed, ascending."""
    return sorted((chances[expert.expert], expert) for expert in ids if expert in residency)
