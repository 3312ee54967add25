"""Rotary embedding by moert's kernel: torch's bits and layout, in the attentions whose function it is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_support import HALVES, computed_calls, numbers
from families import Zoo, logits
from torch import nn

import moert
from moert.hf import rotary
from moert.hf.attention import AttentionForward
from moert.hf.dense_compute import count, give_back, take_over
from moert.kernels.rotary import rotate

Angles = tuple[torch.Tensor, torch.Tensor]


def half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos[:, None] + half_turned(x) * sin[:, None]


def whole_heads(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    return turned(q, cos, sin), turned(k, cos, sin)


def first_numbers(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    n = cos.shape[-1]
    return (
        torch.cat([turned(q[..., :n], cos, sin), q[..., n:]], dim=-1),
        torch.cat([turned(k[..., :n], cos, sin), k[..., n:]], dim=-1),
    )


def in_fp32(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    return turned(q.float(), cos, sin).to(q.dtype), turned(k.float(), cos, sin).to(k.dtype)


def the_other_way(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    return turned(q, cos, -sin), turned(k, cos, -sin)


def in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
    return q.copy_(turned(q, cos, sin)), turned(k, cos, sin)


apply_rotary_pos_emb: Callable[..., Any] = whole_heads


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.q_proj = nn.Linear(32, 64, bias=False)
        self.k_proj = nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Angles:
        q, k = (project(x).unflatten(-1, (-1, 16)).transpose(1, 2) for project in (self.q_proj, self.k_proj))
        return apply_rotary_pos_emb(q, k, cos, sin)


def attention(dtype: torch.dtype = torch.bfloat16) -> Any:
    return Attention().to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.bfloat16, tokens: int = 5, turns: int = 16) -> list[torch.Tensor]:
    made = numbers(2, tokens, 32 + 2 * turns, dtype=dtype)
    return [part.contiguous() for part in made.split((32, turns, turns), dim=-1)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """How often the kernel computes while something runs."""
    return computed_calls(monkeypatch, rotary, "rotate")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("width", "turns"), [(2, 2), (16, 16), (30, 30), (128, 128), (16, 8), (80, 20)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 7), (1, 300)])
def test_bits_are_torchs(batch: int, tokens: int, width: int, turns: int, dtype: torch.dtype, isa: str) -> None:
    x = numbers(batch, tokens, 6, width, dtype=dtype).transpose(1, 2)
    cos, sin = numbers(2, batch, tokens, turns, dtype=dtype)
    x[0, 0, 0, 0], x[0, 1, 0, -1], x[0, 2, 0, 0] = torch.nan, torch.inf, 0
    for given in (x, x.contiguous()):
        expected, _ = (whole_heads if turns == width else first_numbers)(given, given, cos, sin)
        found = rotate(given, cos, sin, turns == width)
        assert found is not None
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))
        assert tokens == 1 or found.stride() == expected.stride()


def test_cos_and_sin_that_lie_differently_are_not_for_the_kernel() -> None:
    cos, sin = numbers(1, 5, 8), numbers(1, 5, 16)[..., :8]
    assert rotate(numbers(1, 2, 5, 8), cos, sin, True) is None
    assert rotate(numbers(1, 2, 5, 8), cos, sin.contiguous(), True) is not None


def test_one_row_of_angles_serves_every_batch() -> None:
    x, (cos, sin) = numbers(3, 2, 5, 8), numbers(2, 1, 5, 8)
    found = rotate(x, cos, sin, True)
    assert found is not None
    assert torch.equal(found, turned(x, cos, sin))


@pytest.mark.parametrize(
    ("x", "cos", "whole"),
    [
        (numbers(1, 2, 5, 8).float(), numbers(1, 5, 8).float(), True),
        (numbers(1, 2, 5, 8), numbers(1, 5, 8).half(), True),
        (numbers(1, 2, 5, 8), numbers(1, 5, 4), True),
        (numbers(1, 2, 5, 9), numbers(1, 5, 9), True),
        (numbers(1, 2, 5, 8), numbers(1, 5, 10), False),
        (numbers(1, 2, 5, 8), numbers(1, 1, 8), True),
        (numbers(1, 2, 5, 8), numbers(2, 5, 8), True),
        (numbers(1, 2, 8, 5).transpose(2, 3), numbers(1, 5, 8), True),
        (numbers(1, 2, 5, 8), numbers(1, 5, 16)[..., ::2], True),
        (numbers(1, 5, 4, 8).transpose(1, 2)[:, :2], numbers(1, 5, 8), True),
        (numbers(2, 5, 8), numbers(1, 5, 8), True),
        (numbers(1, 0, 5, 8), numbers(1, 5, 8), True),
        (numbers(1, 1, 1, 1026), numbers(1, 1, 1026), True),
    ],
)
def test_other_operands_are_not_for_the_kernel(x: torch.Tensor, cos: torch.Tensor, whole: bool) -> None:
    assert rotate(x, cos, cos, whole) is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("function", "turns"), [(whole_heads, 16), (first_numbers, 16), (first_numbers, 4)])
def test_attention_computes_with_the_kernel(
    function: Callable[..., Any], turns: int, dtype: torch.dtype, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", function)
    model, given = attention(dtype), inputs(dtype, turns=turns)
    assert take_over(model, None) == 3
    assert count(model, AttentionForward) == 1
    found: list[Angles] = []
    assert calls(lambda: found.append(model(*given))) == 2
    for one, other in zip(found[0], Attention.forward(model, *given), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    give_back(model)
    assert "forward" not in vars(model)
    assert calls(lambda: model(*given)) == 0


@pytest.mark.parametrize("function", [in_fp32, the_other_way, in_place])
def test_other_functions_stay_their_own(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", function)
    model = attention()
    assert take_over(model, None) == 2
    assert "forward" not in vars(model)


def test_angles_that_do_not_fit_are_told_as_torch_tells_it() -> None:
    model, given = attention(), inputs(turns=8)
    take_over(model, None)
    with pytest.raises(RuntimeError, match="size"):
        model(*given)


def test_function_that_is_changed_afterwards_is_followed(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = attention(), inputs()
    take_over(model, None)
    monkeypatch.setattr(sys.modules[__name__], "apply_rotary_pos_emb", lambda q, k, cos, sin: (k, q))
    assert calls(lambda: model(*given)) == 0
    assert model(*given)[0].shape[1] == 1


def test_gradients_tracers_and_autocast_see_the_classes_own(calls: Any) -> None:
    model, given = attention(), inputs()
    take_over(model, None)
    given[0].requires_grad_(True)
    assert calls(lambda: sum(part.sum() for part in model(*given)).backward()) == 0
    assert given[0].grad is not None
    given[0].requires_grad_(False)
    given[1].requires_grad_(True)
    assert calls(lambda: model(*given)) == 0
    with torch.no_grad():
        assert calls(lambda: model(*given)) == 2
    given[1].requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls(lambda: model(*given)) == 0
    torch._dynamo.reset()
    assert calls(lambda: torch.compile(model, backend="eager", fullgraph=True)(*given)) == 0
    assert calls(lambda: torch.jit.trace(nn.Sequential(model)[0], tuple(given), check_trace=False)) == 0
    model.float()
    assert calls(lambda: model(*(part.float() for part in given))) == 0


def test_copy_computes_with_weights_of_its_own(calls: Any) -> None:
    model, given = attention(), inputs()
    take_over(model, None)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.zero_()
    assert calls(lambda: copied(*given)) == 2
    assert not any(part.any() for part in copied(*given))
    assert model(*given)[0].any()


@pytest.mark.parametrize(("family", "found"), [("qwen3_moe", True), ("glm4_moe", True), ("gpt_oss", False)])
def test_models(family: str, found: bool, zoo: Zoo, calls: Any) -> None:
    specimen = zoo.specimen(family, torch.bfloat16)
    model = zoo.fresh(family, torch.bfloat16)
    layers = model.config.num_hidden_layers
    with moert.patch(model, host_memory="50%"):
        forwards = [vars(module).get("forward") for module in model.modules()]
        taken = [forward for forward in forwards if isinstance(forward, AttentionForward)]
        assert sum("apply_rotary_pos_emb" in forward.instead for forward in taken) == layers * found
        assert calls(lambda: logits(model, specimen.inputs)) == 2 * layers * found
    with moert.patch(model, host_memory="50%", dense_kernels=False):
        assert count(model, AttentionForward) == 0
