"""A step's routing, turned round: for each expert, the tokens that chose it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Group(NamedTuple):
    """The picks of one expert in a step."""

    expert: int
    tokens: torch.Tensor | None
    """[n] int64, ascending: the rows that chose the expert. None: the step's only row."""
    weights: torch.Tensor
    """[n], the router's weight of each pick, in the router's dtype."""

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """The expert's rows of `hidden` [T, D]: [n, D]."""
        return hidden if self.tokens is None else hidden[self.tokens]


def group_by_expert(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> list[Group]:
    """The groups of a step in ascending order of expert.

    Picks whose id is outside [0, num_experts) or whose weight is exactly 0 are left out.

    Args:
        top_k_index: [T, K], integer.
        top_k_weights: [T, K], floating point.
    """
    top_k = top_k_index.shape[-1]
    if top_k_index.shape[0] == 1:
        ids = top_k_index[0].tolist()
        if len(set(ids)) == top_k:
            weights = top_k_weights[0]
            kept = weights.ne(0).tolist()
            picks_of_one = [k for k in range(top_k) if kept[k] and 0 <= ids[k] < num_experts]
            return [Group(ids[k], None, weights[k : k + 1]) for k in sorted(picks_of_one, key=ids.__getitem__)]
    flat_ids, flat_weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    kept_picks = ((flat_ids >= 0) & (flat_ids < num_experts) & (flat_weights != 0)).nonzero().squeeze(1)
    sorted_ids, order_by_id = flat_ids[kept_picks].sort(stable=True)
    picks = kept_picks[order_by_id]
    experts, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    tokens = torch.div(picks, top_k, rounding_mode="floor")
    sizes = counts.tolist()
    return [
        Group(expert, rows, weights)
        for expert, rows, weights in zip(
            experts.tolist(), tokens.split(sizes), flat_weights[picks].split(sizes), strict=True
        )
    ]
