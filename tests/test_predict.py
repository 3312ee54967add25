"""Holding predictors against what came: the metrics by brute force, published numbers, and the same object live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_support import trace
from trace_support import real_trace

import moert
from moert.errors import ConfigError
from moert.hf.watched_run import watched_run
from moert.predict import Horizons, Recorded, Recording, Study, Tally, evaluate, halves, replay
from moert.predict.recorded import model_of, same_model
from moert.predictors._choice import make_predictor, predictor_names
from moert.predictors.base import Floats, Ints, Need, Predictor
from moert.trace import Phase, Sequence, Trace
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer
from moert.trace.reuse import Reuse

LIVE = predictor_names({Need.HIDDEN, Need.ROUTERS, Need.TOKEN_IDS})


def recording(**shape: Any) -> Recording:
    return Recording.of_trace(trace(**shape), "tiny")


def whole(one: Recording) -> Study:
    return Study(one, range(len(one.sequences)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), experts=st.integers(2, 12), top_k=st.integers(1, 4), cells=st.integers(1, 12))
def test_metrics_by_brute_force(seed: int, experts: int, top_k: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(top_k, experts)
    scores = np.round(rng.random((cells, experts)), 1).astype(np.float32) * (rng.random((cells, experts)) < 0.8)
    answered = rng.random(cells) < 0.8
    truth = np.stack([rng.permutation(experts)[:top_k] for _ in range(cells)]).astype(np.int32)
    truth[rng.random(truth.shape) < 0.1] = -1
    tally = Tally(np.array([top_k]), True)
    tally.add(np.zeros(cells, np.int64), scores.astype(np.float32), answered, truth)
    row = tally.row(1, 0)
    picks = exact = 0
    hits, named = dict.fromkeys(("k", "1.5k", "2k"), 0), dict.fromkeys(("k", "1.5k", "2k"), 0)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for cell in range(cells):
        true = {int(pick) for pick in truth[cell] if pick >= 0}
        picks += len(true)
        order = sorted(range(experts), key=lambda expert: (-scores[cell, expert], expert))
        order = [expert for expert in order if scores[cell, expert] > 0] if answered[cell] else []
        for name, ratio in (("k", 1.0), ("1.5k", 1.5), ("2k", 2.0)):
            best = order[: int(ratio * top_k)]
            hits[name] += len(set(best) & true)
            named[name] += len(best)
            exact += name == "k" and set(best) == true
        for expert in order[: 2 * top_k]:
            chance = float(scores[cell, expert])
            bins.setdefault(min(int(chance * 10), 9), []).append((chance, expert in true))
    assert row.cells == cells
    assert row.answered == pytest.approx(answered.mean())
    for name in hits:
        assert row.recall[name] == pytest.approx(hits[name] / max(1, picks))
        precision = row.precision[name]
        assert (precision is None) == (named[name] == 0)
        assert precision is None or precision == pytest.approx(hits[name] / named[name])
    assert row.exact == pytest.approx(exact / cells)
    total = sum(map(len, bins.values()))
    if total:
        error = sum(abs(sum(chance - came for chance, came in found)) for found in bins.values()) / total
        assert row.calibration_error == pytest.approx(error, abs=1e-6)


def test_the_oracle_is_right_at_every_horizon() -> None:
    result = evaluate("oracle", whole(recording()), asked_tokens=10_000)
    assert len(result.rows) == 2 + 4, "three layers are asked two layers ahead at most"
    for row in result.rows:
        assert (row.recall["k"], row.precision["k"], row.exact, row.answered) == (1, 1, 1, 1)
        assert row.calibration_error == 0
        expected = 4 * 60 * (3 - row.ahead_layers) if row.ahead_layers else 4 * (60 - row.ahead_tokens) * 3
        assert row.cells == expected


def test_previous_token_recalls_what_is_reused() -> None:
    """Next-token reuse is counted by another part of moert, from the arrays."""
    made = trace()
    reuse = Reuse(3)
    for sequence in made:
        reuse.add(sequence)
    result = evaluate("previous_token", whole(Recording.of_trace(made, "tiny")), asked_tokens=10_000)
    assert result.row(tokens=1).recall["k"] == pytest.approx(reuse.mean)


@pytest.mark.parametrize(
    ("file", "experts", "share"), [("trace_olmoe_299.jsonl", 64, 0.435), ("trace_kimi_300.jsonl", 256, 0.336)]
)
def test_published_reuse(file: str, experts: int, share: float) -> None:
    path = real_trace("waste", file)
    header, sequences = load_importer("waste").read(path, ImportOptions(experts=experts))
    one = Recording.of_trace(Trace(header, list(sequences)), file)
    result = evaluate("previous_token", whole(one), Horizons((), (1,)), asked_tokens=10_000)
    assert round(result.row(tokens=1).recall["k"], 3) == share


def test_only_what_is_asked_about_counts_and_all_is_learned_from() -> None:
    one = recording(num_tokens=400)
    all_of_it = evaluate("frequency", whole(one), asked_tokens=10_000)
    some = evaluate("frequency", whole(one), asked_tokens=600)
    assert (all_of_it.asked_tokens, some.asked_tokens, some.test_tokens) == (1600, 600, 1600)
    assert some.row(1).cells == 600 * 2
    assert all_of_it.by_tokens[0] == some.by_tokens[0], "the first tokens are all asked about"
    assert [first for first, _, _ in some.by_tokens] == [0, 20, 100, 500, 1000]


def test_padding_is_nobodys_token() -> None:
    made = trace(num_sequences=1)
    real = made[0]
    order = np.insert(np.arange(60), [7, 30], 59)
    phases = real.phases[order].copy()
    steps = np.arange(62)
    phases[[7, 31]] = Phase.PADDING
    padded = Sequence(real.experts[order].copy(), steps, phases)
    padded.experts[[7, 31]] = [[0, 1]]
    for name in ("joint", "previous_token"):
        rows = [
            evaluate(name, whole(Recording.of_trace(Trace(made.header, [sequence]), "one"))).rows
            for sequence in (real, padded)
        ]
        assert [row.recall for row in rows[0]] == [row.recall for row in rows[1]]


def test_halves_are_of_whole_sequences() -> None:
    one = recording(num_sequences=5)
    assert halves(one) == ([0, 1, 2], [3, 4])
    with pytest.raises(ConfigError, match=r"tiny has 1 sequence \(60 tokens\)"):
        halves(recording(num_sequences=1))
    assert same_model(one, recording())
    assert not same_model(one, recording(layers=2))


def test_training_on_the_same_domain_helps_and_the_test_stays_the_same() -> None:
    one = recording(num_sequences=6, num_tokens=200)
    first, second = halves(one)
    trained = evaluate("joint", Study(one, second, one, first, "its first half"))
    fresh = evaluate("joint", Study(one, second))
    assert (trained.train_tokens, fresh.train_tokens, trained.test_tokens) == (600, 0, 600)
    assert trained.row(1).recall["k"] > fresh.row(1).recall["k"]


@pytest.mark.parametrize("layers", [(0,), (4,)])
def test_horizons_out_of_reach(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must be from 1 to 3"):
        Horizons(layers, ())
    with pytest.raises(ConfigError, match="must be from 1 to 8"):
        Horizons((), (9,))


class Log(Predictor):
    """Another predictor, and all that it is told and says."""

    def __init__(self, inner: Predictor) -> None:
        super().__init__(inner.model)
        self.inner = inner
        self.said: list[Any] = []

    def begin_sequence(self) -> None:
        self.said.append("sequence")
        self.inner.begin_sequence()

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self.said.append(("pass", n_tokens, None if token_ids is None else token_ids.tolist()))
        self.inner.begin_pass(n_tokens, token_ids, rows)

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        self.said.append(("observe", layer, experts.tolist()))
        self.inner.observe(layer, experts, weights)

    def enter(self, layer: int, residual: torch.Tensor) -> Any:
        found = self.inner.enter(layer, residual)
        self.said.append(("enter", layer, found))
        return found

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> Any:
        found = list(self.inner.step(layer, hidden))
        self.said.append(("step", layer, found, [self._scores(later) for later in range(layer + 1, 2)]))
        return found

    def _scores(self, layer: int) -> Any:
        found = self.inner.scores(layer)
        return None if found is None else found.tolist()


PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1, 8])


def generate(model: Any) -> list[Any]:
    """What makes a sequence for each prompt, and returns its tokens."""
    return [
        lambda ids=ids: model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False).tolist()
        for ids in PROMPTS
    ]


@pytest.fixture(scope="module")
def plain_tokens(tiny_olmoe: Path) -> list[list[list[int]]]:
    with moert.load(tiny_olmoe, host_memory="50%", predictor="none") as model:
        return [run() for run in generate(model)]


@pytest.mark.parametrize("name", LIVE)
def test_the_same_object_live_and_in_predict(
    name: str, tiny_olmoe: Path, plain_tokens: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a predictor is told and says while a model runs, and while a recording of that run is replayed to it."""
    logs: list[Log] = []

    def logged(*arguments: Any) -> Predictor:
        logs.append(Log(make_predictor(*arguments)))
        return logs[-1]

    monkeypatch.setattr("moert.hf.router_weights.make_predictor", logged)
    tokens = []
    with moert.load(tiny_olmoe, host_memory="75%", predictor=name) as model:
        runs = [lambda run=run: tokens.append(run()) for run in generate(model)]
        found = watched_run(model, "tiny", runs)
    assert tokens == plain_tokens
    live, again = logs[0].said, Log(make_predictor(name, found.model, found.at_hand))
    for one in found.sequences:
        replay(again, one, by_steps=True)
    assert [one[0] for one in live].count("step") == 2 * (1 + 5) * 2
    assert live == again.said


