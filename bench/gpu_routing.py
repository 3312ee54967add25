"""Routing for models whose weights are random: as it was recorded, or synthetic.

Synthetic, it is as skewed and as repetitive as published traces are. Per layer, experts have Zipf popularity in an
order of the layer's own, and from one token to the next most of what made an expert attractive is drawn anew. For 128
experts of which 8 are chosen, a token shares two fifths of its picks with the one before, and LRU over a quarter of the
experts hits 64 % (MIN 80 %): published traces of OLMoE and gpt-oss-20b share 44 and 42 %, and LRU over a quarter of
their experts hits 60 and 64 %.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moert.errors import ConfigError
from moert.trace import NO_EXPERT, LayerInfo, Phase, Sequence, Trace, TraceFile, TraceHeader

ZIPF = 0.9
STAY = 0.3
"""How often an expert is to the next token what it was to this one."""


def synthetic(layers: int, experts: int, top_k: int, lengths: tuple[int, ...], seed: int = 0) -> Trace:
    """A trace of sequences of so many tokens, each a forward pass of its own."""
    rng = np.random.default_rng(seed)
    popular = -ZIPF * np.log(np.arange(1, experts + 1, dtype=np.float32))
    liking = np.stack([rng.permutation(popular) for _ in range(layers)])
    return _trace([_sequence(liking, top_k, tokens, rng) for tokens in lengths], experts, "synthetic")


def recorded(path: Path, layers: int, experts: int, top_k: int, lengths: tuple[int, ...]) -> Trace:
    """The same of a recording: its tokens one after the other, its first layers, all over again where it has fewer.

    Raises:
        ConfigError: it is of a model of other numbers of experts or picks, or has no token.
        CorruptFileError, TransferError: see `TraceFile`.
    """
    with TraceFile(path) as trace:
        found = {(layer.num_experts, layer.top_k) for layer in trace.header.layers}
        if found != {(experts, top_k)}:
            numbers = ", ".join(f"{k} of {n}" for n, k in sorted(found))
            raise ConfigError(f"{path} is of layers that choose {numbers} experts; {top_k} of {experts} are needed")
        wanted, parts, n = sum(lengths), [], 0
        for sequence in trace:
            parts.append(sequence.experts[(sequence.experts != NO_EXPERT).all(axis=(1, 2))])
            n += len(parts[-1])
            if n >= wanted:
                break
    if not n:
        raise ConfigError(f"{path} has no token that chose {top_k} experts in each layer")
    tokens = np.resize(np.arange(n), wanted)
    places = np.resize(np.arange(parts[0].shape[1]), layers)
    chosen = np.concatenate(parts)[tokens][:, places].astype(np.int32)
    return _trace(np.split(chosen, np.cumsum(lengths)[:-1]), experts, path.name)


def _trace(chosen: list[np.ndarray], experts: int, source: str) -> Trace:
    _, layers, top_k = chosen[0].shape
    info = tuple(LayerInfo(f"model.layers.{index}.mlp.experts", experts, top_k) for index in range(layers))
    sequences, step = [], 0
    for picks in chosen:
        tokens = len(picks)
        steps = np.arange(step, step + tokens)
        sequences.append(Sequence(picks, steps, np.full(tokens, Phase.DECODE, np.uint8)))
        step += tokens
    return Trace(TraceHeader(info, model=source, source=source), sequences)


def _sequence(liking: np.ndarray, top_k: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """[tokens, layers, top_k]"""
    chosen = np.empty((tokens, len(liking), top_k), np.int32)
    noise = rng.gumbel(size=liking.shape)
    for token in range(tokens):
        noise = np.where(rng.random(liking.shape, np.float32) < STAY, noise, rng.gumbel(size=liking.shape))
        chosen[token] = np.argpartition(-(liking + noise), top_k - 1, axis=1)[:, :top_k]
    return chosen
