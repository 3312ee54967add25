"""ExpertFlow's predictor: its network, what its recipe learns, and that it says the same told token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import training_support
from training_support import ALL, examples_of, learnable, live_scores

from moert.predict.recorded import model_of
from moert.predictors._choice import make_predictor
from moert.predictors._routing_path import PathShape, RoutingPath, _buckets
from moert.training.examples import Source, TrainingSet
from moert.training.loop import Effort
from moert.training.recipes.base import make_recipe
from moert.training.run import Training, describe, train

one_thread = training_support.one_thread

SHAPE = PathShape(vocabulary=20, outputs=14, width=12, inner=20, heads=3, head_size=5, depth=2, window=6, prompt=7)
SMALL = "expertflow,width=32,inner=64,heads=2,head_size=16,depth=1,dropout=0,rate=0.01"


def random_network() -> RoutingPath:
    torch.manual_seed(0)
    network = RoutingPath(SHAPE).eval()
    for distances in (network.encoder_distances, network.decoder_distances):
        torch.nn.init.normal_(distances.weight)
    return network


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


def test_the_same_seed_gives_the_same_predictor() -> None:
    trace = learnable(50, 60)
    first, again, other = (
        train([Source(trace, "a")], SMALL, effort=Effort(epochs=1, seed=seed, device="cpu")) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not np.array_equal(first.tensors["head.weight"], other.tensors["head.weight"])
