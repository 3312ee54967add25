"""How a step's resident experts are computed: a whole batch at once by the fused kernels, or one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from moert.kernels.cpu_ffn import add_rows
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
    if output.dtype is out.dtype is group.weights.dtype is torch.float32 and output.is_contiguous():
        add_rows(output, group.tokens, group.weights, out)
        return
    part = output.to(out.dtype) * group.weights.to(out.dtype).unsqueeze(1)
    if group.tokens is None:
        out += part
    else:
        out.index_add_(0, group.tokens, part)


class Scratch:
    """Memory for outputs that wait for their turn, the same in each step: new memory costs more than filling it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def clear(self) -> None:
        """What has been taken is in use no more."""
        if self._used > self._memory.numel():
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                self._memory = torch.empty(self._used)
        self._used = 0

    def take(self, rows: int, width: int) -> torch.Tensor:
        """[rows, width] of fp32 zeros, the caller's until `clear`."""
        begin, self._used = self._used, self._used + rows * width
        if self._used > self._memory.numel():
            return torch.zeros(rows, width)
        return self._memory[begin : self._used].view(rows, width).zero_()


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
        return self._compute(group.rows(hidden), self._layer.own_weights(group.expert))


class Fused(ExpertCompute):
    """All experts of a batch in one call of the kernels of csrc/, on all their threads."""

    def __init__(self, layer: LayerCache, fused: FusedExperts, scratch: Scratch) -> None:
        self._layer = layer
        self._ffn = fused.ffn
        self._scratch = scratch

    def add(self, groups: Sequence[Group], hidden: torch.Tensor, out: torch.Tensor) -> None:
        experts = [self._layer.fused_expert(group.expert) for group in groups]
        self._ffn.run(hidden, experts, [group.tokens for group in groups], [group.weights for group in groups], out)

    def outputs(self, groups: Sequence[Group], hidden: torch.Tensor) -> list[torch.Tensor]:
        experts = [self._layer.fused_expert(group.expert) for group in groups]
        sizes = [group.weights.shape[0] for group in groups]
        held = self._scratch.take(sum(sizes), hidden.shape[1])
        begins = [sum(sizes[:index]) for index in range(len(sizes))]
        self._ffn.run(hidden, experts, [group.tokens for group in groups], [None] * len(groups), held, out_rows=begins)
        return list(held.split(sizes))
