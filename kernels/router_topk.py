"""The experts that a router picks from its logits, how much each weighs, and how often each is picked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch, power_of_2_from
from moert.kernels.bank import FLOATS
from moert.kernels.dispatch import Counts, check_tensor
from moert.kernels.router_rule import RouterRule

MOST_EXPERTS = 4096
"""That one program can hold a token's logits of."""


@triton.jit
def _key(scores: tl.tensor) -> tl.tensor:
    """int32 in the order of the fp32 scores: -0 as 0, NaN above all, nothing as low as -2^31."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores != scores, 0x7FC00000, key)


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    table_ptr: tl.tensor,
    tokens: tl.tensor,
    RULE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    NONE: tl.constexpr = -2147483648
    K: tl.constexpr = RULE.top_k
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real = (e < E)[None, :]
    places = token[:, None].to(tl.int64) * E + e[None, :]
    logits = tl.load(logits_ptr + places, mask=(token < tokens)[:, None] & real, other=0.0).to(tl.float32)
    if RULE.scores == "softmax":
        top = tl.max(tl.where(real, logits, float("-inf")), axis=1)
        powers = tl.where(real, tl.exp(logits - top[:, None]), 0.0)
        scores = powers / tl.sum(powers, axis=1)[:, None]
    elif RULE.scores == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = logits
    if bias_ptr is None:
        choice = scores
    else:
        choice = scores + tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if RULE.kept_groups < RULE.groups:
        GROUPS: tl.constexpr = RULE.groups
        KEPT_GROUPS: tl.constexpr = RULE.kept_groups
        SIZE: tl.constexpr = E // GROUPS
        group_scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for group in range(GROUPS):
            member = (e // SIZE == group)[None, :] & real
            inside = tl.where(member, _key(choice), NONE)
            best = tl.argmax(inside, axis=1, tie_break_left=True)
            score = tl.sum(tl.where(e[None, :] == best[:, None], choice, 0.0), axis=1)
            if RULE.group_score == "top2":
                others = tl.where(e[None, :] == best[:, None], NONE, inside)
                second = tl.argmax(others, axis=1, tie_break_left=True)
                score += tl.sum(tl.where(e[None, :] == second[:, None], choice, 0.0), axis=1)
            group_scores = tl.where(member, score[:, None], group_scores)
        group_keys = tl.where(real, _key(group_scores), NONE)
        kept = e[None, :] + tl.zeros((BLOCK_T, 1), tl.int32) < 0
        for _ in range(KEPT_GROUPS):
            best = tl.argmax(tl.where(kept, NONE, group_keys), axis=1, tie_break_left=True)
            kept = kept | ((e // SIZE)[None, :] == (best // SIZE)[:, None])
        choice = tl.where(kept, choice, float("-inf"))
    keys = tl.where(real, _key(choice), NONE)
    k = tl.arange(0, BLOCK_K)
    ids = tl.full((BLOCK_T, BLOCK_K), E, tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for place in range(K):
        best = tl.argmax(keys, axis=1, tie_break_left=True).to(tl.int32)
        taken = e[None, :] == best[:, None]
        keys = tl.where(taken, NONE, keys)
        if RULE.weights == "scores":
            weight = tl.sum(tl.where(taken, scores, 0.0), axis=1)
        else:
            weight = tl.sum(tl.where(taken, logits, 0.0), axis=1)
        ids = tl.where((k == place)[None, :], best[:, None], ids)
        weights = tl.where((k == place)[None, :], weight[:, None], weights)
    used = (k < K)[None, :]
    if RULE.weights == "softmax":
        top = tl.max(tl.where(used, weights, float("-inf")), axis=1)
        powers = tl.where(used, tl.exp(weights - top[:, None]), 0.0)
        weights = powers / tl.sum(powers, axis=1)[:, None]
    elif RULE.weights == "sigmoid":
        weights = tl.where(used, 1.0 / (1.0 + tl.exp(-weights)), 0.0)
    if RULE.normalise:
        weights = weights / (tl.sum(weights, axis=1) + RULE.epsilon)[:, None]
    rounded = (weights * RULE.scale).to(weights_ptr.dtype.element_ty)
    used = used & (token < tokens)[:, None]
    picks = token[:, None].to(tl.int64) * K + k[None, :]
    tl.store(ids_ptr + picks, ids.to(ids_ptr.dtype.element_ty), mask=used)
    tl.store(weights_ptr + picks, rounded, mask=used)
    if table_ptr is not None:
        counted = tl.where(used & (rounded.to(tl.float32) != 0), ids, E)
        bins = tl.arange(0, BINS)
        counts = tl.histogram(tl.reshape(counted, (BLOCK_T * BLOCK_K,)), BINS)
        tl.store(table_ptr + tl.program_id(0) * E + bins, counts, mask=bins < E)


def router_topk(
    logits: torch.Tensor,
    rule: RouterRule,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    count: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, Counts | None]:
    """A router's picks, best first; `reference_grouped.router_topk`.

    Ids are those of transformers' own routers wherever the scores that decide differ by more than rounding. Of equal
    ones the lower id comes first; torch.topk promises nothing there, and on the CPU picks others, of the same scores.
    NaN counts as the greatest, as in torch. Computed in fp32, weights rounded once. A CUDA graph may capture it. Does
    not wait for the device.

    Args:
        logits: [T, E] in bf16, fp16 or fp32.
        rule: which.
        bias: [E] in one of those, added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437).
        dtype: of the weights, one of those.
        count: also count the picks for `dispatch`.

    Returns:
        ids int64 [T, K], weights [T, K], and what `dispatch` takes as `counts`; new memory.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, result = _launch(logits, rule, bias, dtype, count)
    launch.run(logits.device)
    return result


