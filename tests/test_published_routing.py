"""What predictors and eviction ahead reach on published routing, where it is at hand."""

from __future__ import annotations

import numpy as np
import pytest
from trace_support import real_trace

from moert.predict import Horizons, Recording, Study
from moert.predict.run import Result, evaluate
from moert.simulate import simulate
from moert.trace import Phase, Sequence, Trace, TraceHeader
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer, recognise

# One process compiles the loops.
pytestmark = pytest.mark.xdist_group("compiled")

GPT_OSS, DEEPSEEK = "gpt-oss-20b/gpt-oss-20b_", "deepseek-v2-lite/deepseek_v2_lite_"


def beginning(name: str, experts: int, tokens: int) -> Trace:
    """The first sequences of a file, of so many tokens or a few more."""
    path = real_trace(*f"{name}.npz".split("/"))
    header, found = load_importer(recognise(path)).read(path, ImportOptions(experts=experts, keep_repetition=False))
    some: list[Sequence] = []
    for sequence in found:
        some.append(sequence)
        if sum(len(one.steps) for one in some) >= tokens:
            break
    return Trace(header, some)


def recorded(name: str, experts: int, tokens: int) -> Recording:
    return Recording.of_trace(beginning(name, experts, tokens), name)


def one_layer_ahead(study: Study) -> Result:
    return evaluate("joint", study, Horizons((1,), ()), asked_tokens=600)


@pytest.mark.parametrize(
    ("name", "experts", "recall"),
    [(f"{GPT_OSS}mmlu_pro_test", 32, 0.64), (f"{GPT_OSS}gpqa_main", 32, 0.71), (f"{DEEPSEEK}summary", 64, 0.64)],
)
def test_the_joint_model_trained_on_one_half_knows_the_other(name: str, experts: int, recall: float) -> None:
    one = recorded(name, experts, 5000)
    half = len(one.sequences) // 2
    found = one_layer_ahead(Study(one, range(half, 2 * half), one, range(half)))
    assert found.row(1).recall["k"] >= recall


@pytest.mark.parametrize("begins", ["cold", "on another domain"])
def test_after_500_tokens_half_of_the_picks_are_known(begins: str) -> None:
    tested = recorded(f"{DEEPSEEK}summary", 64, 700)
    study = Study(tested, range(len(tested.sequences)))
    if begins != "cold":
        other = recorded(f"{DEEPSEEK}intent", 64, 2000)
        study = Study(tested, study.test, other, range(len(other.sequences)))
    windows = {first: recall for first, _, recall in one_layer_ahead(study).by_tokens}
    assert windows[100] >= 0.5
    if begins == "cold":
        assert windows[0] < 0.45 < windows[20]


@pytest.mark.parametrize(
    ("name", "experts"), [(f"{GPT_OSS}gpqa_main", 32), (f"{DEEPSEEK}summary", 64), (f"{DEEPSEEK}law", 64)]
)
def test_four_tokens_ahead_close_most_of_the_gap_to_the_best_eviction(name: str, experts: int) -> None:
    whole = beginning(name, experts, 900)
    # Every third layer, to be done sooner: what is known ahead of one says nothing of another.
    picks = np.concatenate([sequence.experts for sequence in whole.sequences])[:900, ::3]
    phases = np.where(np.arange(900) < 450, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    trace = Trace(TraceHeader(whole.header.layers[::3]), [Sequence(picks, np.arange(900), phases)])
    ema, ahead, least = (
        simulate(trace, policy, "25%", predictor=predictor).hits
        for policy, predictor in (("ema", None), ("ema_ahead,tokens=4", "oracle"), ("belady", None))
    )
    assert ahead - ema >= 0.7 * (least - ema) > 0
