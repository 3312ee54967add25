"""Routing for models whose weights are random: synthetic, as skewed and as repetitive as published traces are.

Per layer, experts have Zipf popularity in an order of the layer's own, and from one token to the next most of what made
an expert attractive is drawn anew. For 128 experts of which 8 are chosen, a token shares two fifths of its picks with
the one before, and LRU over a quarter of the experts hits 64 % (MIN 80 %): published traces of OLMoE and gpt-oss-20b
share 44 and 42 %, and LRU over a quarter of their experts hits 60 and 64 %.
"""

from __future__ import annotations

import numpy as np

from moert.trace import LayerInfo, Phase, Sequence, Trace, TraceHeader

ZIPF = 0.9
STAY = 0.3
"""How often an expert is to the next token what it was to this one."""


def synthetic(layers: int, experts: int, top_k: int, lengths: tuple[int, ...], seed: int = 0) -> Trace:
    """A trace of sequences of so many tokens, each a forward pass of its own."""
    rng = np.random.default_rng(seed)
    popular = -ZIPF * np.log(np.arange(1, experts + 1, dtype=np.float32))
    liking = np.stack([rng.permutation(popular) for _ in range(layers)])
    info = tuple(LayerInfo(f"model.layers.{index}.mlp.experts", experts, top_k) for index in range(layers))
    sequences, step = [], 0
    for tokens in lengths:
        chosen = _sequence(liking, top_k, tokens, rng)
        steps = np.arange(step, step + tokens)
        sequences.append(Sequence(chosen, steps, np.full(tokens, Phase.DECODE, np.uint8)))
        step += tokens
    return Trace(TraceHeader(info, model="synthetic", source="synthetic"), sequences)


def _sequence(liking: np.ndarray, top_k: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[tokens, layers, top_k]"""
    chosen = np.empty((tokens, len(liking), top_k), np.int32)
    noise = rng.gumbel(size=liking.shape)
    for token in range(tokens):
        noise = np.where(rng.random(liking.shape, np.float32) < STAY, noise, rng.gumbel(size=liking.shape))
        chosen[token] = np.argpartition(-(liking + noise), top_k - 1, axis=1)[:, :top_k]
    return chosen