def _launch(
    logits: torch.Tensor, rule: RouterRule, bias: torch.Tensor | None, dtype: torch.dtype, count: bool
) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor, Counts | None]]:
    check_tensor("logits", logits, 2, FLOATS, logits.device)
    tokens, experts = logits.shape
    if not rule.top_k <= experts <= MOST_EXPERTS:
        raise ValueError(f"{experts} experts: there must be {rule.top_k} to {MOST_EXPERTS}")
    if experts % rule.groups:
        raise ValueError(f"{experts} experts are not {rule.groups} groups of equal size")
    if rule.group_score == "top2" and rule.kept_groups < rule.groups and experts < 2 * rule.groups:
        raise ValueError(f"{experts} experts in {rule.groups} groups: a group's best two need two")
    if bias is not None:
        check_tensor("bias", bias, 1, FLOATS, logits.device)
        if bias.numel() != experts:
            raise ValueError(f"the bias has {bias.numel()} numbers for {experts} experts")
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype} must be {' or '.join(map(str, FLOATS))}")
    device, top_k = logits.device, rule.top_k
    block_e, block_k = power_of_2_from(experts), power_of_2_from(top_k)
    block_t = max(1, min(4096 // block_e, 32, power_of_2_from(tokens)))
    programs = triton.cdiv(tokens, block_t)
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(tokens, top_k, dtype=dtype, device=device)
    table = torch.empty(programs, experts, dtype=torch.int32, device=device) if count else None
    arguments = {
        "logits_ptr": logits,
        "bias_ptr": bias,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "table_ptr": table,
        "tokens": tokens,
        "RULE": rule,
        "E": experts,
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        "BLOCK_K": block_k,
        "BINS": power_of_2_from(experts + 1),
    }
    counts = None if table is None else Counts(table, block_t * top_k)
    return Launch(_kernel, (programs,), arguments, {"num_warps": 4}), (ids, weights, counts)


_SAMPLES = {
    "softmax,128": (RouterRule(8, normalise=True), 128, False),
    "after,32": (RouterRule(4, "logits", "softmax"), 32, False),
    "softmax,512": (RouterRule(10, normalise=True), 512, False),
    "grouped,256": (
        RouterRule(8, "sigmoid", "scores", True, 1e-20, 2.5, groups=8, kept_groups=4, group_score="top2"),
        256,
        True,
    ),
    "grouped,160": (RouterRule(6, scale=16.0, groups=8, kept_groups=3), 160, False),
}


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, (rule, experts, biased) in _SAMPLES.items():
        logits = torch.empty(4096, experts, dtype=torch.float32 if biased else torch.bfloat16, device="meta")
        bias = torch.empty(experts, device="meta") if biased else None
        launch, _ = _launch(logits, rule, bias, torch.float32, True)
        specs.append(CompileSpec(f"router_topk[{name}]", launch))
    return specs
