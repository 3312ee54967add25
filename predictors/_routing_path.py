"""The network of ExpertFlow's routing-path predictor: tokens in, a logit for every expert of every layer out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moert.errors import CorruptFileError
from moert.predictors._trained import Trained

BUCKETS = 32
FARTHEST = 128
"""Distances between tokens from here on count as one, as in T5."""


class PathShape(NamedTuple):
    """What a network is built from."""

    vocabulary: int
    """Ids that it knows; one more stands for all others."""
    outputs: int
    """Experts of all layers together."""
    width: int = 96
    inner: int = 384
    heads: int = 4
    head_size: int = 24
    depth: int = 2
    """Layers of the encoder, and of the decoder."""
    window: int = 128
    """Tokens that a token of the decoder sees, itself included."""
    prompt: int = 256
    """Tokens that the encoder reads: the prompt's last. 0: there is no encoder."""
    picks: int = 0
    """0: a token is the place of its id in the vocabulary, 0 for an unknown one. Else it is so many places, those of
    the experts it has chosen in all layers, and `outputs` where there is none."""


def shape_of(options: Mapping[str, bool | int | float | str], **known: int) -> PathShape:
    """What the options that are sizes say, and what is known besides."""
    return PathShape(**{**{name: int(options[name]) for name in PathShape._fields if name in options}, **known})


class PathState(NamedTuple):
    """Where the decoder stands in B sequences. Not written to by `decode`, so that drafts can be tried from one."""

    memory: list[tuple[torch.Tensor, torch.Tensor]]
    """Of each of its layers: keys and values [B, H, P, d] of the prompt."""
    memory_bias: torch.Tensor | None
    """[B, 1, 1, P] -inf where a prompt is shorter than the longest."""
    past: list[tuple[torch.Tensor, torch.Tensor]]
    """Of each of its layers: keys and values [B, H, n, d] of the latest tokens."""


class RoutingPath(nn.Module):
    """An encoder-decoder in the shape of T5: norms before each part, distances as biases, no positions."""

    def __init__(self, shape: PathShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        if shape.picks:
            self.embedding = nn.Embedding(shape.outputs + 1, shape.width, padding_idx=shape.outputs)
            with torch.no_grad():
                self.embedding.weight /= shape.picks**0.5
        else:
            self.embedding = nn.Embedding(shape.vocabulary + 1, shape.width)
        self.decoder_distances = nn.Embedding(BUCKETS, shape.heads)
        nn.init.zeros_(self.decoder_distances.weight)
        self.decoder = nn.ModuleList([_Layer(shape, dropout, crosses=bool(shape.prompt)) for _ in range(shape.depth)])
        self.decoder_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.outputs)
        self.dropout = nn.Dropout(dropout)
        if shape.prompt:
            self.encoder_distances = nn.Embedding(BUCKETS, shape.heads)
            nn.init.zeros_(self.encoder_distances.weight)
            self.encoder = nn.ModuleList([_Layer(shape, dropout, crosses=False) for _ in range(shape.depth)])
            self.encoder_norm = nn.RMSNorm(shape.width, eps=1e-6)

    def forward(self, prompts: torch.Tensor, real: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, outputs] for tokens [B, T] (or [B, T, picks]) after prompts [B, P] (or [B, P, picks]).

        `real` [B, P] says what of the prompts is no padding; None: all of it.
        """
        return self.decode(tokens, self.begin(prompts, real))[0]

    def begin(self, prompts: torch.Tensor, real: torch.Tensor | None = None) -> PathState:
        """Read the prompts, before the decoder's first token."""
        if not self.shape.prompt:
            return PathState([], None, [])
        prompts = prompts[:, -self.shape.prompt :]
        bias = None
        if real is not None:
            real = real[:, -self.shape.prompt :]
            bias = torch.zeros(real.shape, device=real.device).masked_fill(~real, -torch.inf)[:, None, None]
        places = torch.arange(prompts.shape[1], device=prompts.device)
        near = self.encoder_distances(_buckets(places[None] - places[:, None], both_ways=True)).permute(2, 0, 1)
        hidden = self.dropout(self._embedded(prompts))
        for layer in _layers(self.encoder):
            keys, values = layer.attention.project(layer.norm(hidden))
            hidden = layer(hidden, keys, values, near if bias is None else near + bias)
        hidden = self.encoder_norm(hidden)
        memory = [layer.crossing.project(hidden) for layer in _layers(self.decoder)]
        return PathState(memory, bias, [])

    def decode(self, tokens: torch.Tensor, state: PathState) -> tuple[torch.Tensor, PathState]:
        """Logits [B, T, outputs] for tokens after those before, and where the decoder stands then."""
        had = state.past[0][0].shape[2] if state.past else 0
        ends = torch.arange(had, had + tokens.shape[1], device=tokens.device)
        apart = ends[:, None] - torch.arange(had + tokens.shape[1], device=tokens.device)[None]
        near = self.decoder_distances(_buckets(-apart, both_ways=False)).permute(2, 0, 1)
        near = near.masked_fill((apart < 0) | (apart >= self.shape.window), -torch.inf)
        hidden = self.dropout(self._embedded(tokens))
        past = []
        for index, layer in enumerate(_layers(self.decoder)):
            keys, values = layer.attention.project(layer.norm(hidden))
            if state.past:
                keys = torch.cat([state.past[index][0], keys], dim=2)
                values = torch.cat([state.past[index][1], values], dim=2)
            past.append((keys[:, :, 1 - self.shape.window :], values[:, :, 1 - self.shape.window :]))
            memory = state.memory[index] if state.memory else None
            hidden = layer(hidden, keys, values, near, memory, state.memory_bias)
        return self.head(self.decoder_norm(hidden)), state._replace(past=past)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embedding(tokens)
        return found.sum(dim=2) if self.shape.picks else found


