"""How a step's resident experts are computed: a whole batch at once by the fused kernels, or one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from moert.runtime.fused import FusedExperts
from moert.runtime.layer import LayerCache, Weights
from moert.runtime.routing import Group

Compute = Callable[[torch.Tensor, Weights], torch.Tensor]
"""(hidden [T, D], one expert's tensors) -> [T, D]"""


class ExpertCompute(ABC):
    """Computes resident, locked experts of one layer. Both ways of adding up an expert's output give the same bits."""

    @abstractmethod
    def add(self, groups: Sequence[Group], hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Add each group's outputs times its weights to its tokens' rows of `out`, group after group. Blocks."""

    @abstractmethod
    def outputs(self, groups: Sequence[Group], hidden: torch.Tensor) -> list[torch.Tensor]:
        """For each group its outputs [n, D], not weighted: what `add_weighted` adds in its turn. Blocks."""


def add_weighted(group: Group, output: torch.Tensor, out: torch.Tensor) -> None:
    """Add a group's outputs [n, D] times its weights to its tokens' rows of `out`: a product, then a sum."""
    part = output.to(out.dtype) * group.weights.to(out.dtype).unsqueeze(1)
    if group.tokens is None:
        out += part
    else:
        out.index_add_(0, group.tokens, part)


class OneByOne(ExpertCompute):
    """Expert after expert through a callback: any activation, any layout."""

    def __init__(self, layer: LayerCache, compute: Compute) -> None:
        self._layer = layer
        self._compute = compute

    def add(self, groups: Sequence[Group], hidden: torch.Tensor, out: torch.Tensor) -> None:
        for group in groups:
            add_weighted(group, self._output(group, hidden), out)

    def outputs(self, groups: Sequence[Group], hidden: torch.Tensor) -> list[torch.Tensor]:
        return [self._output(group, hidden) for group in groups]

    def _output(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        return self._compute(group.rows(hidden), self._layer.weights(group.expert))


class Fused(ExpertCompute):
    """All experts of a batch in one call of the kernels of csrc/, on all their threads."""

    def __init__(self, layer: LayerCache, fused: FusedExperts) -> None:
        self._layer = layer
        self._ffn = fused.ffn

    def add(self, groups: Sequence[Group], hidden: torch.Tensor, out: torch.Tensor) -> None:
        experts = [self._layer.fused_expert(group.expert) for group in groups]
        self._ffn.run(hidden, experts, [group.tokens for group in groups], [group.weights for group in groups], out)

    def outputs(self, groups: Sequence[Group], hidden: torch.Tensor) -> list[torch.Tensor]:
        experts = [self._layer.fused_expert(group.expert) for group in groups]
        sizes = [group.weights.shape[0] for group in groups]
        held = torch.zeros(sum(sizes), hidden.shape[1])
        begins = [sum(sizes[:index]) for index in range(len(sizes))]
        self._ffn.run(hidden, experts, [group.tokens for group in groups], [None] * len(groups), held, out_rows=begins)
        return list(held.split(sizes))
