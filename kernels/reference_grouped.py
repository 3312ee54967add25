"""Plain torch: what the kernels for many tokens mean, on the CPU and in fp64 where numbers are computed."""

from __future__ import annotations

import torch

from moert.kernels.bank import Bank
from moert.kernels.reference import bank_weight, computed_picks
from moert.kernels.router_rule import RouterRule


def router_topk(
    logits: torch.Tensor, rule: RouterRule, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The picks of a router, best first: ids int64 [T, K] and weights fp64 [T, K].

    Scores of all experts, picks by score plus bias (among the kept groups, where there are groups), of equal ones the
    lower id; then the weights of the picks, normalised and scaled as the rule says.
    """
    logits = logits.double()
    if rule.scores == "softmax":
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid() if rule.scores == "sigmoid" else logits
    choice = scores if bias is None else scores + bias.double()
    if rule.kept_groups < rule.groups:
        groups = choice.unflatten(1, (rule.groups, -1))
        best = groups.sort(dim=-1, descending=True)[0][..., : 2 if rule.group_score == "top2" else 1].sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, _best(best, rule.kept_groups), True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    ids = _best(choice, rule.top_k)
    weights = (scores if rule.weights == "scores" else logits).gather(1, ids)
    if rule.weights == "softmax":
        weights = weights.softmax(-1)
    elif rule.weights == "sigmoid":
        weights = weights.sigmoid()
    if rule.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
    return ids, weights * rule.scale


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.sort(dim=-1, descending=True, stable=True)[1][:, :count]


def dispatch(
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    slots: int,
    block_m: int,
    order: torch.Tensor | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """The picks of each block, padded with T * K, its slot, and the first block of each expert in the order."""
    table, none = slot_of.tolist(), ids.numel()
    of_expert: dict[int, list[int]] = {}
    for pick, (expert, weight) in enumerate(zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True)):
        if weight != 0:
            of_expert.setdefault(expert, []).append(pick)
    picks: list[int] = []
    block_slots: list[int] = []
    first = [0]
    for expert in range(len(table)) if order is None else order.tolist():
        mine = of_expert.get(expert, [])
        if 0 <= expert < len(table) and 0 <= table[expert] < slots:
            padding = -len(mine) % block_m
            picks += mine + [none] * padding
            block_slots += [table[expert]] * ((len(mine) + padding) // block_m)
        first.append(len(block_slots))
    return picks, block_slots, first


def grouped_down(
    bank: Bank, h: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor
) -> torch.Tensor:
    """Each pick's output times its weight: fp64 [T * K, D], NaN for picks that are not computed."""
    rows = torch.full((ids.numel(), bank.hidden), torch.nan, dtype=torch.float64)
    flat = weights.flatten().double()
    for pick, slot in computed_picks(bank, ids, weights, slot_of):
        y = bank_weight(bank.down, slot) @ h[pick].double()
        rows[pick] = flat[pick] * (y if bank.down.bias is None else y + bank.down.bias[slot].double())
    return rows


def combine(
    bank: Bank, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor
) -> torch.Tensor:
    """The sum of each token's rows, of the picks that are computed: fp64 [T, D]."""
    y = torch.zeros(ids.shape[0], rows.shape[1], dtype=torch.float64)
    for pick, _ in computed_picks(bank, ids, weights, slot_of):
        y[pick // ids.shape[1]] += rows[pick].double()
    return y