class _Layer(nn.Module):
    def __init__(self, shape: PathShape, dropout: float, *, crosses: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.attention = _Attention(shape)
        if crosses:
            self.crossing_norm = nn.RMSNorm(shape.width, eps=1e-6)
            self.crossing = _Attention(shape)
        self.inner_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.up = nn.Linear(shape.width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
        memory_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = hidden + self.dropout(self.attention(self.norm(hidden), keys, values, bias))
        if memory is not None:
            hidden = hidden + self.dropout(self.crossing(self.crossing_norm(hidden), *memory, memory_bias))
        inner = self.dropout(functional.relu(self.up(self.inner_norm(hidden))))
        return hidden + self.dropout(self.down(inner))


class _Attention(nn.Module):
    def __init__(self, shape: PathShape) -> None:
        super().__init__()
        self._heads = shape.heads
        inner = shape.heads * shape.head_size
        self.query = nn.Linear(shape.width, inner, bias=False)
        self.key = nn.Linear(shape.width, inner, bias=False)
        self.value = nn.Linear(shape.width, inner, bias=False)
        self.out = nn.Linear(inner, shape.width, bias=False)

    def project(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._split(self.key(source)), self._split(self.value(source))

    def forward(
        self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        mask = None if bias is None else bias.expand(len(hidden), -1, -1, -1)
        mixed = functional.scaled_dot_product_attention(self._split(self.query(hidden)), keys, values, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H * d] -> [B, H, T, d]"""
        return x.unflatten(2, (self._heads, -1)).transpose(1, 2)


def _layers(modules: nn.ModuleList) -> Iterator[_Layer]:
    for module in modules:
        assert isinstance(module, _Layer)
        yield module


def _buckets(apart: torch.Tensor, *, both_ways: bool) -> torch.Tensor:
    """T5's bucket of a distance: each short one has its own, longer ones share, ever more."""
    count, base = BUCKETS, torch.zeros_like(apart)
    if both_ways:
        count //= 2
        base = (apart > 0) * count
        apart = apart.abs()
    else:
        apart = (-apart).clamp(min=0)
    exact = count // 2
    wide = (apart.clamp(min=1) / exact).log() / torch.tensor(FARTHEST / exact).log() * (count - exact)
    return base + torch.where(apart < exact, apart, (exact + wide.long()).clamp(max=count - 1))


def read_network(trained: Trained, **known: int) -> RoutingPath:
    """The network in a file, ready to be asked.

    Raises:
        CorruptFileError: the file is malformed.
    """
    try:
        shape = shape_of(trained.about.options, **known)
        network = RoutingPath(shape)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CorruptFileError(
            f"{trained.path}: {trained.about.options} is no network ({error}); train the predictor again"
        ) from error
    weights = {
        name: torch.from_numpy(trained.tensor(name, np.float32, tuple(weight.shape)).copy())
        for name, weight in network.state_dict().items()
    }
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
