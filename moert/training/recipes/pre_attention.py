"""A linear map for each layer, from what its block is given to its experts."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from moert.errors import ConfigError
from moert.predictors._trained import Array
from moert.predictors.base import Model, Need
from moert.training.examples import Example, Examples, ran, targets
from moert.training.loop import Effort, fit, seeded
from moert.training.measures import Tally
from moert.training.recipes.base import Fitted, Recipe, check_from_to

POOLED_NUMBERS = 1 << 27
"""So many hidden numbers are mixed before batches are cut from them: tokens of one text are alike."""


class PreAttentionRecipe(Recipe):
    """AdamW on a ranking loss and the cross-entropy, all layers at once.

    The ranking loss is log(1 + sum of exp(s_j - s_i)) over all pairs of a chosen expert i and one not chosen, j.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HIDDEN})
    least_tokens: ClassVar[int] = 1000
    epochs: ClassVar[int] = 20

    def __init__(self, rate: float = 3e-3, batch: int = 256, ranking: float = 0.1) -> None:
        """
        Args:
            rate: of AdamW.
            batch: tokens a step.
            ranking: weight of the ranking loss; 0: the cross-entropy alone.
        """
        check_from_to("pre_attention", "rate", rate, 1e-8, 1)
        check_from_to("pre_attention", "batch", batch, 1, 1 << 20)
        check_from_to("pre_attention", "ranking", ranking, 0, 1000)
        self.rate = rate
        self.batch = batch
        self.ranking = ranking

    def train(self, model: Model, train: Examples, validation: Examples, effort: Effort) -> Fitted:
        width = _width(train)
        device = effort.torch_device()
        network = _Maps(model, width, _popularity(model, train)).to(device)

        def loss(batch: _Tokens) -> tuple[torch.Tensor, int]:
            hidden, chosen, there = (torch.from_numpy(array).to(device) for array in batch)
            return self._loss(network(hidden.float()), chosen, there, network.real), len(hidden)

        def validate() -> tuple[float, float]:
            tally, summed, seen = Tally(model.top_k), 0.0, 0
            with torch.inference_mode():
                for example in validation:
                    one = _tokens_of(example, max(model.num_experts))
                    logits = network(torch.from_numpy(one.hidden).to(device).float())
                    chosen, there = (torch.from_numpy(array).to(device) for array in one[1:])
                    summed += float(self._loss(logits, chosen, there, network.real)) * len(logits)
                    seen += len(logits)
                    tally.add(logits.sigmoid().masked_fill(~network.real, -1).cpu().numpy(), example.experts)
            return summed / max(1, seen), tally.result().recall[1.0]

        with seeded(effort.seed):
            points = fit(
                network,
                lambda rng: _batches(train, self.batch, max(model.num_experts), model.num_layers * width, rng),
                loss,
                validate,
                effort,
                epochs=effort.epochs or self.epochs,
                steps=-(-train.n_tokens // self.batch),
                rate=self.rate,
            )
        weight, bias = network.weight.detach().cpu().numpy(), network.bias.detach().cpu().numpy()
        return Fitted({"weight": weight.astype(np.float16), "bias": bias}, points)

    def scores(self, model: Model, tensors: Mapping[str, Array], example: Example) -> npt.NDArray[np.float32]:
        assert example.hidden is not None
        weight = torch.from_numpy(tensors["weight"].astype(np.float32))
        hidden = torch.from_numpy(example.hidden.astype(np.float32))
        logits = torch.einsum("tld,led->tle", hidden, weight) + torch.from_numpy(tensors["bias"])
        scores: npt.NDArray[np.float32] = logits.sigmoid().numpy()
        for layer, n in enumerate(model.num_experts):
            scores[:, layer, n:] = -1
        return scores

    def _loss(
        self, logits: torch.Tensor, chosen: torch.Tensor, there: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """A mean over tokens and layers that are `there` [T, L], of logits [T, L, E] for the `real` experts [L, E]."""
        entropy = functional.binary_cross_entropy_with_logits(logits, chosen.float(), reduction="none")
        each = (entropy * real).sum(dim=2)
        if self.ranking:
            picked = (-logits).masked_fill(~chosen, -torch.inf).logsumexp(dim=2)
            others = logits.masked_fill(chosen | ~real, -torch.inf).logsumexp(dim=2)
            each = each + self.ranking * functional.softplus(picked + others)
        return (each * there).sum() / there.sum().clamp(min=1)


class _Maps(nn.Module):
    def __init__(self, model: Model, width: int, popularity: npt.NDArray[np.float64]) -> None:
        super().__init__()
        layers, most = model.num_layers, max(model.num_experts)
        self.weight = nn.Parameter(torch.zeros(layers, most, width))
        self.bias = nn.Parameter(torch.from_numpy(popularity).logit(eps=1e-4).float())
        real = torch.arange(most)[None] < torch.tensor(model.num_experts)[:, None]
        self.register_buffer("real", real, persistent=False)
        self.real: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, L, D] -> [T, L, E]"""
        return torch.baddbmm(self.bias[:, None], hidden.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)


class _Tokens(NamedTuple):
    hidden: npt.NDArray[np.float16]
    """[T, L, D]"""
    chosen: npt.NDArray[np.bool_]
    """[T, L, E]"""
    there: npt.NDArray[np.bool_]
    """[T, L]: whether the layer ran."""


def _tokens_of(example: Example, num_experts: int) -> _Tokens:
    assert example.hidden is not None
    chosen = targets(example.experts, num_experts)
    return _Tokens(example.hidden, chosen, ran(chosen))


def _batches(train: Examples, size: int, num_experts: int, numbers_each: int, rng: random.Random) -> Iterator[_Tokens]:
    """Mixed tokens of mixed sequences."""
    pool: list[_Tokens] = []
    pooled = 0
    limit = max(4 * size, POOLED_NUMBERS // numbers_each)
    left: _Tokens | None = None
    for example in train.shuffled(rng):
        pool.append(_tokens_of(example, num_experts))
        pooled += len(example.experts)
        if pooled >= limit:
            left = yield from _cut(pool, size, rng)
            pool, pooled = ([left] if left is not None else []), (0 if left is None else len(left.hidden))
    if pool:
        left = yield from _cut(pool, size, rng)
        if left is not None:
            yield left


def _cut(pool: list[_Tokens], size: int, rng: random.Random) -> Generator[_Tokens, None, _Tokens | None]:
    """Batches of `size`; returns what is left over."""
    whole = _Tokens(
        np.concatenate([tokens.hidden for tokens in pool]),
        np.concatenate([tokens.chosen for tokens in pool]),
        np.concatenate([tokens.there for tokens in pool]),
    )
    order = np.random.default_rng(rng.getrandbits(64)).permutation(len(whole.hidden))
    for begin in range(0, len(order) - size + 1, size):
        yield _take(whole, order[begin : begin + size])
    rest = order[len(order) - len(order) % size :]
    return _take(whole, rest) if len(rest) else None


def _take(tokens: _Tokens, places: npt.NDArray[np.int64]) -> _Tokens:
    return _Tokens(tokens.hidden[places], tokens.chosen[places], tokens.there[places])


def _width(train: Examples) -> int:
    width = 0
    for source in {source for source, _ in train.chosen}:
        hidden = train.sources[source].hidden
        assert hidden is not None
        if width and hidden.width != width:
            raise ConfigError(f"{hidden.path} has hidden states of width {hidden.width}, others {width}")
        width = hidden.width
    return width


def _popularity(model: Model, train: Examples) -> npt.NDArray[np.float64]:
    """[L, E] how often each expert is chosen."""
    counts = np.zeros((model.num_layers, max(model.num_experts)))
    seen = np.zeros(model.num_layers)
    for example in train.without_hidden():
        chosen = targets(example.experts, counts.shape[1])
        counts += chosen.sum(axis=0)
        seen += ran(chosen).sum(axis=0)
    return counts / np.maximum(1, seen)[:, None]
