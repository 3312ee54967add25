"""Maps of what blocks are given: what their recipe learns, and that they say the same told token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import training_support
from training_support import ALL, examples_of, learnable, live_scores, make_trace

from moert.errors import ConfigError
from moert.predict.recorded import model_of
from moert.predictors._choice import make_predictor
from moert.predictors.pre_attention import scale
from moert.trace import Phase, Sequence, Trace
from moert.training.examples import Source, TrainingSet, trace_hash
from moert.training.hidden import HiddenFile, HiddenWriter
from moert.training.loop import Effort
from moert.training.recipes.base import make_recipe
from moert.training.run import Training, train

one_thread = training_support.one_thread


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path, TrainingSet]:
    """A map of hidden states whose best products with a matrix are the experts, some of the second layer missing."""
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((2, 8, 6)) / 2
    folder = tmp_path_factory.mktemp("map")
    header = learnable(1, 2).header
    sequences = []
    with HiddenWriter(folder / "hidden.safetensors") as writer:
        for _ in range(40):
            hidden = scale(torch.from_numpy(rng.standard_normal((60, 2, 6)))).to(torch.float16).numpy()
            logits = np.einsum("tld,led->tle", hidden.astype(float), teacher)
            experts = np.argsort(-logits, axis=2)[..., :2].astype(np.int32)
            experts[::7, 1] = -1
            phases = np.full(60, Phase.PREFILL, dtype=np.uint8)
            ids = rng.integers(0, 99, 60)
            sequences.append(Sequence(experts, np.full(60, len(sequences)), phases, token_ids=ids))
            writer.add(hidden)
        trace = Trace(header, sequences)
        writer.close(trace_hash(trace))
    source = Source(trace, "a", HiddenFile(folder / "hidden.safetensors"))
    made = train([source], "pre_attention,rate=0.05,batch=64", effort=Effort(epochs=8))
    made.save(folder / "map.safetensors")
    return made, folder / "map.safetensors", TrainingSet([source])


def test_pre_attention_learns_a_linear_router(mapped: tuple[Training, Path, TrainingSet]) -> None:
    made, _, _ = mapped
    assert made.test.recall[1.0] > 0.93
    assert all(np.isfinite(array).all() for array in made.tensors.values())


def test_pre_attention_live_is_its_recipe(mapped: tuple[Training, Path, TrainingSet]) -> None:
    made, path, data = mapped
    model = model_of(data.header)
    example = examples_of(data)[0]
    expected = make_recipe("pre_attention").scores(model, made.tensors, example)
    predictor = make_predictor(f"pre_attention,file={path}", model, ALL)
    # Whatever the scale of the residual stream.
    np.testing.assert_allclose(live_scores(predictor, example), expected, atol=2e-3)
    assert example.hidden is not None
    one = predictor.enter(1, torch.from_numpy(example.hidden[:1, 1]))
    assert one is not None
    assert one.experts == np.argsort(-expected[0, 1])[:3].tolist()
    assert one.probabilities is not None
    np.testing.assert_allclose(one.probabilities, -np.sort(-expected[0, 1])[:3], atol=2e-3)
    several = predictor.enter(1, torch.from_numpy(example.hidden[:4, 1]))
    assert several is not None
    assert {int(row.argmax()) for row in expected[:4, 1]} == {
        expert for expert, place in zip(several.experts, several.ranks, strict=True) if place == 0
    }
    assert predictor.scores(0) is None
    assert predictor.scores(1, 1) is None


def test_pre_attention_says_nothing_of_what_is_no_number(mapped: tuple[Training, Path, TrainingSet]) -> None:
    _, path, data = mapped
    predictor = make_predictor(f"pre_attention,file={path}", model_of(data.header), ALL)
    assert predictor.enter(0, torch.ones(1, 6)) is not None
    assert predictor.enter(0, torch.full((1, 6), torch.nan)) is None
    assert predictor.scores(0) is None
    assert predictor.enter(0, torch.ones(1, 7)) is None
    assert predictor.enter(0, torch.ones(0, 6)) is None


def test_pre_attention_of_two_widths_is_refused(tmp_path: Path) -> None:
    sources = []
    for width in (4, 6):
        trace = make_trace([300] * 6, seed=width)
        path = tmp_path / f"{width}.safetensors"
        with HiddenWriter(path) as writer:
            for sequence in trace:
                writer.add(np.zeros((*sequence.experts.shape[:2], width), dtype=np.float16))
            writer.close(trace_hash(trace))
        sources.append(Source(trace, str(width), HiddenFile(path)))
    with pytest.raises(ConfigError, match="hidden states of width"):
        train(sources, "pre_attention")
