"""What each recipe learns, and that a predictor told token by token says what its recipe does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from trace_support import make_header
from training_support import learnable, make_trace

from moert.errors import ConfigError
from moert.predict.recorded import model_of
from moert.predictors._choice import make_predictor
from moert.predictors._routing_path import PathShape, RoutingPath, _buckets
from moert.predictors._trained import About, Trained, load_trained
from moert.predictors.base import Model, Need, Predictor
from moert.predictors.pre_attention import scale
from moert.predictors.token_table import Table
from moert.trace import Phase, Sequence, Trace
from moert.training.examples import Example, Examples, Source, TrainingSet, trace_hash
from moert.training.hidden import HiddenFile, HiddenWriter
from moert.training.loop import Effort
from moert.training.recipes.base import make_recipe
from moert.training.run import Training, describe, train

SHAPE = PathShape(vocabulary=20, outputs=14, width=12, inner=20, heads=3, head_size=5, depth=2, window=6, prompt=7)
SMALL = "expertflow,width=32,inner=64,heads=2,head_size=16,depth=1,dropout=0,rate=0.01"
ROUTING = "expertflow_routing,width=32,inner=64,heads=2,head_size=16,depth=1,dropout=0,rate=0.01,window=7"
ALL = frozenset(Need)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More would wait for one another wherever something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_network() -> RoutingPath:
    torch.manual_seed(0)
    network = RoutingPath(SHAPE).eval()
    for distances in (network.encoder_distances, network.decoder_distances):
        torch.nn.init.normal_(distances.weight)
    return network


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


@pytest.mark.parametrize("both_ways", [False, True])
def test_distances_share_buckets_as_in_t5(both_ways: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    apart = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(apart, both_ways, 32, 128)
    assert torch.equal(_buckets(apart, both_ways=both_ways), expected)


@torch.inference_mode()
def test_decoding_in_pieces_is_decoding_at_once() -> None:
    network = random_network()
    tokens, prompt = torch.randint(0, 21, (2, 15)), torch.randint(0, 21, (2, 9))
    whole = network(prompt, None, tokens)
    state = network.begin(prompt)
    pieces = []
    for begin, end in ((0, 4), (4, 5), (5, 14), (14, 15)):
        logits, state = network.decode(tokens[:, begin:end], state)
        pieces.append(logits)
        assert state.past[0][0].shape[2] <= SHAPE.window - 1
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_token_sees_what_it_may_see() -> None:
    """Nothing after it, what is within the window of each layer before it, and of the prompt its last tokens."""
    network = random_network()
    tokens, prompt = torch.randint(0, 20, (1, 16)), torch.randint(0, 20, (1, 9))
    whole = network(prompt, None, tokens)[0]
    for place in range(16):
        other = tokens.clone()
        other[0, place] = 20
        changed = (network(prompt, None, other)[0] - whole).abs().amax(dim=1) > 1e-6
        reach = SHAPE.depth * (SHAPE.window - 1)
        assert changed.nonzero()[:, 0].tolist() == list(range(place, min(16, place + reach + 1)))
    for place in range(9):
        other = prompt.clone()
        other[0, place] = 20
        changed = bool(((network(other, None, tokens)[0] - whole).abs() > 1e-6).any())
        assert changed == (place >= 9 - SHAPE.prompt)


@torch.inference_mode()
def test_padding_of_prompts_changes_nothing() -> None:
    network = random_network()
    prompt, tokens = torch.randint(0, 21, (1, 4)), torch.randint(0, 21, (1, 6))
    padded = torch.cat([torch.randint(0, 21, (1, 3)), prompt], dim=1)
    real = torch.tensor([[False] * 3 + [True] * 4])
    torch.testing.assert_close(network(padded, real, tokens), network(prompt, None, tokens), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Path, TrainingSet]:
    """ExpertFlow's predictor of a trace that it can learn."""
    trace = learnable(50, 60)
    made = train([Source(trace, "a")], SMALL, effort=Effort(epochs=8))
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    made.save(path)
    return made, path, TrainingSet([Source(trace, "a")])


