"""The next layer's router, asked early about what its input will probably be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moert.kernels.norm import rms_norm
from moert.predictors._ranking import rank
from moert.predictors.base import Prediction, Predictor, Router

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
        self._mean = torch.zeros(2, width)
        self._moments = torch.zeros(2, width)
        """Variance of the source, covariance of both."""
        self._gain = torch.ones(width)
        self._offset = torch.zeros(width)
        self._applied: tuple[torch.Tensor, torch.Tensor] | None = None
        """Gain and offset in the dtype of what they are applied to."""
        self._steps = 0

    def apply(self, source: torch.Tensor) -> torch.Tensor:
        """The expected target of each row of `source` [T, D], in its dtype."""
        if self._applied is None or self._applied[0].dtype is not source.dtype:
            self._applied = (self._gain.to(source.dtype), self._offset.to(source.dtype))
        return torch.addcmul(self._applied[1], source, self._applied[0])

    def learn(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`source` became `target`, both [T, D]."""
        few = len(source) < FEW_TOKENS
        self._steps += 1
        if few and self._steps % EVERY and self._steps > EVERY:
            return
        both = torch.stack((source.float(), target.float()))
        apart = both - (self._mean if few else both.mean(1))[:, None]
        moments = (apart * apart[:1]).mean(1)
        share = SHARE if few and self._steps > 1 else 1.0
        self._mean.lerp_(both.mean(1), share)
        if not few or self._steps > 1:
            self._moments.lerp_(moments, share)
        known = self._moments[0] > 0
        self._gain = torch.where(known, self._moments[1] / self._moments[0], self._gain)
        self._offset = self._mean[1] - self._gain * self._mean[0]
        self._applied = None


class GateAheadCorrected(Predictor):
    """Gate-ahead in two looks, each corrected by what the layers in between have been seen to do.

    The first look is from a layer's experts' input to the next layer's, as in `gate_ahead`: it leaves the most time.
    The second is from the residual stream at the beginning of the next layer's block, which only the attention there
    is missing from. For either, each channel's gain and offset are learned as the model runs: the norms' weights and
    the mean of what is added are in them. A long prompt sets them, and single tokens keep them up to date.
    """

    def __init__(self, routers: Sequence[Router | None]) -> None:
        super().__init__(routers)
        self._from_step: dict[int, _Channels] = {}
        self._from_entry: dict[int, _Channels] = {}
        self._hidden: tuple[int, torch.Tensor] | None = None
        self._entered: tuple[int, torch.Tensor] | None = None
        self._ones: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def step(self, layer: int, hidden: torch.Tensor) -> Sequence[Prediction]:
        if self._hidden is not None and self._hidden[0] == layer - 1:
            self._learn(self._from_step, layer, self._hidden[1], hidden)
        if self._entered is not None and self._entered[0] == layer:
            self._learn(self._from_entry, layer, self._entered[1], hidden)
        self._hidden = (layer, hidden)
        self._entered = None
        return [] if (found := self._look(self._from_step, layer + 1, hidden)) is None else [found]

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        scaled = self._scaled(residual)
        self._entered = (layer, scaled)
        return self._look(self._from_entry, layer, scaled)

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

    def _learn(self, known: dict[int, _Channels], layer: int, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.shape != target.shape:
            return
        if layer not in known:
            known[layer] = _Channels(target.shape[1])
        known[layer].learn(source, target)

    def _look(self, known: dict[int, _Channels], layer: int, source: torch.Tensor) -> Prediction | None:
        router = self.routers[layer] if layer < len(self.routers) else None
        if router is None or router.weight.shape[1] != source.shape[1]:
            return None
        channels = known.get(layer)
        return rank(layer, router, source if channels is None else channels.apply(source))
