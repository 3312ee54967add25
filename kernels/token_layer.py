"""One token through a whole layer on the CPU, in one call: attention, router and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moert import _C
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.cpu_matrix import NUMBERS, Matrix
from moert.kernels.router_rule import RouterRule
from moert.kernels.self_attention import SelfAttention


class TokenRouter(NamedTuple):
    """A router whose logits are a product in the layer's dtype."""

    weight: torch.Tensor
    """[E, D]"""
    bias: torch.Tensor | None
    """[E], added to the product."""
    rule: RouterRule
    weights_dtype: torch.dtype
    """What the picks' weights are rounded to."""


class ExpertTable:
    """All experts of a layer, by id; keeps them alive."""

    __slots__ = ("_experts", "capsule")

    def __init__(self, ffn: ExpertFfn, experts: Sequence[Expert]) -> None:
        """
        Raises:
            ValueError: an expert is not of the layer.
        """
        self._experts = tuple(experts)
        capsules = [expert.capsule for expert in self._experts]
        self.capsule = _C.expert_table(ffn.hidden, ffn.width, ffn.gate.gated, capsules)


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
    """[1, E] in the layer's dtype."""
    output: torch.Tensor | None
    """Like x: `hidden` plus what the experts give; None: they have not been computed."""
    experts_s: float
    """Seconds that the experts took."""


class TokenLayer:
    """h = x + attention(norm(x)), and then h + experts(norm(h)), whose experts a router picks.

    A token through it gives the very bits that the parts give one after the other. Of experts with equal scores those
    are picked that `torch.topk` picks.
    """

    def __init__(self, attention: SelfAttention, router: TokenRouter, ffn: ExpertFfn) -> None:
        """`attention` has norms before and after it; weights are read where they are, and kept alive.

        Raises:
            ValueError: the parts do not fit together.
        """
        weight, bias, rule, dtype = router
        if weight.dtype is not attention.dtype or ffn.dtype is not attention.dtype or ffn.hidden != attention.hidden:
            raise ValueError(
                f"an attention of {attention.hidden} numbers in {attention.dtype} does not go with a router in "
                f"{weight.dtype} and experts of {ffn.hidden} numbers in {ffn.dtype}"
            )
        self.attention, self.top_k, self.num_experts = attention, rule.top_k, weight.shape[0]
        self.shape = (attention.hidden, self.num_experts, self.top_k, attention.dtype)
        """D, E, K and the dtype: what layers that run together have in common."""
        self._kept = (weight, bias)
        self.plan = _C.token_layer(
            attention.capsule,
            (Matrix("plain", weight).capsule, None if bias is None else bias.data_ptr()),
            _arguments(rule, dtype),
            ffn.arguments,
            ffn.width,
        )

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
        arguments = self.attention.arguments(x, cos, sin, keys, values, tokens, y, normed)
        if arguments is None:
            return None
        ids = torch.empty((1, self.top_k), dtype=torch.int64)
        weights = torch.empty((1, self.top_k), dtype=torch.float32)
        logits = torch.empty((1, self.num_experts), dtype=x.dtype)
        table = None if experts is None else experts.capsule
        (took,) = _C.run_layers(
            [(self.plan, arguments, ids.data_ptr(), weights.data_ptr(), logits.data_ptr(), table, output.data_ptr())]
        )
        return LayerOutput(y, normed, ids, weights, logits, None if took < 0 else output, took)


class LayersOutput(NamedTuple):
    """What becomes of a token in L layers one after the other; new memory."""

    outputs: torch.Tensor
    """[L, ..., D], each like x."""
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
        layers: of one dtype, hidden size and number of experts and of picks.
        places: keys, values and tokens of each.

    Returns:
        None, and nothing is written, where the kernel is not for these tensors.
    """
    count, top_k = len(layers), layers[0].top_k
    outputs, normed = (torch.empty((count, *x.shape), dtype=x.dtype) for _ in range(2))
    hidden = torch.empty_like(x)
    ids = torch.empty((count, 1, top_k), dtype=torch.int64)
    weights = torch.empty((count, 1, top_k), dtype=torch.float32)
    logits = torch.empty((count, 1, layers[0].num_experts), dtype=x.dtype)
    step, before = x.numel() * x.element_size(), x.data_ptr()
    calls = []
    for i, (layer, place, table) in enumerate(zip(layers, places, experts, strict=True)):
        arguments = layer.attention.arguments(x, cos, sin, *place, hidden, hidden)
        if arguments is None:
            return None
        output = outputs.data_ptr() + i * step
        calls.append(
            (
                layer.plan,
                (before, *arguments[1:-1], normed.data_ptr() + i * step),
                ids.data_ptr() + i * 8 * top_k,
                weights.data_ptr() + i * 4 * top_k,
                logits.data_ptr() + i * logits.shape[2] * logits.element_size(),
                table.capsule,
                output,
            )
        )
        before = output
    seconds = _C.run_layers(calls)
    return LayersOutput(outputs, normed, ids, weights, logits, [took for took in seconds if took >= 0])


def pick(rule: RouterRule, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The picks of one token: ids [K] int64, the best first, and weights [K], fp32 but rounded to `dtype`.

    Args:
        logits: [E] fp32, contiguous, on the CPU.

    Raises:
        ValueError: more picks than there are experts, groups that do not divide them.
    """
    ids = torch.empty(rule.top_k, dtype=torch.int64)
    weights = torch.empty(rule.top_k, dtype=torch.float32)
    _C.pick(_arguments(rule, dtype), logits.data_ptr(), len(logits), ids.data_ptr(), weights.data_ptr())
    return ids, weights


def _arguments(rule: RouterRule, dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        rule.scores,
        rule.weights,
        rule.top_k,
        rule.normalise,
        rule.epsilon,
        rule.scale,
        rule.groups,
        rule.kept_groups,
        rule.group_score == "top2",
        None,
        NUMBERS[dtype],
    )
