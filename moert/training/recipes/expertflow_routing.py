"""ExpertFlow's decoder, from routing alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from moert.predictors._routing_path import RoutingPath, read_network, shape_of
from moert.predictors._trained import About, Array, Trained
from moert.predictors.base import Model
from moert.predictors.expertflow_routing import Places
from moert.training.examples import Example, Examples
from moert.training.loop import Effort, fit, seeded
from moert.training.recipes._paths import (
    PIECE,
    begin_with_popularity,
    check_options,
    flat,
    mean_loss,
    path_scores,
    validate,
)
from moert.training.recipes.base import Fitted, Recipe


class ExpertFlowRoutingRecipe(Recipe):
    """AdamW on the cross-entropy of every expert of every layer of the next token, one piece of 512 tokens a step."""

    least_tokens: ClassVar[int] = 2000
    epochs: ClassVar[int] = 20

    def __init__(
        self,
        width: int = 96,
        inner: int = 384,
        heads: int = 4,
        head_size: int = 24,
        depth: int = 2,
        window: int = 64,
        rate: float = 3e-3,
        dropout: float = 0.1,
    ) -> None:
        """
        Args:
            width: of the residual stream.
            inner: of the feed-forward parts.
            heads: of each attention.
            head_size: of each head.
            depth: layers.
            window: tokens that a token sees.
            rate: of AdamW.
            dropout: in training.
        """
        sizes = {"width": width, "inner": inner, "heads": heads, "head_size": head_size, "depth": depth}
        check_options("expertflow_routing", **sizes, window=window, rate=rate, dropout=dropout)
        self.width, self.inner, self.heads, self.head_size, self.depth = width, inner, heads, head_size, depth
        self.window = window
        self.rate, self.dropout = rate, dropout

    def train(self, model: Model, train: Examples, validation: Examples, effort: Effort) -> Fitted:
        device = effort.torch_device()
        places = Places(model.num_experts, model.top_k)
        with seeded(effort.seed):
            known = {"vocabulary": 0, "outputs": sum(model.num_experts), "prompt": 0, "picks": sum(model.top_k)}
            network = RoutingPath(shape_of(self.options, **known), self.dropout)
            begin_with_popularity(network, model, train)
            network.to(device)

            def loss(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
                paths, chosen, counts = (part.to(device)[None] for part in batch)
                logits = network.decode(paths, network.begin(paths))[0]
                return mean_loss(logits, chosen, counts) / model.num_layers, paths.shape[1]

            points = fit(
                network,
                lambda rng: _batches(model, places, train, rng),
                loss,
                lambda: validate(model, validation, lambda example: _scores(model, places, network, example, device)),
                effort,
                epochs=effort.epochs or self.epochs,
                steps=sum(-(-len(example.experts) // PIECE) for example in train.without_hidden()),
                rate=self.rate,
                decay=1e-4,
            )
        return Fitted({name: one.cpu().numpy() for name, one in network.state_dict().items()}, points)

    def scores(self, model: Model, tensors: Mapping[str, Array], example: Example) -> npt.NDArray[np.float32]:
        about = About("expertflow_routing", model.num_experts, model.top_k, options=self.options)
        known = {"vocabulary": 0, "outputs": sum(model.num_experts), "prompt": 0, "picks": sum(model.top_k)}
        network = read_network(Trained(Path(), about, dict(tensors)), **known)
        return _scores(model, Places(model.num_experts, model.top_k), network, example, torch.device("cpu"))


def _paths(places: Places, example: Example) -> torch.Tensor:
    """[T, picks] what the token before each one chose; of the first there is none."""
    noted = {layer: example.experts[:-1, layer] for layer in range(example.experts.shape[1])}
    found = places.of(noted, len(example.experts) - 1)
    none = places.of({}, 1)
    return torch.from_numpy(np.concatenate([none, found]))


def _batches(
    model: Model, places: Places, train: Examples, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for example in train.shuffled(rng):
        paths = _paths(places, example)
        chosen, counts = (torch.from_numpy(np.ascontiguousarray(array)) for array in flat(model, example))
        yield from zip(paths.split(PIECE), chosen.split(PIECE), counts.split(PIECE), strict=True)


def _scores(
    model: Model, places: Places, network: RoutingPath, example: Example, device: torch.device
) -> npt.NDArray[np.float32]:
    """[T, L, E], each token's from those before it; the first one's is what a token has without any."""
    paths = _paths(places, example).to(device)[None]
    return path_scores(model, network, paths, paths)
