"""The next layer's router, asked early about what its input will probably be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.kernels.gate_look import Lines, is_for
from moert.kernels.norm import rms_norm
from moert.predictors._checks import check_from_to
from moert.predictors._ranking import Looks
from moert.predictors.base import MOST_LAYERS, Floats, Model, Need, Prediction, Predictor

FEW_TOKENS = 16
"""A step of fewer tokens changes what has been learned little by little; one of more says it anew."""

SHARE = 0.1
"""Of such a step in what has been learned."""

EPS = 1e-12
"""Added to a mean square, which may be 0."""

EVERY = 4
"""Of so many such steps one is learned from: what is learned changes slowly, and learning takes time."""


class _Channels:
    """What will become of each channel of a vector, by linear regression on what became of it before."""

    def __init__(self, width: int) -> None:
        self.lines = Lines(width)
        self._steps = 0

    def apply(self, source: torch.Tensor) -> torch.Tensor:
        """The expected target of each row of `source` [T, D], in its dtype."""
        return torch.addcmul(self.lines.offset, source.float(), self.lines.gain).to(source.dtype)

    def learn(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`source` became `target`, both [T, D]."""
        few = len(source) < FEW_TOKENS
        self._steps += 1
        if few and self._steps % EVERY and self._steps > EVERY:
            return
        if len(source) == 1 and is_for(source) and is_for(target):
            first = self._steps == 1
            self.lines.learn(source, target, 1.0 if first else SHARE, moments=not first)
            return
        both = torch.stack((source.float(), target.float()))
        if not both.sum().isfinite():
            return
        lines = self.lines
        apart = both - (lines.mean if few else both.mean(1))[:, None]
        moments = (apart * apart[:1]).mean(1)
        share = SHARE if few and self._steps > 1 else 1.0
        lines.mean.lerp_(both.mean(1), share)
        if not few or self._steps > 1:
            lines.moments.lerp_(moments, share)
        known = lines.moments[0] > 0
        lines.gain.copy_(torch.where(known, lines.moments[1] / lines.moments[0], lines.gain))
        lines.offset.copy_(lines.mean[1] - lines.gain * lines.mean[0])


class GateAheadCorrected(Predictor):
    """Gate-ahead in two looks, each corrected by what the layers in between have been seen to do.

    The first look is from a layer's experts' input to the next layer's, as in `gate_ahead`: it leaves the most time.
    The second is from the residual stream at the beginning of the next layer's block, which only the attention there
    is missing from. For either, each channel's gain and offset are learned as the model runs: the norms' weights and
    the mean of what is added are in them. A long prompt sets them, and single tokens keep them up to date.
    """

    needs = frozenset({Need.HIDDEN, Need.ROUTERS})

    def __init__(self, model: Model, ahead: int = 1) -> None:
        """A predictor whose first look goes to the next `ahead` layers.

        Raises:
            ConfigError: `ahead` is out of range.
        """
        super().__init__(model)
        self.ahead = check_from_to("gate_ahead_corrected", "ahead", ahead, 1, MOST_LAYERS)
        self._looks = Looks()
        self._from_step: dict[tuple[int, int], _Channels] = {}
        """(layer, how far ahead it was looked at) -> what happens on the way."""
        self._from_entry: dict[tuple[int, int], _Channels] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        """Layer -> what its experts were given in this pass, of the latest layers."""
        self._entered: tuple[int, torch.Tensor] | None = None
        self._ones: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> Sequence[Prediction]:
        self._looks.forget()
        if hidden is None:
            return []
        for gap in range(1, self.ahead + 1):
            if layer - gap in self._hidden:
                self._learn(self._from_step, (layer, gap), self._hidden[layer - gap], hidden)
        if self._entered is not None and self._entered[0] == layer:
            self._learn(self._from_entry, (layer, 0), self._entered[1], hidden)
        self._hidden = {known: self._hidden[known] for known in self._hidden if layer - self.ahead < known < layer}
        self._hidden[layer] = hidden
        self._entered = None
        looks = (self._look(self._from_step, (layer + gap, gap), hidden) for gap in range(1, self.ahead + 1))
        return [found for found in looks if found is not None]

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        router = self.model.router(layer)
        if (
            len(residual) == 1
            and is_for(residual)
            and router is not None
            and router.weight.shape[1:] == residual[0].shape
        ):
            kernel = self._looks.kernel(layer, router)
            if kernel is not None:
                scaled = torch.empty(residual.shape)
                self._entered = (layer, scaled)
                lines = self._lines(self._from_entry, (layer, 0))
                return self._looks.note(layer, router, *kernel.best(residual, lines, EPS, scaled))
        scaled = self._scaled(residual)
        self._entered = (layer, scaled)
        return self._look(self._from_entry, (layer, 0), scaled)

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        return None if tokens else self._looks.scores(layer, self.model.num_experts[layer])

    def _scaled(self, residual: torch.Tensor) -> torch.Tensor:
        """Each row [D] of `residual` over the root of its mean square."""
        key = (residual.shape[-1], residual.dtype)
        if key not in self._ones:
            self._ones[key] = torch.ones(key[0], dtype=key[1])
        scaled = rms_norm(residual, self._ones[key], EPS, "before_rounding")
        if scaled is None:
            scaled = residual.float()
            scaled = scaled * (scaled.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return scaled

    def _learn(
        self, known: dict[tuple[int, int], _Channels], key: tuple[int, int], source: torch.Tensor, target: torch.Tensor
    ) -> None:
        if source.shape != target.shape or not len(target):
            return
        if key not in known:
            known[key] = _Channels(target.shape[1])
        known[key].learn(source, target)

    def _look(
        self, known: dict[tuple[int, int], _Channels], key: tuple[int, int], source: torch.Tensor
    ) -> Prediction | None:
        router = self.model.router(key[0])
        if router is None or router.weight.shape[1] != source.shape[1]:
            return None
        if len(source) == 1 and is_for(source) and (kernel := self._looks.kernel(key[0], router)) is not None:
            return self._looks.note(key[0], router, *kernel.best(source, self._lines(known, key)))
        channels = known.get(key)
        return self._looks.look(key[0], router, source if channels is None else channels.apply(source))

    @staticmethod
    def _lines(known: dict[tuple[int, int], _Channels], key: tuple[int, int]) -> Lines | None:
        channels = known.get(key)
        return None if channels is None else channels.lines
