"""Headers and sequences that are not what they say they are."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_support import make_header, random_sequence

from moert.errors import ConfigError
from moert.trace import (
    NO_EXPERT,
    LayerInfo,
    Sequence,
    Trace,
    TraceHeader,
    TraceWriter,
    validate,
)

HEADER = make_header((8, 2), (300, 3))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write(path: Path, header: TraceHeader, *sequences: Sequence) -> None:
    with TraceWriter(path, header) as writer:
        for sequence in sequences:
            writer.add(sequence)


def change(sequence: Sequence, **arrays: Any) -> Sequence:
    return replace(sequence, **arrays)


def with_value(array: Any, place: tuple[int, ...], value: float) -> Any:
    changed = array.copy()
    changed[place] = value
    return changed


INVALID: dict[str, tuple[Any, str]] = {
    "id too high": (lambda s: change(s, experts=with_value(s.experts, (1, 0, 1), 8)), "token 1, layer 0: id 8 is not"),
    "id negative": (lambda s: change(s, experts=with_value(s.experts, (1, 0, 1), -2)), "id -2 is not below"),
    "id twice": (
        lambda s: change(s, experts=with_value(s.experts, (2, 1, 2), s.experts[2, 1, 0])),
        r"token 2, layer 1: expert \d+ twice",
    ),
    "too many picks": (lambda s: change(s, experts=with_value(s.experts, (0, 0, 2), 7)), "3 experts, .* top-k 2"),
    "gap in front": (lambda s: change(s, experts=with_value(s.experts, (0, 1, 0), -1)), "place 0 has no expert, but"),
    "ragged": (
        lambda s: change(s, experts=s.experts[:, :1].copy()),
        r"must be int32 \[4, 2, 3\], is int32 \[4, 1, 3\]",
    ),
    "wrong dtype": (lambda s: change(s, experts=s.experts.astype(np.int64)), "must be int32"),
    "no array": (lambda s: change(s, experts=s.experts.tolist()), "is list"),
    "empty": (lambda s: Sequence(*(array[:0] for array in (s.experts, s.steps, s.phases))), "the sequence is empty"),
    "steps descend": (lambda s: change(s, steps=np.array([0, 2, 1, 3])), "token 2: step 1 comes after step 2"),
    "step negative": (lambda s: change(s, steps=np.array([-1, 0, 1, 2])), "step -1 is not between"),
    "step huge": (lambda s: change(s, steps=np.array([0, 1, 2, 2**62])), "is not between 0 and"),
    "no steps": (lambda s: change(s, steps=None), "must be an array"),
    "phase": (lambda s: change(s, phases=np.array([0, 1, 3, 1], dtype=np.uint8)), "token 2: 3 is no phase"),
    "token id": (lambda s: change(s, token_ids=np.array([0, 1, 2, 2**31])), "does not fit 32 bits"),
    "token ids short": (lambda s: change(s, token_ids=np.array([0])), r"must be int64 \[4\]"),
    "weight": (lambda s: change(s, weights=with_value(s.weights, (1, 1, 0), np.nan)), "place 0: nan is not finite"),
    "weight of nobody": (
        lambda s: change(s, weights=with_value(s.weights, (1, 0, 2), 0.5)),
        "0.5 stands where there is no expert",
    ),
    "score": (lambda s: change(s, scores=with_value(s.scores, (3, 1, 4), np.inf)), "inf is not finite"),
    "score of nobody": (lambda s: change(s, scores=with_value(s.scores, (3, 0, 8), 0.5)), "there is no expert"),
    "name": (lambda s: change(s, name="\ud800"), "no text that can be stored"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_sequences_are_refused(tmp_path: Path, rng: np.random.Generator, case: str) -> None:
    spoil, message = INVALID[case]
    good = random_sequence(HEADER, 4, rng, optional=["weights", "scores", "token_ids"])
    validate(good, HEADER)
    bad = spoil(good)
    with pytest.raises(ConfigError, match=message):
        validate(bad, HEADER)
    with pytest.raises(ConfigError, match=message):
        Trace(HEADER, [good, bad])
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "t", HEADER, good, bad)
    assert os.listdir(tmp_path) == []


@given(st.lists(st.lists(st.integers(-2, 6), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(1, 4))
def test_which_ids_are_valid(rows: list[list[int]], top_k: int) -> None:
    header = make_header((5, top_k), (5, 4))
    experts = np.array([[row, [0, 1, 2, 3]] for row in rows], dtype=np.int32)
    sequence = Sequence(experts, np.arange(len(rows)), np.ones(len(rows), dtype=np.uint8))
    valid = True
    for row in rows:
        picks = [expert for expert in row if expert != NO_EXPERT]
        valid &= row == picks + [NO_EXPERT] * (4 - len(picks)) and len(picks) <= top_k
        valid &= len(set(picks)) == len(picks) and all(0 <= expert < 5 for expert in picks)
    if valid:
        validate(sequence, header)
    else:
        with pytest.raises(ConfigError, match=r"token \d, layer 0"):
            validate(sequence, header)


@pytest.mark.parametrize("pair", list(itertools.combinations(range(5), 2)))
def test_no_expert_twice_wherever_it_stands(pair: tuple[int, int]) -> None:
    header = make_header((9, 5))
    experts = np.arange(15, dtype=np.int32).reshape(3, 1, 5) % 9
    experts[2, 0, pair[1]] = experts[2, 0, pair[0]]
    with pytest.raises(ConfigError, match=f"token 2, layer 0: expert {experts[2, 0, pair[0]]} twice"):
        validate(Sequence(experts, np.arange(3), np.ones(3, dtype=np.uint8)), header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (TraceHeader(()), "at least one layer"),
        (make_header((0, 1)), "0 experts"),
        (make_header((65536, 1)), "65536 experts"),
        (make_header((4, 5)), "top-k of 5"),
        (make_header((4, 2), (4, 0)), "layer 1 .*top-k of 0"),
        (TraceHeader((LayerInfo("x", 4, 2, native_top_k=5),)), "native top-k of 5"),
        (TraceHeader((LayerInfo("x", 4, 2, expert_bytes=-1),)), "-1 bytes"),
        (TraceHeader((LayerInfo("\ud800", 4, 2),)), "no text"),
        (make_header((4, 2), model="\ud800"), "no text"),
    ],
)
def test_invalid_headers_are_refused(tmp_path: Path, header: TraceHeader, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TraceWriter(tmp_path / "t", header)
    with pytest.raises(ConfigError, match=message):
        Trace(header)
