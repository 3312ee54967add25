"""Traces to train on: random ones, and ones that can be learned."""

from __future__ import annotations

import numpy as np
from trace_support import make_header, random_sequence

from moert.trace import Phase, Sequence, Trace


def make_trace(lengths: list[int], *, ids: bool = True, seed: int = 0, **known: object) -> Trace:
    header = make_header((8, 2), (6, 2), **known)
    rng = np.random.default_rng(seed)
    optional = ("token_ids",) if ids else ()
    return Trace(header, [random_sequence(header, n, rng, optional=optional) for n in lengths])


def learnable(n: int, length: int, seed: int = 0) -> Trace:
    """The first layer's experts follow from the token, the second's from the token before."""
    header = make_header((8, 2), (8, 2), model="learnable", config_hash="77")
    rng = np.random.default_rng(seed)
    table = np.array([[rng.permutation(8)[:2] for _ in range(20)] for _ in range(2)])
    sequences = []
    for _ in range(n):
        ids = rng.integers(0, 20, length)
        before = np.concatenate([ids[:1], ids[:-1]])
        experts = np.stack([table[0][ids], table[1][before]], axis=1).astype(np.int32)
        phases = np.full(length, Phase.DECODE, dtype=np.uint8)
        sequences.append(Sequence(experts, np.arange(length), phases, token_ids=ids.astype(np.int64)))
    return Trace(header, sequences)
