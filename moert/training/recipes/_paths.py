"""What the recipes of networks share that read routing paths: all experts of all layers of a token side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from moert.predictors._routing_path import RoutingPath
from moert.predictors.base import Model
from moert.training.examples import Bools, Example, Examples, ran, targets
from moert.training.measures import Tally
from moert.training.recipes.base import check_from_to

PIECE = 512
"""Tokens that a network reads at once in training."""

_LEAST = 1e-7
"""A probability below it costs no more."""

_LIMITS = {
    "width": (1, 4096),
    "inner": (1, 65536),
    "heads": (1, 256),
    "head_size": (1, 1024),
    "depth": (1, 64),
    "window": (2, 65536),
    "rate": (1e-8, 1),
    "dropout": (0, 0.9),
}


def check_options(predictor: str, **options: float) -> None:
    """Raise ConfigError unless options that all these recipes have are within their limits."""
    for name, value in options.items():
        check_from_to(predictor, name, value, *_LIMITS[name])


def begin_with_popularity(network: RoutingPath, model: Model, train: Examples) -> None:
    """Have an untrained network say about how often each expert is chosen."""
    with torch.no_grad():
        network.head.bias.copy_(torch.from_numpy(popularity(model, train)).logit(eps=1e-4))


@torch.inference_mode()
def path_scores(
    model: Model, network: RoutingPath, prompt: torch.Tensor, tokens: torch.Tensor
) -> npt.NDArray[np.float32]:
    """[T, L, E] of the tokens [1, T] (or [1, T, picks]) after a prompt [1, P] (or [1, P, picks]), piece by piece."""
    state = network.begin(prompt)
    pieces = []
    for piece in tokens.split(PIECE, dim=1):
        logits, state = network.decode(piece, state)
        pieces.append(logits[0].sigmoid().cpu().numpy())
    return unflat(model, np.concatenate(pieces))


def flat(model: Model, example: Example) -> tuple[Bools, Bools]:
    """[T, outputs] what is chosen, and what belongs to a layer that ran."""
    chosen = targets(example.experts, max(model.num_experts))
    there = np.broadcast_to(ran(chosen)[..., None], chosen.shape)
    real = _real(model)
    return chosen[:, real], there[:, real]


def unflat(model: Model, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[T, outputs] -> [T, L, E], -1 where a layer has no such expert."""
    found = np.full((len(scores), model.num_layers, max(model.num_experts)), -1, dtype=np.float32)
    found[:, _real(model)] = scores
    return found


def popularity(model: Model, train: Examples) -> npt.NDArray[np.float32]:
    """[outputs] how often each expert is chosen where its layer ran."""
    chosen_sum = np.zeros(sum(model.num_experts))
    there_sum = np.zeros_like(chosen_sum)
    for example in train.without_hidden():
        chosen, there = flat(model, example)
        chosen_sum += chosen.sum(axis=0)
        there_sum += there.sum(axis=0)
    shares: npt.NDArray[np.float32] = (chosen_sum / np.maximum(1, there_sum)).astype(np.float32)
    return shares


def mean_loss(logits: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The cross-entropy, a mean over tokens of what `counts`, summed over all that a token can choose."""
    entropy = functional.binary_cross_entropy_with_logits(logits, chosen.float(), reduction="none")
    return (entropy * counts).sum() / counts.any(dim=2).sum().clamp(min=1)


def validate(
    model: Model, validation: Examples, scores_of: Callable[[Example], npt.NDArray[np.float32]]
) -> tuple[float, float]:
    """The cross-entropy, a mean over tokens and layers, and the recall at k."""
    tally, summed, seen = Tally(model.top_k), 0.0, 0
    for example in validation:
        scores = scores_of(example)
        chosen = targets(example.experts, scores.shape[2])
        there = ran(chosen)
        p = np.clip(scores, _LEAST, 1 - _LEAST)
        entropy = -np.where(chosen, np.log(p), np.log1p(-p)) * (scores >= 0)
        summed += float((entropy.sum(axis=2) * there).sum())
        seen += int(there.sum())
        tally.add(scores, example.experts)
    return summed / max(1, seen), tally.result().recall[1.0]


def _real(model: Model) -> Bools:
    """[L, E]: whether there is such an expert."""
    real: Bools = np.arange(max(model.num_experts))[None] < np.array(model.num_experts)[:, None]
    return real
