"""What policies are told besides events: where sequences begin, and the router's scores. Only if one wants to know."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from moert.hf.forwards import Forward, ForwardWatch
from moert.hf.scores import ScoreTap
from moert.policies import Policy
from moert.runtime.runtime import OffloadRuntime
from moert.trace.scores import mean_scores

if TYPE_CHECKING:
    from moert.hf.experts import OffloadedExperts


class PolicyFeed:
    """The hooks that tell a model's policies; none where its policies do not override what would be called."""

    def __init__(self, model: nn.Module, modules: Mapping[str, OffloadedExperts], runtime: OffloadRuntime) -> None:
        """`modules` are those that `runtime` runs."""
        self._runtime = runtime
        self._watch: ForwardWatch | None = None
        self._taps: list[ScoreTap] = []
        self._failed = False
        policies = [type(layer.residency.policy) for layer in runtime.layers]
        if any(policy.begin_sequence is not Policy.begin_sequence for policy in policies):
            self._watch = ForwardWatch(model, self._begin)
        if any(policy.observe_scores is not Policy.observe_scores for policy in policies):
            for path, module in modules.items():
                tap = ScoreTap(model, path, module.adapter.num_experts + module.adapter.num_identity)
                self._taps.append(tap)
                module.scores = functools.partial(self._take, tap, module.adapter.num_experts)

    def remove(self) -> None:
        """Take the hooks out. Idempotent."""
        if self._watch is not None:
            self._watch.remove()
        for tap in self._taps:
            tap.remove()

    def _begin(self, forward: Forward) -> None:
        if forward.is_new:
            self._runtime.begin_sequence()

    def _take(self, tap: ScoreTap, num_experts: int, ids: torch.Tensor, weights: torch.Tensor) -> list[float] | None:
        scores = tap.take(ids, weights)
        if scores is not None:
            return mean_scores(scores[:, :num_experts].cpu().numpy())
        if ids.shape[0] and not self._failed:
            self._failed = True
            policy = self._runtime.config.policy
            warnings.warn(
                f"no module of this model puts out the router's scores, which policy={policy!r} decides by: it goes by "
                "the experts that were chosen alone",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
