"""One token through a router and its experts on the CPU, in one call, with the experts that every token has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moert import _C
from moert.kernels.cpu_ffn import Expert, ExpertFfn
from moert.kernels.cpu_matrix import NUMBERS
from moert.kernels.projection import Projection, check_plain, projection_arguments
from moert.kernels.router_rule import RouterRule

_LANES = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
"""Numbers that torch adds at once."""


class TokenRouter(NamedTuple):
    """A router whose logits are a product in the block's dtype, or in fp32."""

    weight: torch.Tensor
    """[E, D] in the block's dtype, or in fp32 for logits in fp32."""
    bias: torch.Tensor | None
    """[E] in the dtype of `weight`, added to the product."""
    rule: RouterRule
    weights_dtype: torch.dtype
    """What the picks' weights are rounded to."""
    logits_dtype: torch.dtype | None = None
    """fp32 for a product of fp32, as of a weight that is cast to it; None: the dtype of `weight`."""
    correction: torch.Tensor | None = None
    """[E], added to the scores where they are compared; they weigh without it."""
    left_out: float = -math.inf
    """The score of experts of groups that are not kept."""
    steps_dtype: torch.dtype = torch.float32
    """What the result of every step is rounded to."""
    is_sorted: bool = True
    """False: picks come in the order of `torch.topk(sorted=False)`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.logits_dtype or self.weight.dtype

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the extension takes of how it picks."""
        rule, correction = self.rule, self.correction
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
            self.left_out,
            self.is_sorted,
            None if correction is None else correction.data_ptr(),
            "fp32" if correction is None else NUMBERS[correction.dtype],
            _LANES,
            NUMBERS[self.steps_dtype],
            NUMBERS[self.weights_dtype],
        )


class SharedExpert(NamedTuple):
    """down(curve(gate(x)) * up_curve(up(x))), or down(curve(up(x))), each step rounded to the dtype."""

    up: Projection
    """[F, D]"""
    down: Projection
    """[D, F]"""
    curve: torch.Tensor
    """[65536]: what becomes of each number of the dtype, by its bits."""
    gate: Projection | None = None
    """[F, D]"""
    up_curve: torch.Tensor | None = None
    """As `curve`, where there is a gate; None: nothing changes."""
    share: Projection | None = None
    """[1, D]: what the result is multiplied by is `share_curve` of it."""
    share_curve: torch.Tensor | None = None
    """As `curve`."""


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


class BlockOutput(NamedTuple):
    """What becomes of a token in a block; new memory, but for `normed`."""

    normed: torch.Tensor
    """What it is given."""
    ids: torch.Tensor
    """[1, K] int64, the best first."""
    weights: torch.Tensor
    """[1, K] fp32, rounded as the router does."""
    logits: torch.Tensor
    """[1, E]"""
    shared: torch.Tensor | None
    """Like x: what the shared expert gives; None where there is none."""
    output: torch.Tensor | None
    """Like x; None: the experts have not been computed."""
    experts_s: float
    """Seconds that the experts took."""


class Picks:
    """New memory for what L blocks that are alike make of a token, beside their outputs."""

    def __init__(self, block: TokenBlock, x: torch.Tensor, *count: int) -> None:
        """`count` is L, or nothing for one block, which has no dimension then."""
        self.ids = torch.empty((*count, 1, block.top_k), dtype=torch.int64)
        self.weights = torch.empty((*count, 1, block.top_k), dtype=torch.float32)
        self.logits = torch.empty((*count, 1, block.num_experts), dtype=block.logits_dtype)
        self.shared = x.new_empty((*count, *x.shape)) if block.has_shared else None
        self._steps = (
            8 * block.top_k,
            4 * block.top_k,
            block.num_experts * self.logits.element_size(),
            x.numel() * x.element_size(),
        )

    def arguments(self, place: int, experts: ExpertTable | None, y: int) -> tuple[Any, ...]:
        """What the extension takes for the block at `place`, whose output goes to the address `y`."""
        ids, weights, logits, shared = self._steps
        return (
            self.ids.data_ptr() + place * ids,
            self.weights.data_ptr() + place * weights,
            self.logits.data_ptr() + place * logits,
            None if self.shared is None else self.shared.data_ptr() + place * shared,
            None if experts is None else experts.capsule,
            y,
        )

    def found(self, normed: torch.Tensor, output: torch.Tensor, took: float) -> BlockOutput:
        """What has become of a token in one block; `took` is the extension's answer, below 0 where it left the experts
        out."""
        return BlockOutput(normed, self.ids, self.weights, self.logits, self.shared, None if took < 0 else output, took)