def test_expertflow_learns_what_follows_from_ids(flow: tuple[Training, Path, TrainingSet]) -> None:
    made, _, _ = flow
    assert made.test.recall[1.0] > 0.95
    assert made.baselines["popularity"].recall[1.0] < 0.6
    assert made.baselines["set_transition"].recall[1.0] < made.test.recall[1.0] - 0.2
    assert made.points[-1].n_tokens > 0
    document = describe(made)
    assert document["tokens"]["train"] + document["tokens"]["validation"] + document["tokens"]["test"] == 3000
    assert document["config_hash"] == "77"


@pytest.mark.parametrize("n_prompt", [1, 5])
def test_expertflow_live_is_its_recipe(flow: tuple[Training, Path, TrainingSet], n_prompt: int) -> None:
    made, path, data = flow
    model = model_of(data.header)
    example = examples_of(data)[0]._replace(n_prompt=n_prompt)
    expected = make_recipe(SMALL).scores(model, made.tensors, example)
    found = live_scores(make_predictor(f"expertflow,file={path}", model, ALL), example, n_prompt)
    np.testing.assert_allclose(found[n_prompt:], expected[n_prompt:], atol=2e-5)
    # The first pass asks for what any of its tokens chooses.
    some = 1 - np.prod(1 - expected[:n_prompt], axis=0)
    np.testing.assert_allclose(found[n_prompt - 1], some, atol=2e-5)


def test_expertflow_tries_hinted_tokens_without_reading_them(flow: tuple[Training, Path, TrainingSet]) -> None:
    _, path, data = flow
    model = model_of(data.header)
    ids = examples_of(data)[0].token_ids
    assert ids is not None
    hinted, plain = (make_predictor(f"expertflow,file={path}", model, ALL) for _ in range(2))
    for predictor in (hinted, plain):
        predictor.begin_pass(3, ids[:3])
        assert predictor.scores(0, 1) is None
    hinted.hint(ids[3:5])
    ahead = [np.array(hinted.scores(1, tokens)) for tokens in (1, 2)]
    assert hinted.scores(1, 3) is None
    for token in (3, 4):
        for predictor in (hinted, plain):
            predictor.begin_pass(1, ids[token : token + 1])
        np.testing.assert_allclose(ahead[token - 3], plain.scores(1), atol=2e-5)
        np.testing.assert_array_equal(np.array(hinted.scores(1)), np.array(plain.scores(1)))


def test_expertflow_reads_a_batch_as_its_sequences(flow: tuple[Training, Path, TrainingSet]) -> None:
    _, path, data = flow
    model = model_of(data.header)
    ids = np.stack([example.token_ids for example in examples_of(data)[:2] if example.token_ids is not None])
    alone = [make_predictor(f"expertflow,file={path}", model, ALL) for _ in range(2)]
    both = make_predictor(f"expertflow,file={path}", model, ALL)
    for begin, end in ((0, 4), (4, 5), (5, 6)):
        both.begin_pass(2 * (end - begin), ids[:, begin:end].reshape(-1), rows=2)
        for row, predictor in enumerate(alone):
            predictor.begin_pass(end - begin, ids[row, begin:end])
        expected = 1 - np.prod([1 - np.array(predictor.scores(1)) for predictor in alone], axis=0)
        np.testing.assert_allclose(np.array(both.scores(1)), expected, atol=2e-5)


def test_expertflow_without_ids_says_nothing_until_a_new_sequence(flow: tuple[Training, Path, TrainingSet]) -> None:
    _, path, data = flow
    predictor = make_predictor(f"expertflow,file={path}", model_of(data.header), ALL)
    predictor.begin_pass(1, np.array([3]))
    assert predictor.scores(0) is not None
    predictor.begin_pass(1)
    assert predictor.scores(0) is None
    assert list(predictor.step(0)) == []
    predictor.begin_pass(1, np.array([-7]))
    assert predictor.scores(0) is not None


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


def test_the_same_seed_gives_the_same_predictor() -> None:
    trace = learnable(50, 60)
    first, again, other = (
        train([Source(trace, "a")], SMALL, effort=Effort(epochs=1, seed=seed, device="cpu")) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not np.array_equal(first.tensors["head.weight"], other.tensors["head.weight"])


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