def test_a_watched_run_keeps_what_the_layers_were_given(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe, host_memory="50%", predictor="none") as model:
        found = watched_run(
            model, "tiny", [lambda: model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5, do_sample=False)]
        )
    assert found.at_hand == {Need.HIDDEN, Need.ROUTERS, Need.TOKEN_IDS, Need.FUTURE}
    (one,) = found.sequences
    assert one.hidden is not None and one.residual is not None
    for layer, (hidden, residual) in enumerate(zip(one.hidden, one.residual, strict=True)):
        router = found.model.router(layer)
        assert hidden is not None and residual is not None and router is not None
        assert len(hidden) == len(residual) == len(one.sequence.steps)
        chosen = (hidden.float() @ router.weight.float().T).topk(one.sequence.experts.shape[2]).indices
        assert np.array_equal(np.sort(chosen.numpy()), np.sort(one.sequence.experts[:, layer]))


def test_recorded_hidden_states_go_to_the_predictor_token_by_token() -> None:
    made = trace(num_sequences=1)

    seen: list[tuple[int, float]] = []

    class Sees(Predictor):
        def enter(self, layer: int, residual: torch.Tensor) -> None:
            seen.append((layer, residual.item()))

        def step(self, layer: int, hidden: torch.Tensor | None = None) -> list[Any]:
            seen.append((layer, -1.0 if hidden is None else hidden.item()))
            return []

    numbers = torch.arange(60.0).reshape(60, 1)
    recorded = Recorded(made[0], [numbers, None, numbers + 100], [None, numbers + 200, None])
    replay(Sees(model_of(made.header)), recorded)
    assert seen[:8] == [(0, 0.0), (1, 200.0), (1, -1.0), (2, 100.0), (0, 1.0), (1, 201.0), (1, -1.0), (2, 101.0)]
