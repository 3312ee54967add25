"""One token's attention by moert's kernel, in the models whose attention is torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_support import computed_calls
from families import Zoo
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moert
from moert.hf import attention, dense_compute
from moert.hf.dense_compute import give_back, take_over

Calls = Callable[[Callable[[], Any]], int]


@pytest.fixture(autouse=True)
def layers_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens go through the code of the attentions, and not through all of it at once."""
    monkeypatch.setattr(dense_compute, "self_attention_forward", lambda module: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How often the kernel computes while something runs."""
    return computed_calls(monkeypatch, attention, "attend")


def decode(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, steps: int = 3) -> torch.Tensor:
    """The logits [B, steps, vocabulary] of tokens that follow the prompt `ids` one by one."""
    with torch.no_grad():
        out, found = model(ids, attention_mask=mask, use_cache=True), []
        for step in range(steps):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(torch.full((len(ids), 1), 7 + step), attention_mask=mask, past_key_values=out.past_key_values)
            found.append(out.logits[:, -1].double())
    return torch.stack(found, 1)


PROMPT = torch.tensor([[5, 3, 9, 11, 2, 8, 1]])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_tokens_after_the_prompt_are_attended_by_the_kernel(family: str, zoo: Zoo, calls: Calls) -> None:
    model = zoo.fresh(family, torch.bfloat16)
    layers = model.config.num_hidden_layers
    want = decode(copy.deepcopy(model).double(), PROMPT)
    errors = {}
    for kernels in (True, False):
        with moert.patch(model, host_memory="100%", dense_kernels=kernels):
            found: list[torch.Tensor] = []
            assert calls(lambda found=found: found.append(decode(model, PROMPT))) == 3 * layers * kernels
        errors[kernels] = (found[0] - want).norm().item()
    # Of random weights, so that some roundings change experts.
    assert errors[True] <= 2 * errors[False]
    assert calls(lambda: decode(model, PROMPT)) == 0


def test_padded_batches(zoo: Zoo, calls: Calls) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    ids = torch.cat([PROMPT, PROMPT.roll(1, 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    take_over(model, None)
    found: list[torch.Tensor] = []
    assert calls(lambda: found.append(decode(model, ids, mask))) == 3 * model.config.num_hidden_layers
    give_back(model)
    want = decode(copy.deepcopy(model).double(), ids, mask)
    plain = decode(model, ids, mask)
    assert (found[0] - want).norm() <= 2 * (plain - want).norm()


def test_other_attentions_stay_their_own(zoo: Zoo, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    take_over(model, None)
    assert calls(lambda: decode(model, PROMPT)) > 0
    model.set_attn_implementation("eager")
    assert calls(lambda: decode(model, PROMPT)) == 0
    model.set_attn_implementation("sdpa")
    asked = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        asked.append(True)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mine)
    assert calls(lambda: decode(model, PROMPT)) == 0
    assert asked
    monkeypatch.undo()
    model.float()
    assert calls(lambda: decode(model, PROMPT)) == 0


def test_gradients_autocast_and_dropout_see_torchs(zoo: Zoo, calls: Calls) -> None:
    model = zoo.fresh("qwen3_moe", torch.bfloat16)
    take_over(model, None)

    def one_token(**kwargs: Any) -> Any:
        return model(PROMPT[:, :1], use_cache=False, **kwargs)

    with torch.no_grad():
        assert calls(one_token) == model.config.num_hidden_layers
    model.requires_grad_(True)
    assert calls(lambda: one_token().logits.sum().backward()) == 0
    assert any(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls(one_token) == 0


def module() -> Any:
    made = torch.nn.Module()
    made.num_key_value_groups = 2  # type: ignore[assignment]
    return made


def heads(count: int, tokens: int) -> torch.Tensor:
    return torch.randn((1, count, tokens, 8), generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, 1),
        ({"scaling": 0.5, "is_causal": True, "sliding_window": 3}, 1),
        ({"attention_mask": torch.tensor([[[[True, False, True, True]]]])}, 1),
        ({"position_bias": torch.ones(1, 4, 1, 4, dtype=torch.bfloat16)}, 0),
        ({"dropout": 1.0}, 0),
    ],
)
def test_what_it_is_called_with(given: dict[str, Any], taken: int, calls: Calls) -> None:
    given = {"attention_mask": None, **given}
    found: list[Any] = []
    assert calls(
        lambda: found.append(attention._attention(module(), heads(4, 1), heads(2, 4), heads(2, 4), **given))
    ) == (taken)
    want, _ = sdpa_attention_forward(module(), heads(4, 1), heads(2, 4), heads(2, 4), **given)
    (output, weights) = found[0]
    assert weights is None
    assert output.shape == want.shape
    torch.testing.assert_close(output, want, rtol=2**-7, atol=2**-7)


def test_what_torch_refuses_is_refused() -> None:
    step = module(), heads(4, 1), heads(2, 4), heads(2, 4), None
    try:
        own, _ = sdpa_attention_forward(*step, softcap=1.0)
    except ValueError:
        with pytest.raises(ValueError, match="softcap"):
            attention._attention(*step, softcap=1.0)
    else:  # transformers 5.17 takes it and passes over it
        torch.testing.assert_close(attention._attention(*step, softcap=1.0)[0], own, rtol=0, atol=0)
    alone = torch.nn.Module()
    with pytest.raises(RuntimeError):
        attention._attention(alone, heads(4, 1), heads(2, 4), heads(2, 4), None)
