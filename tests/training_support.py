"""Traces to train on, random ones and ones that can be learned, and predictors told token by token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trace_support import make_header, random_sequence

from moert.predictors.base import Need, Predictor
from moert.trace import Phase, Sequence, Trace
from moert.training.examples import Example, Examples, TrainingSet

ALL = frozenset(Need)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More would wait for one another wherever something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def examples_of(data: TrainingSet) -> list[Example]:
    return list(Examples(data.sources, [(0, index) for index in range(len(data.sources[0].trace))], 0))


def live_scores(predictor: Predictor, example: Example, n_prompt: int = 1) -> npt.NDArray[np.float32]:
    """[T, L, E] of the tokens from the first pass's last on, told pass by pass."""
    assert example.token_ids is not None
    predictor.begin_sequence()
    model = predictor.model
    found = np.full((len(example.experts), model.num_layers, max(model.num_experts)), -1, dtype=np.float32)
    ends = [n_prompt, *range(n_prompt + 1, len(example.experts) + 1)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        predictor.begin_pass(end - begin, example.token_ids[begin:end])
        for layer, n in enumerate(model.num_experts):
            if example.hidden is not None:
                predictor.enter(layer, torch.from_numpy(example.hidden[begin:end, layer]) * 3)
            scores = predictor.scores(layer)
            assert scores is not None
            found[end - 1, layer, :n] = scores
            predictor.observe(layer, example.experts[begin:end, layer])
    return found
