"""ExpertFlow's routing-path predictor, from token ids and routing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from moert.predictors._routing_path import RoutingPath, shape_of
from moert.predictors._trained import About, Array, Trained
from moert.predictors.base import Model, Need
from moert.predictors.expertflow import load_network, places_of
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
from moert.training.recipes.base import Fitted, Recipe, check_from_to


class ExpertFlowRecipe(Recipe):
    """AdamW on the cross-entropy of every expert of every layer, as published but for the rate and the sizes."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TOKEN_IDS})
    least_tokens: ClassVar[int] = 2000
    epochs: ClassVar[int] = 20

    def __init__(
        self,
        width: int = 96,
        inner: int = 384,
        heads: int = 4,
        head_size: int = 24,
        depth: int = 2,
        window: int = 128,
        prompt: int = 256,
        rate: float = 3e-3,
        batch: int = 1,
        dropout: float = 0.1,
        unknown: float = 0.02,
    ) -> None:
        """
        Args:
            width: of the residual stream. Published: 32.
            inner: of the feed-forward parts. Published: 2048.
            heads: of each attention. Published: 8.
            head_size: of each head. Published: 64.
            depth: layers of the encoder, and of the decoder. Published: 6.
            window: tokens that a token of the decoder sees.
            prompt: tokens of the prompt that the encoder reads, the last ones.
            rate: of AdamW. Published: 2e-5, and 2e-4 for the heads, on a trained T5.
            batch: pieces of 512 tokens a step.
            dropout: in training.
            unknown: of the ids that are hidden in training, so that the embedding of unknown ones is learned.
        """
        sizes = {"width": width, "inner": inner, "heads": heads, "head_size": head_size, "depth": depth}
        check_options("expertflow", **sizes, window=window, rate=rate, dropout=dropout)
        check_from_to("expertflow", "prompt", prompt, 1, 65536)
        check_from_to("expertflow", "batch", batch, 1, 4096)
        check_from_to("expertflow", "unknown", unknown, 0, 0.9)
        self.width, self.inner, self.heads, self.head_size, self.depth = width, inner, heads, head_size, depth
        self.window, self.prompt = window, prompt
        self.rate, self.batch, self.dropout, self.unknown = rate, batch, dropout, unknown

    def train(self, model: Model, train: Examples, validation: Examples, effort: Effort) -> Fitted:
        ids = _seen(train)
        device = effort.torch_device()
        with seeded(effort.seed):
            shape = shape_of(self.options, vocabulary=len(ids), outputs=sum(model.num_experts))
            network = RoutingPath(shape, self.dropout)
            begin_with_popularity(network, model, train)
            network.to(device)

            def loss(batch: _Batch) -> tuple[torch.Tensor, int]:
                prompts, real, tokens, chosen, counts = (part.to(device) for part in batch)
                mean = mean_loss(network(prompts, real, tokens), chosen, counts) / model.num_layers
                return mean, int(counts.any(dim=2).sum())

            points = fit(
                network,
                lambda rng: _batches(model, train, ids, self.batch, self.unknown, rng),
                loss,
                lambda: validate(model, validation, lambda example: _scores(model, network, ids, example, device)),
                effort,
                epochs=effort.epochs or self.epochs,
                steps=self._steps(train),
                rate=self.rate,
                decay=1e-4,
            )
        weights: dict[str, Array] = {name: one.cpu().numpy() for name, one in network.state_dict().items()}
        return Fitted({"token_ids": ids, **weights}, points)

    def scores(self, model: Model, tensors: Mapping[str, Array], example: Example) -> npt.NDArray[np.float32]:
        about = About("expertflow", model.num_experts, model.top_k, options=self.options)
        network = load_network(Trained(Path(), about, dict(tensors)))
        return _scores(model, network, tensors["token_ids"], example, torch.device("cpu"))

    def _steps(self, train: Examples) -> int:
        pieces = sum(-(-len(example.experts) // PIECE) for example in train.without_hidden())
        return -(-pieces // self.batch)


class _Batch(NamedTuple):
    prompts: torch.Tensor
    """[B, P] places in the vocabulary."""
    real: torch.Tensor
    """[B, P]: what of them is no padding."""
    tokens: torch.Tensor
    """[B, T]"""
    chosen: torch.Tensor
    """[B, T, outputs]"""
    counts: torch.Tensor
    """[B, T, outputs]: what belongs to a layer that ran for a token that is there."""


class _Piece(NamedTuple):
    prompt: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.bool_]


def _seen(train: Examples) -> npt.NDArray[np.int64]:
    """All token ids, ascending."""
    seen: set[int] = set()
    for example in train.without_hidden():
        assert example.token_ids is not None
        seen.update(example.token_ids.tolist())
    return np.array(sorted(seen), dtype=np.int64)


def _batches(
    model: Model, train: Examples, ids: npt.NDArray[np.int64], size: int, unknown: float, rng: random.Random
) -> Iterator[_Batch]:
    chance = np.random.default_rng(rng.getrandbits(64))
    held: list[_Piece] = []
    for example in train.shuffled(rng):
        for piece in _pieces(model, example, ids, rng):
            hide = chance.random(len(piece.tokens)) < unknown
            held.append(piece._replace(tokens=np.where(hide, 0, piece.tokens)))
            if len(held) == size:
                yield _together(held)
                held = []
    if held:
        yield _together(held)


def _pieces(model: Model, example: Example, ids: npt.NDArray[np.int64], rng: random.Random) -> Iterator[_Piece]:
    assert example.token_ids is not None
    tokens = places_of(example.token_ids, ids)
    chosen, counts = flat(model, example)
    if rng.random() < 0.5:
        n_prompt = 1  # as where tokens are replayed one by one
    elif example.n_prompt < len(tokens):
        n_prompt = max(1, example.n_prompt)
    else:
        n_prompt = rng.randint(1, len(tokens))
    for begin in range(0, len(tokens), PIECE):
        end = begin + PIECE
        yield _Piece(tokens[:n_prompt], tokens[begin:end], chosen[begin:end], counts[begin:end])


def _together(pieces: list[_Piece]) -> _Batch:
    prompts = [torch.from_numpy(piece.prompt) for piece in pieces]
    longest = max(map(len, prompts))
    # On the left, so that the last ones can be taken of all.
    padded = torch.stack([functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    real = torch.arange(longest)[None] >= torch.tensor([longest - len(prompt) for prompt in prompts])[:, None]
    rest = [
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True)
        for arrays in zip(*(piece[1:] for piece in pieces), strict=True)
    ]
    return _Batch(padded, real, *rest)


def _scores(
    model: Model, network: RoutingPath, ids: npt.NDArray[np.int64], example: Example, device: torch.device
) -> npt.NDArray[np.float32]:
    """[T, L, E], the prompt read at once where there is one, and token by token from there."""
    assert example.token_ids is not None
    tokens = torch.from_numpy(places_of(example.token_ids, ids)).to(device)[None]
    n_prompt = example.n_prompt if 0 < example.n_prompt < tokens.shape[1] else 1
    return path_scores(model, network, tokens[:, :n_prompt], tokens)
