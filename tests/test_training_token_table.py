"""The table of tokens: what its recipe counts, and that it says the same told token by token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import training_support
from training_support import ALL, examples_of, learnable, live_scores, make_trace

from moert.predict.recorded import model_of
from moert.predictors._choice import make_predictor
from moert.predictors._trained import About, Trained, load_trained
from moert.predictors.base import Model
from moert.predictors.token_table import Table
from moert.trace import Trace
from moert.training.examples import Example, Source, TrainingSet
from moert.training.recipes.base import make_recipe
from moert.training.run import train

one_thread = training_support.one_thread


def test_token_table_is_counting(tmp_path: Path) -> None:
    trace = make_trace([120] * 12)
    for sequence in trace:
        assert sequence.token_ids is not None
        sequence.token_ids[:] %= 9
    made = train([Source(trace, "a")], "token_table,kept=10")
    made.save(tmp_path / "table.safetensors")
    predictor: Any = make_predictor(f"token_table,file={tmp_path / 'table.safetensors'}", model_of(trace.header), ALL)
    data = TrainingSet([Source(trace, "a")])
    from moert.training.examples import Shares

    training, _, _ = data.split(Shares(), 0)
    weight = float(made.tensors["prior_weight"][0])
    for layer, n in enumerate((8, 6)):
        pairs: Counter[tuple[int, int]] = Counter()
        seen: Counter[int] = Counter()
        for example in training:
            assert example.token_ids is not None
            for token, picks in zip(example.token_ids.tolist(), example.experts[:, layer].tolist(), strict=True):
                seen[token] += 1
                pairs.update((token, pick) for pick in picks)
        total = seen.total()
        prior = [sum(pairs[token, expert] for token in seen) / total for expert in range(n)]
        for token in (0, 4, 99):
            predictor.begin_pass(1, np.array([token]))
            expected = [(pairs[token, expert] + weight * prior[expert]) / (seen[token] + weight) for expert in range(n)]
            np.testing.assert_allclose(predictor.scores(layer), expected, rtol=1e-4)
    predictor.begin_pass(3, np.array([1, 2, 2]))
    two = [Table(load(tmp_path / "table.safetensors", trace)).rows(0, np.array([row])) for row in (1, 2)]
    np.testing.assert_allclose(predictor.scores(0), 1 - (1 - two[0][0]) * (1 - two[1][0]), rtol=1e-5)
    predictor.hint(np.array([5]))
    np.testing.assert_allclose(predictor.scores(0, 1), predictor.table.rows(0, np.array([5]))[0])
    np.testing.assert_allclose(predictor.scores(0, 2), predictor.table.prior(0))
    predictor.begin_sequence()
    np.testing.assert_allclose(predictor.scores(0), predictor.table.prior(0))


def load(path: Path, trace: Trace) -> Trained:
    return load_trained(path, "token_table", model_of(trace.header))


def test_token_table_live_is_its_recipe(tmp_path: Path) -> None:
    trace = learnable(30, 40)
    made = train([Source(trace, "a")], "token_table,vocabulary=12,kept=1")
    made.save(tmp_path / "table.safetensors")
    model = model_of(trace.header)
    example = examples_of(TrainingSet([Source(trace, "a")]))[3]
    expected = make_recipe("token_table").scores(model, made.tensors, example)
    found = live_scores(make_predictor(f"token_table,file={tmp_path / 'table.safetensors'}", model, ALL), example)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert made.tensors["experts"].shape == (12, 2, 2)
    by_layer = made.test.recall_by_layer
    assert by_layer[0] > by_layer[1] + 0.2, "the first layer follows from the token"
    assert [point.n_tokens for point in made.points] == sorted({point.n_tokens for point in made.points})


def test_counts_beyond_16_bits_keep_their_proportion() -> None:
    from moert.training.recipes.token_table import _Counts

    model = Model((4,), (1,))
    counts = _Counts(model, np.array([7]))
    experts = np.array([0] * 60_000 + [1] * 40_000, dtype=np.int32).reshape(-1, 1, 1)
    counts.add(Example(experts, np.full(100_000, 7), 0))
    tensors = {**counts.tensors(2), "prior_weight": np.ones(1, dtype=np.float32)}
    table = Table(Trained(Path("x"), About("token_table", (4,), (1,)), tensors))
    np.testing.assert_allclose(table.rows(0, np.array([0]))[0], [0.6, 0.4, 0, 0], atol=1e-4)
