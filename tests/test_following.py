"""`moert.follow`: what is chosen is what the trace says, and what comes out is what that choice makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from trace_support import make_header, random_sequence

import moert
from moert.config import OffloadConfig
from moert.device.simulated import SimulatedDevice
from moert.errors import ConfigError, MoertError
from moert.hf import patching
from moert.trace import NO_EXPERT, Phase, Sequence, Trace

PROMPT = torch.tensor([[5, 17, 33, 8, 61]])
OTHER = torch.tensor([[2, 90, 4, 71, 16]])


@pytest.fixture(params=("not patched", "patched", "on a device"))
def olmoe(request: pytest.FixtureRequest) -> Iterator[Any]:
    model = build("olmoe")
    if request.param == "patched":
        moert.patch(model)
    if request.param == "on a device":
        config = OffloadConfig(device_memory="50%", predictor="none")
        patching.patch(model, config, device=SimulatedDevice(), headroom_bytes=0)
    yield model
    if request.param != "not patched":
        moert.unpatch(model)


def generate(model: Any, prompt: torch.Tensor, n: int = 6, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, **options)


def experts_in(model: Any) -> tuple[int, int, int]:
    with moert.record(model) as trace:
        generate(model, PROMPT, 1)
    header = trace.header
    return len(header.layers), header.layers[0].num_experts, header.top_k


def test_following_a_models_own_recording_changes_nothing(olmoe: Any) -> None:
    with moert.record(olmoe) as trace:
        wanted = generate(olmoe, PROMPT)
    with moert.follow(olmoe, trace):
        assert torch.equal(generate(olmoe, PROMPT), wanted)
        with torch.no_grad():
            followed = olmoe(wanted[:, :-1]).logits
    with torch.no_grad():
        torch.testing.assert_close(olmoe(wanted[:, :-1]).logits, followed, rtol=1e-4, atol=1e-4)


def test_another_text_chooses_as_the_trace_says(olmoe: Any) -> None:
    n_layers, n_experts, k = experts_in(olmoe)
    rng = np.random.default_rng(0)
    header = make_header(*[(n_experts, k)] * n_layers)
    given = Trace(header, [random_sequence(header, 10, rng, optional=("weights",), num_prompt=5) for _ in range(2)])
    with moert.follow(olmoe, given), moert.record(olmoe) as trace:
        generate(olmoe, OTHER)
        generate(olmoe, PROMPT)
    for got, wanted in zip(trace, given, strict=True):
        weights, recorded = wanted.weights, got.weights
        assert weights is not None and recorded is not None
        chosen = np.where(weights > 0, wanted.experts, NO_EXPERT)
        for ids, wanted_ids, one, other in zip(
            got.experts.reshape(-1, k),
            chosen.reshape(-1, k),
            recorded.reshape(-1, k),
            weights.reshape(-1, k),
            strict=True,
        ):
            assert dict(zip(ids, one, strict=True)) == pytest.approx(
                dict(zip(wanted_ids, other, strict=True)), rel=1e-2
            )


def test_rows_of_a_batch_follow_a_sequence_each_and_tokens_begin_again(olmoe: Any) -> None:
    n_layers, n_experts, k = experts_in(olmoe)
    header = make_header(*[(n_experts, k)] * (n_layers + 1))
    picks = [
        np.array([[[(7 * s + 3 * t + i) % n_experts for i in range(k)]] * (n_layers + 1) for t in range(4)])
        for s in range(3)
    ]
    given = Trace(
        header,
        [
            Sequence(p.astype(np.int32), np.arange(4) + 4 * s, np.full(4, Phase.DECODE, np.uint8))
            for s, p in enumerate(picks)
        ],
    )
    with moert.follow(olmoe, given), moert.record(olmoe) as trace:
        generate(olmoe, torch.cat([PROMPT, OTHER]), 5)
        generate(olmoe, torch.cat([OTHER, PROMPT]), 2)
    assert len(trace) == 4
    for number, sequence in enumerate(trace):
        wanted = picks[number % 3]
        for token, row in enumerate(sequence.experts):
            assert np.array_equal(np.sort(row), np.sort(wanted[token % 4, :n_layers]))
        assert sequence.weights is not None and np.allclose(sequence.weights, 1 / k, rtol=1e-2)


def test_drafts_that_are_taken_back_are_followed_again() -> None:
    model = build("olmoe")
    n_layers, n_experts, k = experts_in(model)
    rng = np.random.default_rng(1)
    header = make_header(*[(n_experts, k)] * n_layers)
    given = Trace(header, [random_sequence(header, 64, rng)])
    with moert.follow(model, given):
        wanted = generate(model, PROMPT, 12)
    with moert.follow(model, given), moert.record(model) as trace:
        assert torch.equal(generate(model, PROMPT, 12, prompt_lookup_num_tokens=3), wanted)
    (sequence,) = trace
    assert len(sequence.steps) > 5 + 11, "no draft was rejected, so this has shown nothing"


def test_hooks_are_gone_afterwards(olmoe: Any) -> None:
    wanted = generate(olmoe, PROMPT)
    n_layers, n_experts, k = experts_in(olmoe)
    header = make_header(*[(n_experts, k)] * n_layers)
    given = Trace(header, [random_sequence(header, 8, np.random.default_rng(2))])
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in olmoe.modules())
    with torch.no_grad(), moert.follow(olmoe, given):
        followed = olmoe(PROMPT).logits
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in olmoe.modules()) == hooks
    assert torch.equal(generate(olmoe, PROMPT), wanted)
    with torch.no_grad():
        assert not torch.equal(olmoe(PROMPT).logits, followed)


def test_bad_input() -> None:
    model = build("olmoe")
    n_layers, n_experts, k = experts_in(model)
    rng = np.random.default_rng(3)

    def trace(*layers: tuple[int, int]) -> Trace:
        header = make_header(*layers)
        return Trace(header, [random_sequence(header, 3, rng)])

    with pytest.raises(ConfigError, match="no sequence"), moert.follow(model, Trace(make_header((n_experts, k)))):
        pass
    few = trace(*[(n_experts, k)] * (n_layers - 1))
    with (
        pytest.raises(ConfigError, match=f"has {n_layers - 1} layers.* the model {n_layers}"),
        moert.follow(model, few),
    ):
        pass
    many = trace(*[(n_experts + 1, k)] * n_layers)
    with pytest.raises(ConfigError, match=f"{n_experts + 1} experts and .* {n_experts}"), moert.follow(model, many):
        pass
    fitting = trace(*[(n_experts, k)] * n_layers)
    with moert.follow(model, fitting), pytest.raises(MoertError, match="outside of a forward pass"):
        model.model.layers[0].mlp(torch.zeros(1, 2, model.config.hidden_size))
    with pytest.raises(moert.UnsupportedModelError), moert.follow(torch.nn.Linear(2, 2), fitting):
        pass
