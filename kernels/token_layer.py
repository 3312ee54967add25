"""One token through a whole layer on the CPU, in one call: attention, router and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moert import _C
from moert.kernels.moe_block import ExpertTable, Picks, TokenBlock
from moert.kernels.self_attention import SelfAttention


class LayerOutput(NamedTuple):
    """What becomes of a token in a layer; new memory."""

    hidden: torch.Tensor
    """Like x: x plus what the attention gives."""
    normed: torch.Tensor
    """Like x: what router and experts are given."""
    ids: torch.Tensor
    """[1, K] int64, the best first."""
    weights: torch.Tensor
    """[1, K] fp32, rounded as the router does."""
    logits: torch.Tensor
    """[1, E]"""
    shared: torch.Tensor | None
    """Like x: what the shared expert gives; None where there is none."""
    output: torch.Tensor | None
    """Like x: `hidden` plus what the experts give; None: they have not been computed."""
    experts_s: float
    """Seconds that the experts took."""


class TokenLayer:
    """h = x + attention(norm(x)), and then h + block(norm(h)).

    A token through it gives the very bits that the parts give one after the other.
    """

    def __init__(self, attention: SelfAttention, block: TokenBlock) -> None:
        """`attention` has norms before and after it; weights are read where they are, and kept alive.

        Raises:
            ValueError: the parts do not fit together.
        """
        self.attention, self.block = attention, block
        self.shape = block.shape
        """What layers that run together have in common."""
        self.plan = _C.token_layer(attention.capsule, block.plan)

    def run(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
        experts: ExpertTable | None,
    ) -> LayerOutput | None:
        """One token of one sequence; as `SelfAttention.run`. Blocks.

        Experts are not computed without a table of them, or if one that is picked is not in it or weighs 0.

        Returns:
            None, and nothing is written, where the kernel is not for these tensors.
        """
        y, normed, output = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        picks = Picks(self.block, x)
        took = self.compute(
            (x, cos, sin, keys, values, tokens), y, normed, picks.arguments(0, experts, output.data_ptr())
        )
        return None if took is None else LayerOutput(y, *picks.found(normed, output, took))

    def compute(
        self,
        token: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
        hidden: torch.Tensor,
        normed: torch.Tensor,
        picks: tuple[Any, ...],
    ) -> float | None:
        """As `run` of `token`, into memory that the caller has: `hidden` and `normed` like x, and that of `picks`, as
        `Picks.arguments` gives it. The seconds that the experts took, below 0 where they were not computed."""
        x, cos, sin, keys, values, tokens = token
        attention = self.attention
        angles = attention.angles(cos, sin) if attention.takes(x) else None
        arguments = angles and attention.arguments(
            x.data_ptr(), angles, keys, values, tokens, hidden.data_ptr(), normed.data_ptr()
        )
        if arguments is None:
            return None
        (took,) = _C.run_layers([(self.plan, arguments, picks, None)])
        return took

    def finish(self, found: LayerOutput, experts: torch.Tensor) -> torch.Tensor:
        """The output for what `run` left without, once somebody has computed the experts [1, D]."""
        return found.hidden + self.block.finish(found, experts)


class LayersOutput(NamedTuple):
    """What becomes of a token in L layers one after the other; new memory."""

    outputs: torch.Tensor
    """[L, ..., D], each like x."""
    handed: torch.Tensor
    """The same once more, in memory of its own, for whoever may write to it."""
    normed: torch.Tensor
    """[L, ..., D]: what router and experts of each were given."""
    ids: torch.Tensor
    """[L, 1, K] int64."""
    weights: torch.Tensor
    """[L, 1, K] fp32."""
    logits: torch.Tensor
    """[L, 1, E]"""
    experts_s: list[float]
    """Seconds that the experts of each layer took. As long as layers have run whole; the rest is of no meaning."""


class LayersOneByOne:
    """One token through layers one after the other, with memory for all of them.

    As `TokenLayer.run` of each; whoever has to look in between who was picked can.
    """

    def __init__(self, layers: Sequence[TokenLayer], x: torch.Tensor) -> None:
        """`layers` are of one `shape`, and take tokens like `x`."""
        self._layers, self._at = layers, 0
        count = len(layers)
        hidden, normed, outputs = (part.unbind(0) for part in x.new_empty((3, count, *x.shape)).unbind(0))
        self._picks = picks = Picks(layers[0].block, x, count)
        shared: Sequence[torch.Tensor | None] = [None] * count if picks.shared is None else picks.shared.unbind(0)
        found = (picks.ids.unbind(0), picks.weights.unbind(0), picks.logits.unbind(0))
        self._memory = list(zip(hidden, normed, *found, shared, strict=True))
        self._outputs = outputs

    def run(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
        experts: ExpertTable | None,
    ) -> LayerOutput | None:
        """As `TokenLayer.run` of the next layer, whether the one before has been run or not."""
        at, self._at = self._at, self._at + 1
        layer, output = self._layers[at], self._outputs[at]
        hidden, normed, ids, weights, logits, shared = self._memory[at]
        picks = self._picks.arguments(at, experts, output.data_ptr())
        took = layer.compute((x, cos, sin, keys, values, tokens), hidden, normed, picks)
        if took is None:
            return None
        return LayerOutput(hidden, normed, ids, weights, logits, shared, None if took < 0 else output, took)

    def finish(self, found: LayerOutput, experts: torch.Tensor) -> torch.Tensor:
        """As `TokenLayer.finish` of the layer that has just been run."""
        return self._layers[self._at - 1].finish(found, experts)


def run_layers(
    layers: Sequence[TokenLayer],
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
    experts: Sequence[ExpertTable],
) -> LayersOutput | None:
    """As `TokenLayer.run` of each on what the one before gave, in one call; ends where experts cannot be computed.

    Args:
        layers: of one `shape`.
        places: keys, values and tokens of each.

    Returns:
        None, and nothing is written, where the kernel is not for these tensors.
    """
    angles = layers[0].attention.angles(cos, sin)
    if angles is None or not layers[0].attention.takes(x):
        return None
    count = len(layers)
    outputs, handed, normed = x.new_empty((3, count, *x.shape)).unbind(0)
    picks = Picks(layers[0].block, x, count)
    hidden = torch.empty_like(x)
    hidden_at, outputs_at, normed_at = hidden.data_ptr(), outputs.data_ptr(), normed.data_ptr()
    handed_at = handed.data_ptr()
    step, before = x.numel() * x.element_size(), x.data_ptr()
    calls: list[tuple[Any, ...]] = []
    for i, (layer, place, table) in enumerate(zip(layers, places, experts, strict=True)):
        token = layer.attention.arguments(before, angles, *place, hidden_at, normed_at + i * step)
        if token is None:
            return None
        before = outputs_at + i * step
        calls.append((layer.plan, token, picks.arguments(i, table, before), handed_at + i * step))
    seconds = _C.run_layers(calls)
    return LayersOutput(
        outputs, handed, normed, picks.ids, picks.weights, picks.logits, [took for took in seconds if took >= 0]
    )
