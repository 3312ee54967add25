"""Small traces for the commands that replay them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moert.trace import LayerInfo, Phase, Sequence, Trace, TraceHeader, TraceWriter

LAYERS, EXPERTS, TOP_K = 3, 16, 2
EXPERT_BYTES = 1 << 20


def routing(seed: int, num_tokens: int, layers: int = LAYERS, experts: int = EXPERTS) -> npt.NDArray[np.int32]:
    """[T, L, K] picks with some locality: some experts are liked, and a pick often stays for a while."""
    rng = np.random.default_rng(seed)
    liking = rng.dirichlet(np.full(experts, 0.6), size=layers)
    rows = np.empty((num_tokens, layers, TOP_K), np.int32)
    for layer in range(layers):
        picks = rng.choice(experts, TOP_K, replace=False, p=liking[layer])
        for token in range(num_tokens):
            if rng.random() > 0.4:
                picks = rng.choice(experts, TOP_K, replace=False, p=liking[layer] * 0.9 + 0.1 / experts)
            rows[token, layer] = picks
    return rows


def trace(
    *,
    num_sequences: int = 4,
    num_tokens: int = 60,
    prompt: int = 10,
    expert_bytes: int = EXPERT_BYTES,
    layers: int = LAYERS,
    experts: int = EXPERTS,
) -> Trace:
    """Sequences of a prompt in one step and tokens after it."""
    infos = tuple(
        LayerInfo(f"model.layers.{i}.mlp.experts", experts, TOP_K, TOP_K, expert_bytes) for i in range(layers)
    )
    found, step = [], 0
    for number in range(num_sequences):
        steps = np.concatenate([np.full(prompt, step), step + 1 + np.arange(num_tokens - prompt)])
        phases = np.full(num_tokens, Phase.DECODE, np.uint8)
        phases[:prompt] = Phase.PREFILL
        found.append(Sequence(routing(number, num_tokens, layers, experts), steps, phases, name=f"s{number}"))
        step = int(steps[-1]) + 1
    return Trace(TraceHeader(infos, model="tiny", sampled=True), found)


def write(path: Path, made: Trace | None = None) -> Path:
    """A trace file."""
    made = trace() if made is None else made
    with TraceWriter(path, made.header) as writer:
        for sequence in made:
            writer.add(sequence)
    return path
