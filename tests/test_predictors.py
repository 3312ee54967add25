"""What the two kinds of gate-ahead see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SUPPORTED_FAMILIES, build, inputs_for

import moert
from moert.errors import ConfigError
from moert.hf.model import offloaded_modules, runtime_of
from moert.hf.router_weights import find_routers
from moert.predictors._ranking import rank
from moert.predictors.base import Model, Router
from moert.predictors.gate_ahead import GateAhead
from moert.predictors.gate_ahead_corrected import GateAheadCorrected, _Channels

D, E, K = 16, 12, 3

EXACT = {"deepseek_v3", "gpt_oss", "lfm2_moe", "mixtral", "olmoe", "qwen3_moe"} & set(SUPPORTED_FAMILIES)
"""Families whose routers are a product, perhaps with a correction, and nothing else that changes the choice."""


def routers(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Router | None]:
    generator = torch.Generator().manual_seed(seed)
    return [Router(torch.randn(E, D, generator=generator).to(dtype), None, None, E, K) for _ in range(n)]


def chosen(router: Router | None, hidden: torch.Tensor, n: int = K) -> list[list[int]]:
    """Each token's choice, by its definition."""
    assert router is not None
    scores = hidden.double() @ router.weight.double().T
    return [sorted(range(E), key=lambda expert: -scores[token, expert])[:n] for token in range(len(hidden))]


def test_gate_ahead_is_the_next_router_on_this_hidden_state() -> None:
    known = routers(4)
    hidden = torch.randn(1, D, generator=torch.Generator().manual_seed(3))
    (first, second) = GateAhead(Model.of_routers(known), ahead=2).step(1, hidden)
    assert (first.layer, second.layer) == (2, 3)
    assert first.experts == chosen(known[2], hidden, n=4)[0]
    assert first.ranks == [0, 1, 2, 3]
    assert second.experts == chosen(known[3], hidden, n=4)[0]


def test_of_several_tokens_each_experts_best_rank_counts() -> None:
    known = routers(2)
    hidden = torch.randn(3, D, generator=torch.Generator().manual_seed(4))
    (found,) = GateAhead(Model.of_routers(known)).step(0, hidden)
    places = [tokens.index(expert) for expert in found.experts for tokens in [chosen(known[1], hidden, E)[0]]]
    assert len(places) == len(found.experts)
    best = {
        expert: min(tokens.index(expert) for tokens in chosen(known[1], hidden, 4) if expert in tokens)
        for tokens in chosen(known[1], hidden, 4)
        for expert in tokens
    }
    assert dict(zip(found.experts, found.ranks, strict=True)) == best


