"""The contract of every predictor there is."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictor_files import WIDTH, make_file

from moert.errors import ConfigError
from moert.predictors._choice import load_predictor, make_predictor, predictor_names
from moert.predictors.base import (
    MOST_LAYERS,
    MOST_TOKENS,
    NO_EXPERT,
    Model,
    Need,
    Predictor,
    Router,
    missing_needs,
)

L, E, K = 4, 12, 3
NAMES = predictor_names()
NEED_HIDDEN = [name for name in NAMES if Need.HIDDEN in load_predictor(name).needs]
EVERYTHING = frozenset(Need)

# What writes compiled loops or a network takes a while the first time; no example is slow for its own sake.
RELAXED = settings(max_examples=6, deadline=None)


def a_model(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (E, E, 7, E)) -> Model:
    generator = torch.Generator().manual_seed(0)
    routers = [
        Router(torch.randn(size, WIDTH, generator=generator).to(dtype), None, None, size, min(K, size))
        for size in sizes
    ]
    return Model(sizes, tuple(min(K, size) for size in sizes), routers, "tiny", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictors")


def make(name: str, folder: Path, model: Model | None = None) -> Predictor:
    model = a_model() if model is None else model
    if Need.FILE in load_predictor(name).needs:
        return make_predictor(f"{name},file={make_file(name, model, folder)}", model, EVERYTHING)
    return make_predictor(name, model, EVERYTHING)


class Run:
    """Drives a predictor as a model would, and checks every answer."""

    def __init__(self, predictor: Predictor, seed: int = 0) -> None:
        self.predictor = predictor
        self.model = predictor.model
        self.rng = np.random.default_rng(seed)
        self.answers: list[Any] = []

    def picks(self, layer: int, n_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        size, top_k = self.model.num_experts[layer], self.model.top_k[layer]
        rows = [self.rng.permutation(size)[:top_k] for _ in range(n_tokens)]
        found = np.array(rows, np.int64).reshape(n_tokens, top_k)
        found[self.rng.random(found.shape) < 0.05] = NO_EXPERT
        found[self.rng.random(found.shape) < 0.03] = size
        return found

    def hidden(self, n_tokens: int, poison: float = 0.0) -> torch.Tensor:
        values = torch.from_numpy(self.rng.standard_normal((n_tokens, WIDTH)).astype(np.float32))
        if n_tokens and self.rng.random() < poison:
            values[0, 0] = float(self.rng.choice([np.nan, np.inf, -np.inf]))
        router = self.model.router(0)
        return values if router is None else values.to(router.weight.dtype)

    def sequence(self, passes: list[int], rows: int = 1, poison: float = 0.0, tell: bool = True) -> None:
        predictor = self.predictor
        predictor.begin_sequence()
        total = sum(passes)
        if Need.FUTURE in predictor.needs:
            width = max(self.model.top_k)
            future = np.full((total, len(self.model.num_experts), width), NO_EXPERT, np.int32)
            for layer, top_k in enumerate(self.model.top_k):
                future[:, layer, :top_k] = self.picks(layer, total)
            predictor.foresee(future)
        for n_tokens in passes:
            if tell:
                ids = self.rng.integers(0, 40, n_tokens)
                known = self.rng.random() < 0.9
                predictor.begin_pass(n_tokens, ids if known else None, rows if n_tokens % rows == 0 else 1)
                if self.rng.random() < 0.3:
                    predictor.hint(self.rng.integers(0, 40, int(self.rng.integers(0, 12))))
                self.ask(-1)
            for layer in range(len(self.model.num_experts)):
                residual, hidden = self.hidden(n_tokens, poison), self.hidden(n_tokens, poison)
                copies = residual.clone(), hidden.clone()
                entry = predictor.enter(layer, residual)
                if entry is not None:
                    self.check(entry, layer)
                picks = self.picks(layer, n_tokens)
                weights = self.rng.random(picks.shape).astype(np.float32)
                before = picks.copy(), weights.copy()
                predictor.observe(layer, picks, weights if self.rng.random() < 0.7 else None)
                for prediction in predictor.step(layer, hidden):
                    assert prediction.layer > layer
                    self.check(prediction, prediction.layer)
                assert all(np.array_equal(*pair) for pair in zip((picks, weights), before, strict=True))
                for tensor, copy in zip((residual, hidden), copies, strict=True):
                    assert torch.equal(tensor.nan_to_num(7), copy.nan_to_num(7)), "a tensor was written to"
                self.ask(layer)

    def check(self, prediction: Any, layer: int) -> None:
        assert prediction.layer == layer
        assert len(set(prediction.experts)) == len(prediction.experts) == len(prediction.ranks)
        assert set(prediction.experts) <= set(range(self.model.num_experts[layer]))
        assert prediction.ranks == sorted(prediction.ranks)
        if prediction.probabilities is not None:
            assert len(prediction.probabilities) == len(prediction.experts)
            assert all(0 <= chance <= 1 for chance in prediction.probabilities)
        self.answers.append(tuple(map(str, prediction)))

    def ask(self, layer: int) -> None:
        layers = range(len(self.model.num_experts))
        horizons = [(later, 0) for later in range(layer + 1, min(layer + 1 + MOST_LAYERS, len(layers)))]
        horizons += [(later, tokens) for later in layers for tokens in (1, 2, MOST_TOKENS)]
        for later, tokens in horizons:
            scores = self.predictor.scores(later, tokens)
            if scores is None:
                self.answers.append(None)
                continue
            scores = scores.copy()
            assert scores.shape == (self.model.num_experts[later],)
            assert np.isfinite(scores).all()
            if self.predictor.gives_probabilities:
                assert (scores >= 0).all() and (scores <= 1 + 1e-5).all()
            again = self.predictor.scores(later, tokens)
            assert again is not None and np.array_equal(scores, again), "asking changed something"
            self.answers.append(scores.tobytes())


@pytest.mark.parametrize("name", NAMES)
@RELAXED
@given(
    passes=st.lists(st.lists(st.sampled_from([0, 1, 1, 1, 2, 6, 70]), max_size=5), min_size=1, max_size=2),
    rows=st.integers(1, 3),
    poison=st.sampled_from([0.0, 0.3]),
    tell=st.booleans(),
    seed=st.integers(0, 99),
)
def test_whatever_it_is_told_answers_are_sound_and_the_same_again(
    name: str, folder: Path, passes: list[list[int]], rows: int, poison: float, tell: bool, seed: int
) -> None:
    runs = []
    for _ in range(2):
        run = Run(make(name, folder), seed)
        for sequence in passes:
            run.sequence(sequence, rows, poison, tell)
        runs.append(run.answers)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_something_is_predicted(name: str, dtype: torch.dtype, folder: Path) -> None:
    """A predictor that never says anything would keep every other promise."""
    run = Run(make(name, folder, a_model(dtype)))
    for _ in range(3):
        run.sequence([4, 1, 1, 1])
    assert sum(answer is not None for answer in run.answers) > 0


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded(name: str, folder: Path) -> None:
    """Whatever it keeps is as large after many sequences as after some."""
    text = {
        "lookup": "lookup,memory=16",
        "expert_map": "expert_map,entries=8",
        "activation_matrix": "activation_matrix,matrices=2",
    }
    model = a_model()
    predictor = make_predictor(text[name], model, EVERYTHING) if name in text else make(name, folder)
    run = Run(predictor)
    sizes = []
    for _ in range(3):
        for _ in range(6):
            run.sequence([6, 1, 1, 1])
            run.answers.clear()
        predictor.begin_sequence()
        sizes.append(size_of(predictor))
    assert sizes[2] <= sizes[1] * 1.02, sizes


def size_of(predictor: Predictor) -> int:
    """Bytes of all that it holds but its model and the modules it uses."""
    kept = {
        name: value
        for name, value in vars(predictor).items()
        if name != "model" and not isinstance(value, (type(np), torch.nn.Module))
    }
    return len(pickle.dumps(kept))


def test_there_are_predictors_that_need_hidden_states() -> None:
    assert NEED_HIDDEN


@pytest.mark.parametrize("name", NEED_HIDDEN)
def test_hidden_states_that_are_not_finite_teach_nothing(name: str, folder: Path) -> None:
    run = Run(make(name, folder))
    bad = torch.full((1, WIDTH), float("nan"))
    for _ in range(8):
        for layer in range(L):
            assert not getattr(run.predictor.enter(layer, bad), "experts", [])
            assert not [found for found in run.predictor.step(layer, bad) if found.experts]
    run.sequence([1] * 8)
    assert any(answer is not None for answer in run.answers), "it is still good for something"


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_other_widths_are_left_alone(name: str, folder: Path) -> None:
    predictor = make(name, folder)
    assert list(predictor.step(0, torch.ones(1, WIDTH + 1))) == list(make(name, folder).step(0, None))
    assert predictor.enter(1, torch.ones(1, WIDTH - 1)) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_is_needed_is_said(name: str) -> None:
    needs = load_predictor(name).needs
    if not needs:
        make_predictor(name, a_model(), ())
        return
    first = next(need for need in Need if need in needs)
    with pytest.raises(ConfigError, match=rf"predictor '{name}' needs {first.value}.* not at hand in this place"):
        make_predictor(name, a_model(), (), "in this place")


def test_what_is_missing_is_told_apart() -> None:
    kind = load_predictor("gate_ahead")
    assert missing_needs(kind, ()) == [Need.HIDDEN, Need.ROUTERS]
    assert missing_needs(kind, [Need.HIDDEN]) == [Need.ROUTERS]
    assert "gate_ahead" not in predictor_names([Need.HIDDEN])
    assert {"joint", "frequency"} <= set(predictor_names([]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joint,speed=0", "predictor joint: speed=0.0 must be from"),
        ("joint,speed=nan", "predictor joint: speed=nan must be from"),
        ("joint,ahead=4", "ahead=4 must be from 1 to 3"),
        ("joint,sped=1", "'sped=1' is no parameter of joint"),
        ("frequency,alpha=2", "alpha=2.0 must be from"),
        ("set_transition,prior=0", "prior=0.0 must be from"),
        ("activation_matrix,matrices=0", "matrices=0 must be from"),
        ("expert_map,nearest=0", "nearest=0 must be from"),
        ("lookup,memory=3", "memory=3 must be from"),
        ("oracle,accuracy=1.5", "accuracy=1.5 must be from"),
        ("gate_ahead,ahead=0", "ahead=0 must be from"),
        ("no_such", "no predictor named 'no_such'; there are activation_matrix"),
    ],
)
def test_bad_parameters(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make_predictor(text, a_model(), EVERYTHING)
