"""ExpertFlow's decoder of routing: what its recipe learns, and that it says the same told token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import training_support
from trace_support import make_header
from training_support import examples_of

from moert.predict.recorded import model_of
from moert.predictors._choice import make_predictor
from moert.predictors.base import Need
from moert.trace import Sequence, Trace
from moert.training.examples import Source, TrainingSet
from moert.training.loop import Effort
from moert.training.recipes.base import make_recipe
from moert.training.run import Training, train

one_thread = training_support.one_thread

ROUTING = "expertflow_routing,width=32,inner=64,heads=2,head_size=16,depth=1,dropout=0,rate=0.01,window=7"


@pytest.fixture(scope="module")
def cycles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path, TrainingSet]:
    """The decoder of a trace whose tokens choose by turns, in both layers, one of which has fewer experts."""
    header = make_header((8, 2), (6, 1), model="cycles", config_hash="99")
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(50):
        turn = (np.arange(60) + rng.integers(0, 7)) % 7
        experts = np.stack([np.stack([turn, turn + 1], axis=1), np.stack([turn % 6, np.full(60, -1)], axis=1)], axis=1)
        experts[::9, 1] = -1
        sequences.append(Sequence(experts.astype(np.int32), np.arange(60), np.ones(60, dtype=np.uint8)))
    trace = Trace(header, sequences)
    made = train([Source(trace, "a")], ROUTING, effort=Effort(epochs=4))
    path = tmp_path_factory.mktemp("cycles") / "routing.safetensors"
    made.save(path)
    return made, path, TrainingSet([Source(trace, "a")])


def test_expertflow_routing_learns_what_follows(cycles: tuple[Training, Path, TrainingSet]) -> None:
    made, _, _ = cycles
    assert made.test.recall[1.0] > 0.95
    assert made.baselines["popularity"].recall[1.0] < 0.5


@pytest.mark.parametrize("rows", [1, 3])
def test_expertflow_routing_live_is_its_recipe(cycles: tuple[Training, Path, TrainingSet], rows: int) -> None:
    made, path, data = cycles
    model = model_of(data.header)
    examples = examples_of(data)[:rows]
    expected = [make_recipe(ROUTING).scores(model, made.tensors, example) for example in examples]
    predictor = make_predictor(f"expertflow_routing,file={path}", model, {Need.FILE})
    predictor.begin_sequence()
    ends = [5, 6, 7, 20, 21]  # of passes of one token and of several
    for begin, end in zip([0, *ends], ends, strict=False):
        predictor.begin_pass(rows * (end - begin), None, rows)
        for layer, n in enumerate(model.num_experts):
            some = 1 - np.prod([1 - scores[begin, layer, :n] for scores in expected], axis=0)
            np.testing.assert_allclose(np.array(predictor.scores(layer)), some, atol=2e-5)
            assert predictor.scores(layer, 1) is None
            picks = np.concatenate([example.experts[begin:end, layer] for example in examples])
            predictor.observe(layer, picks)
        for layer, n in enumerate(model.num_experts):
            some = 1 - np.prod([1 - scores[end, layer, :n] for scores in expected], axis=0)
            np.testing.assert_allclose(np.array(predictor.scores(layer, 1)), some, atol=2e-5)
            assert predictor.scores(layer, 2) is None


def test_expertflow_routing_needs_no_pass_to_be_told(cycles: tuple[Training, Path, TrainingSet]) -> None:
    made, path, data = cycles
    model = model_of(data.header)
    example = examples_of(data)[0]
    expected = make_recipe(ROUTING).scores(model, made.tensors, example)
    predictor = make_predictor(f"expertflow_routing,file={path}", model, {Need.FILE})
    assert predictor.scores(0) is None
    for token in range(4):
        predictor.observe(0, example.experts[token : token + 1, 0])
        if token:
            np.testing.assert_allclose(np.array(predictor.scores(1)), expected[token, 1, :6], atol=2e-5)
        if token != 2:  # as where a layer is left out
            predictor.observe(1, example.experts[token : token + 1, 1])
        else:
            example.experts[token, 1] = -1
            expected = make_recipe(ROUTING).scores(model, made.tensors, example)
    predictor.begin_pass(0)
    predictor.observe(0, np.zeros((0, 2), dtype=np.int64))
    predictor.begin_pass(1)
    assert predictor.scores(0) is None, "nothing was read in the pass before"
