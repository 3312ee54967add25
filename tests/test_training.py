"""Training sets and their split, the measures, the baselines and the loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_support import make_header, random_sequence
from training_support import learnable, make_trace

from moert.errors import ConfigError, CorruptFileError, MoertError
from moert.predict.recorded import Recording, halves
from moert.predictors.base import Model
from moert.trace import NO_EXPERT, Phase, Trace
from moert.training.baselines import Popularity, SetTransition
from moert.training.examples import Example, Examples, Shares, Source, TrainingSet, targets, trace_hash
from moert.training.hidden import HiddenFile, HiddenWriter
from moert.training.loop import Effort, Point, fit, seeded
from moert.training.measures import WIDTHS, Tally
from moert.training.recipes.base import make_recipe, recipe_names
from moert.training.run import train


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More would wait for one another wherever something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    copies=st.lists(st.integers(0, 11), max_size=4),
    seed=st.integers(0, 3),
    test=st.floats(0.05, 0.9),
)
def test_split_is_by_sequence(lengths: list[int], copies: list[int], seed: int, test: float) -> None:
    trace = make_trace(lengths)
    sequences = [*trace.sequences, *(trace.sequences[place % len(lengths)] for place in copies)]
    data = TrainingSet([Source(Trace(trace.header, sequences), "a"), Source(make_trace([5, 7], seed=9), "b")])
    parts = data.split(Shares(test=test), seed)
    chosen = [set(part.chosen) for part in parts]
    assert all(chosen)
    assert sum(map(len, chosen)) == len(set.union(*chosen)) == data.n_sequences == len(sequences) + 2
    assert sum(part.n_tokens for part in parts) == data.n_tokens
    texts = [{(example.experts.tobytes(), bytes(example.token_ids)) for example in part} for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2]), "a copy on another side"
    assert [part.chosen for part in data.split(Shares(test=test), seed)] == [part.chosen for part in parts]


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 9), min_size=3, max_size=12), test=st.floats(0.05, 0.95))
def test_split_in_order_tests_on_the_last(lengths: list[int], test: float) -> None:
    trace = make_trace(lengths)
    _, cut = halves(Recording.of_trace(trace, "a"))
    data = TrainingSet([Source(trace, "a")])
    parts = data.split(Shares(test=test, in_order=True), 0)
    first, last, tested = (sorted(index for _, index in part.chosen) for part in parts)
    assert [*first, *last, *tested] == list(range(len(lengths)))
    half = data.split(Shares(test=0.5, in_order=True), 0)[2]
    if len(lengths) - len(cut) >= 2:
        assert sorted(index for _, index in half.chosen) == cut, "as `moert predict` cuts"


def test_padding_is_left_out_and_the_prompt_is_known() -> None:
    header = make_header((8, 2))
    whole = random_sequence(header, 6, np.random.default_rng(0), optional=("token_ids",), num_prompt=3)
    whole.phases[0] = Phase.PADDING
    data = TrainingSet([Source(Trace(header, [whole]), "a")])
    example = read(data, 0)
    np.testing.assert_array_equal(example.experts, whole.experts[1:])
    assert example.token_ids is not None
    assert whole.token_ids is not None
    np.testing.assert_array_equal(example.token_ids, whole.token_ids[1:])
    assert example.n_prompt == 2
    assert data.n_tokens == 5


def read(data: TrainingSet, index: int) -> Example:
    return Examples(data.sources, [(0, index)], 0).read(0)


def test_traces_of_two_models_are_refused() -> None:
    a = make_trace([5] * 4, model="one", config_hash="11")
    for other in (
        make_trace([5] * 4, model="one", config_hash="22"),
        make_trace([5] * 4, model="two"),
        Trace(make_header((8, 2), (8, 2), model="one", config_hash="11")),
    ):
        with pytest.raises(ConfigError, match=r"a and b are traces of different models: one \(configuration 11"):
            TrainingSet([Source(a, "a"), Source(other, "b")])
    TrainingSet([Source(a, "a"), Source(make_trace([5] * 4, model="renamed", config_hash="11"), "b")])


def test_what_is_too_short_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"a: too short .*: 2 different sequences of 900 tokens in all; it takes 3"):
        train([Source(make_trace([450, 450]), "a")], "token_table")
    with pytest.raises(ConfigError, match=r"a: too short .* 4 sequences of 400 tokens .* takes at least 500"):
        train([Source(make_trace([100] * 4), "a")], "token_table")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="token_table learns from token ids, and 4 sequences of a have none"):
        train([Source(make_trace([300] * 4, ids=False), "a")], "token_table")
    with pytest.raises(ConfigError, match=r"pre_attention is trained on hidden states.*--prompts FILE"):
        train([Source(make_trace([300] * 4), "a")], "pre_attention")
    with pytest.raises(ConfigError, match="has no epochs"):
        train([Source(make_trace([300] * 4), "a")], "token_table", effort=Effort(epochs=3))
    with pytest.raises(ConfigError, match="no predictor named 'nothing'; trained are expertflow, "):
        make_recipe("nothing")
    with pytest.raises(ConfigError, match="'gate_ahead' is not trained"):
        make_recipe("gate_ahead")
    with pytest.raises(ConfigError, match="depth=0 must be from 1"):
        make_recipe("expertflow,depth=0")
    with pytest.raises(ConfigError, match=r"for test, 1\.5, must be between"):
        Shares(test=1.5)
    assert recipe_names() == ["expertflow", "expertflow_routing", "pre_attention", "token_table"]


@settings(max_examples=25)
@given(seed=st.integers(0, 1000))
def test_measures_are_their_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    header = make_header((7, 3), (5, 2), (6, 1))
    sequence = random_sequence(header, 9, rng, gaps=True)
    scores = rng.permutation(9 * 3 * 7).reshape(9, 3, 7).astype(np.float32)
    for layer, info in enumerate(header.layers):
        scores[:, layer, info.num_experts :] = -1
    tally = Tally((3, 2, 1))
    tally.add(scores[:4], sequence.experts[:4])
    tally.add(scores[4:], sequence.experts[4:])
    found = tally.result()
    for width in WIDTHS:
        right = predicted = chosen = exact = ran = 0
        for token in range(9):
            for layer, info in enumerate(header.layers):
                true = set(sequence.experts[token, layer].tolist()) - {NO_EXPERT}
                if not true:
                    continue
                size = min(int(width * info.top_k), 7)
                best = set(sorted(range(7), key=lambda expert: -scores[token, layer, expert])[:size])
                right, predicted, chosen = right + len(best & true), predicted + size, chosen + len(true)
                exact, ran = exact + (best == true), ran + 1
        assert found.recall[width] == pytest.approx(right / chosen)
        assert found.precision[width] == pytest.approx(right / predicted)
        if width == 1:
            assert found.exact == pytest.approx(exact / ran)
    assert found.n_tokens == 9


def test_set_transition_is_ridge_regression() -> None:
    trace = make_trace([40, 30])
    model = Model((8, 6), (2, 2))
    baseline = SetTransition(model)
    for sequence in trace:
        baseline.learn(sequence.experts)
    chosen = np.concatenate([targets(sequence.experts, 8) for sequence in trace]).astype(float)
    before = np.concatenate([chosen[:, 0], np.ones((70, 1))], axis=1)
    # As least squares: each coefficient is also pulled to 0 by a row of its own.
    rows = np.concatenate([before, np.sqrt(SetTransition.RIDGE) * np.eye(9)])
    weights = np.linalg.lstsq(rows, np.concatenate([chosen[:, 1], np.zeros((9, 8))]), rcond=None)[0]
    scores = baseline.scores(trace[1].experts)
    np.testing.assert_allclose(scores[:, 1], (before[40:] @ weights).clip(0, 1), atol=1e-5)
    np.testing.assert_allclose(scores[:, 0], np.tile(chosen[:, 0].mean(axis=0), (30, 1)), atol=1e-6)


def test_popularity_counts_only_layers_that_ran() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[0, 2], [NO_EXPERT, NO_EXPERT]]], dtype=np.int32)
    baseline = Popularity(Model((4, 4), (2, 2)))
    baseline.learn(experts)
    np.testing.assert_allclose(baseline.scores(experts)[0], [[1, 0.5, 0.5, 0], [0, 0, 1, 1]])


class _Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))


def fitted(
    recalls: list[float], loss: Callable[[torch.Tensor], torch.Tensor], **known: Any
) -> tuple[_Line, list[Point]]:
    """One step an epoch, and what validation says after each."""
    network, said = _Line(), iter(recalls)
    effort = Effort(patience=2, **known)
    points = fit(
        network,
        lambda rng: [rng],
        lambda batch: (loss(network.value), 10),
        lambda: (0.5, next(said)),
        effort,
        epochs=len(recalls) - 1,
        steps=1,
        rate=0.1,
    )
    return network, points


def test_training_ends_early_with_the_best_weights() -> None:
    values: list[float] = []

    def loss(value: torch.Tensor) -> torch.Tensor:
        values.append(float(value.detach()))
        return -value.sum()

    network, points = fitted([0.1, 0.3, 0.5, 0.4, 0.5, 0.9], loss)
    assert [point.validation_recall for point in points] == [0.1, 0.3, 0.5, 0.4, 0.5], "two epochs without a better one"
    assert float(network.value.detach()) == values[2] != values[3], "the weights after the second epoch"
    assert [point.n_tokens for point in points] == [0, 10, 20, 30, 40]
    assert not network.training


def test_a_loss_that_is_no_number_is_an_error() -> None:
    with pytest.raises(MoertError, match="training diverged: the loss of epoch 1 is nan; lower the rate"):
        fitted([0.1, 0.2], lambda value: value.sum() * float("nan"))


def test_progress_is_told_and_may_interrupt() -> None:
    told: list[tuple[int, int]] = []
    fitted([0.1, 0.2, 0.3], lambda value: value.sum(), report=lambda done, total, _: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted([0.1, 0.2], lambda value: value.sum(), report=interrupt)


def test_a_seed_leaves_the_generator_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1):
        assert torch.equal(torch.rand(3), inside)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device 'nothing' cannot be used"):
        Effort(device="nothing").torch_device()
    assert Effort(device="cpu").torch_device().type == "cpu"


def hidden_file(path: Path, trace: Trace, width: int = 4, **known: Any) -> HiddenFile:
    rng = np.random.default_rng(0)
    with HiddenWriter(path) as writer:
        for sequence in trace:
            writer.add(rng.standard_normal((*sequence.experts.shape[:2], width)).astype(np.float16))
        writer.close(known.get("trace_hash", trace_hash(trace)))
    return HiddenFile(path)


def test_hidden_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    trace = make_trace([5, 3])
    found = hidden_file(tmp_path / "hidden.safetensors", trace)
    rng = np.random.default_rng(0)
    for index, length in enumerate((5, 3)):
        expected = rng.standard_normal((length, 2, 4)).astype(np.float16)
        np.testing.assert_array_equal(found.read(index), expected)
    assert found.width == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "hidden.safetensors"]
    TrainingSet([Source(trace, "a", found)])


def test_hidden_states_of_another_trace_are_refused(tmp_path: Path) -> None:
    found = hidden_file(tmp_path / "hidden.safetensors", make_trace([5, 3]))
    with pytest.raises(ConfigError, match=r"recorded beside a trace of hash .* and b has"):
        TrainingSet([Source(make_trace([5, 3], seed=1), "b", found)])
    other = make_trace([5, 4])
    lying = hidden_file(tmp_path / "lying.safetensors", make_trace([5, 3]), trace_hash=trace_hash(other))
    data = TrainingSet([Source(other, "c", lying)])
    with pytest.raises(CorruptFileError, match="sequence 1 has 3 tokens and 2 layers, in c it has 4 and 2"):
        read(data, 1)


def test_files_without_hidden_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    hidden_file(path, make_trace([5, 3]))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        HiddenFile(path)
    path.write_bytes(data.replace(b'"moert_hidden":"1"', b'"moert_hidden":"2"'))
    with pytest.raises(ConfigError, match="version '2'"):
        HiddenFile(path)
    path.write_bytes(data.replace(b"moert_hidden", b"moert_hiddem"))
    with pytest.raises(ConfigError, match="holds no hidden states"):
        HiddenFile(path)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with HiddenWriter(tmp_path / "hidden.safetensors") as writer:
        writer.add(np.zeros((2, 2, 4), dtype=np.float16))
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_gone_through_once_an_epoch() -> None:
    train_part, _, _ = TrainingSet([Source(learnable(12, 5), "a")]).split(Shares(), 0)
    orders = [[example.experts.tobytes() for example in train_part.shuffled(random.Random(seed))] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(example.experts.tobytes() for example in train_part)
