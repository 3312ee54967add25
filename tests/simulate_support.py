"""Small traces for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moert.trace import NO_EXPERT, LayerInfo, Phase, Sequence, Trace, TraceHeader


def header_of(experts: Items[int], top_k: int = 3, nbytes: Items[int] | None = None) -> TraceHeader:
    """Layers of so many experts."""
    sizes = [0] * len(experts) if nbytes is None else nbytes
    layers = tuple(
        LayerInfo(f"layers.{i}", n, min(n, top_k), expert_bytes=size)
        for i, (n, size) in enumerate(zip(experts, sizes, strict=True))
    )
    return TraceHeader(layers, model="small")


def sequence_of(
    picks: Items[Items[Items[int]]], *, first_step: int = 0, num_prompt: int = 0, width: int = 3, name: str = ""
) -> Sequence:
    """A sequence from [token][layer] lists of experts; the prompt runs in one step."""
    experts = np.full((len(picks), len(picks[0]), width), NO_EXPERT, dtype=np.int32)
    for token, layers in enumerate(picks):
        for layer, chosen in enumerate(layers):
            experts[token, layer, : len(chosen)] = chosen
    place = np.arange(len(picks))
    return Sequence(
        experts,
        (first_step + np.maximum(place - max(num_prompt - 1, 0), 0)).astype(np.int64),
        np.where(place < num_prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8),
        name=name,
    )


def trace_of(experts: Items[int], *sequences: Items[Items[Items[int]]], **known: Any) -> Trace:
    """Sequences one after another, all decoded."""
    header = header_of(experts, **known)
    found, step = [], 0
    for picks in sequences:
        found.append(sequence_of(picks, first_step=step, width=header.top_k))
        step += len(picks)
    return Trace(header, found)


def random_trace(
    rng: np.random.Generator, *, max_experts: int = 12, max_tokens: int = 30, nbytes: bool = False
) -> Trace:
    """Layers of different sizes, prompts, batches (tokens that share steps), gaps; some experts are popular."""
    counts = rng.integers(4, max_experts + 1, int(rng.integers(1, 4))).tolist()
    sizes = rng.integers(1, 4, len(counts)).tolist() if nbytes else None
    header = header_of(counts, nbytes=sizes)
    sequences, step = [], 0
    for number in range(int(rng.integers(1, 4))):
        n_tokens = int(rng.integers(1, max_tokens + 1))
        experts = np.full((n_tokens, len(counts), 3), NO_EXPERT, dtype=np.int32)
        for layer, n in enumerate(counts):
            popular = rng.dirichlet(np.full(n, 0.3)) + 1e-6
            for token in range(n_tokens):
                chosen = rng.choice(n, int(rng.integers(1, 4)), replace=False, p=popular / popular.sum())
                experts[token, layer, : len(chosen)] = chosen
        steps = step + np.sort(rng.integers(0, max(1, n_tokens // int(rng.integers(1, 4))), n_tokens))
        phases = rng.choice([Phase.PREFILL, Phase.DECODE, Phase.DECODE, Phase.PADDING], n_tokens).astype(np.uint8)
        phases[0] = Phase.DECODE
        sequences.append(Sequence(experts, steps.astype(np.int64), phases, name=f"s{number}"))
        step = int(steps.max()) + int(rng.integers(0, 2))
    return Trace(header, sequences)


def random_traces(**sizes: Any) -> st.SearchStrategy[Trace]:
    """`random_trace` of any seed."""
    return st.integers(0, 2**32 - 1).map(lambda seed: random_trace(np.random.default_rng(seed), **sizes))