class TokenBlock:
    """experts(x) of those that a router picks, times `scale`, plus what a shared expert gives.

    A token through it gives the very bits that the parts give one after the other. Of experts with equal scores those
    are picked that `torch.topk` picks.
    """

    def __init__(
        self, router: TokenRouter, ffn: ExpertFfn, shared: SharedExpert | None = None, scale: float = 1.0
    ) -> None:
        """Weights are read where they are, and kept alive.

        Raises:
            ValueError: the parts do not fit together.
        """
        self.hidden, self.dtype, self.logits_dtype = ffn.hidden, ffn.dtype, router.dtype
        self.top_k, self.num_experts = router.rule.top_k, router.weight.shape[0]
        self.has_shared, self._scale = shared is not None, scale
        self.shape = (self.hidden, self.num_experts, self.top_k, self.dtype, self.logits_dtype, self.has_shared)
        """What blocks that run together have in common."""
        check_plain("a router", (router.weight, router.bias), router.weight.dtype)
        for name, vector in (("bias", router.bias), ("correction", router.correction)):
            if vector is not None and (vector.shape != (self.num_experts,) or not vector.is_contiguous()):
                raise ValueError(f"a {name} {list(vector.shape)} for {self.num_experts} experts")
        self._kept = (router, shared)
        self.plan = _C.moe_block(
            NUMBERS[self.dtype],
            self.hidden,
            (*projection_arguments((router.weight, router.bias)), NUMBERS[router.dtype]),
            router.arguments,
            ffn.arguments,
            ffn.width,
            scale,
            None if shared is None else self._shared(shared),
        )

    def _shared(self, shared: SharedExpert) -> tuple[Any, ...]:
        projections = (shared.gate, shared.up, shared.down, shared.share)
        tensors = [tensor for projection in projections if projection is not None for tensor in projection]
        check_plain("a shared expert", tensors, self.dtype)
        if shared.share is not None and shared.share_curve is None:
            raise ValueError("a share needs a curve")
        curves = (shared.curve, shared.up_curve, shared.share_curve)
        for curve in curves:
            if curve is not None and (
                curve.shape != (1 << 16,) or curve.dtype is not self.dtype or not curve.is_contiguous()
            ):
                raise ValueError(f"a curve says what becomes of each of the 65536 numbers of {self.dtype}")
        return (
            *(None if projection is None else projection_arguments(projection) for projection in projections),
            *(None if curve is None else curve.data_ptr() for curve in curves),
        )

    def run(self, x: torch.Tensor, experts: ExpertTable | None) -> BlockOutput | None:
        """One token [..., D] of D numbers. Blocks.

        Experts are not computed without a table of them, or if one that is picked is not in it or weighs 0.

        Returns:
            None, and nothing is written, where the kernel is not for this tensor: other than plain, on the CPU and in
            the block's dtype, or not of D numbers that follow one another.
        """
        if (
            x.dtype is not self.dtype
            or x.shape[-1] != self.hidden
            or x.numel() != self.hidden
            or not (x.is_contiguous() and x.is_cpu)
        ):
            return None
        picks, output = Picks(self, x), torch.empty_like(x)
        took = _C.run_block(self.plan, x.data_ptr(), picks.arguments(0, experts, output.data_ptr()))
        return picks.found(x, output, took)

    def finish(self, found: Any, experts: torch.Tensor) -> torch.Tensor:
        """The output for what `run` left without, once somebody has computed the experts [1, D]."""
        output = experts if self._scale == 1 else experts * self._scale
        return output.view_as(found.normed) if found.shared is None else output + found.shared


def pick(router: TokenRouter, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The picks of one token: ids [K] int64, the best first, and weights [K], fp32 but rounded as the router does.

    Args:
        logits: [E] fp32, contiguous, on the CPU.

    Raises:
        ValueError: more picks than there are experts, groups that do not divide them.
    """
    top_k = router.rule.top_k
    ids = torch.empty(top_k, dtype=torch.int64)
    weights = torch.empty(top_k, dtype=torch.float32)
    _C.pick(router.arguments, logits.data_ptr(), len(logits), ids.data_ptr(), weights.data_ptr())
    return ids, weights