def test_bias_correction_and_identity_experts_count_as_they_do_in_the_router() -> None:
    weight = torch.zeros(4, D)
    weight[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    hidden = torch.ones(1, D)
    assert rank(0, Router(weight, torch.tensor([9.0, 0, 0, 0]), None, 4, 2), hidden).experts == [0, 3, 2]
    # sigmoid: .73, .88, .95, .98
    assert rank(0, Router(weight, None, torch.tensor([0.0, 0.5, 0, 0]), 4, 2), hidden).experts == [1, 3, 2]
    assert rank(0, Router(weight, None, None, 3, 2), hidden).experts == [2, 1], "expert 3 has no weights"


@pytest.mark.parametrize("prompt", [0, 64])
def test_corrected_learns_what_is_between_two_layers(prompt: int) -> None:
    """Every channel is scaled and moved between the looks and the step: after a while the prediction is exact."""
    known = routers(2, seed=5)
    generator = torch.Generator().manual_seed(6)
    gain, offset = 0.2 + torch.rand(D, generator=generator), 3 * torch.randn(D, generator=generator)
    predictor, plain = GateAheadCorrected(Model.of_routers(known)), GateAhead(Model.of_routers(known))

    def run(tokens: int) -> tuple[list[set[int]], list[set[int]]]:
        hidden = torch.randn(tokens, D, generator=generator)
        hidden *= hidden.square().mean(-1, keepdim=True).rsqrt()
        after = hidden * gain + offset
        (early,) = predictor.step(0, hidden)
        (naive,) = plain.step(0, hidden)
        entry = predictor.enter(1, hidden * 7)
        assert entry is not None
        predictor.step(1, after)
        true = set(chosen(known[1], after)[0])
        return [set(found.experts[:K]) & true for found in (early, entry)], [set(naive.experts[:K]) & true]

    if prompt:
        run(prompt)
    for _ in range(0 if prompt else 400):
        run(1)
    looks, naive = zip(*(run(1) for _ in range(50)), strict=True)
    assert sum(len(found) for pair in looks for found in pair) >= 0.98 * 2 * 50 * K
    assert sum(len(found) for (found,) in naive) < 0.6 * 50 * K, "without correction it would be as good"


def test_corrected_keeps_up_with_a_change() -> None:
    known = routers(2, seed=8)
    generator = torch.Generator().manual_seed(9)
    predictor = GateAheadCorrected(Model.of_routers(known))
    for offset in (torch.zeros(D), 4 * torch.randn(D, generator=generator)):
        right = 0
        for step in range(300):
            hidden = torch.randn(1, D, generator=generator)
            (found,) = predictor.step(0, hidden)
            predictor.step(1, hidden + offset)
            if step >= 250:
                right += len(set(found.experts[:K]) & set(chosen(known[1], hidden + offset)[0]))
        assert right >= 0.85 * 50 * K


@pytest.mark.parametrize("family", sorted(EXACT))
def test_routers_that_are_found_choose_what_the_model_chooses(family: str) -> None:
    model = build(family).eval()
    with moert.patch(model, host_memory="75%", predictor="none"):
        runtime = runtime_of(model)
        found = find_routers(model, [layer.spec for layer in runtime.layers])
        picks = []
        for module in offloaded_modules(model).values():
            module.register_forward_pre_hook(lambda module, args: picks.append((module.layer, *args[:2])))
        with torch.inference_mode():
            model(**inputs_for(family, model))
        assert picks
        for layer, hidden, index in picks:
            router = found[int(layer)]
            assert router is not None
            for token in range(len(index)):
                predicted = rank(layer, router, hidden.reshape(-1, hidden.shape[-1])[token : token + 1])
                assert set(predicted.experts[: index.shape[1]]) == set(index[token].tolist())


def test_unknown_predictor_is_refused_and_none_is_none(tiny_olmoe: Path) -> None:
    with pytest.raises(ConfigError, match=r"no predictor named 'oracular'; there are activation_matrix, "):
        moert.load(tiny_olmoe, host_memory="75%", predictor="oracular")
    with moert.load(tiny_olmoe, host_memory="75%", predictor="none") as model:
        assert runtime_of(model).look_ahead is None
    with moert.load(tiny_olmoe, host_memory="75%") as model:
        assert runtime_of(model).look_ahead is not None


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("oracle", "'oracle' needs the future, which is not at hand in a live run"),
        ("token_table", "needs a file that `moert train-predictor` wrote, which is not at hand in a live run"),
        ("joint,speed=-1", "speed=-1.0 must be from"),
        ("joint,fast=1", "'fast=1' is no parameter of joint; its parameters are: speed=0.1, alpha=0.03, ahead=1"),
    ],
)
def test_what_cannot_run_live_is_refused(predictor: str, message: str, tiny_olmoe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        moert.load(tiny_olmoe, host_memory="75%", predictor=predictor)
    assert message in str(caught.value)


def test_without_routers_the_picks_alone_are_gone_by(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moert.hf.router_weights._router_beside", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="no router of this model is known.*'joint' predicts instead"):
        loaded = moert.load(tiny_olmoe, host_memory="50%")
    with loaded as model:
        found = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=12, do_sample=False)
        ahead = runtime_of(model).look_ahead
        assert ahead is not None
        assert type(ahead._predictor).__name__ == "Joint"
        assert ahead._predictor.scores(1, 1) is not None, "it has been told what was picked"
    with moert.load(tiny_olmoe, host_memory="50%", predictor="none") as model:
        assert torch.equal(model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=12, do_sample=False), found)


def test_corrected_learns_the_gain_and_the_offset_of_each_channel_from_many_tokens() -> None:
    gain, offset = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0, -7.0])
    channels = _Channels(3)
    for seed in range(3):
        source = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))
        channels.learn(source, source * gain + offset)
        assert channels.apply(source) == pytest.approx(source * gain + offset, abs=1e-4)
