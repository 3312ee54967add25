"""Norms computed by moert's kernel: found by trying, rounded where the class rounds, nothing else changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_support import HALVES, computed_calls, numbers
from families import LAYOUT_FAMILIES, Zoo, logits
from torch import nn

import moert
from moert.hf import norms
from moert.hf.dense_compute import count, give_back, take_over
from moert.hf.norms import NormForward
from moert.hf.reference import round_as_moert
from moert.kernels import cpu
from moert.kernels.norm import SCALES, rms_norm


class Normed(nn.Module):
    """What the norms here have in common."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.weight = nn.Parameter(torch.randn(width))
        self.epsilon_of_mine = eps

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon_of_mine)


class AfterRounding(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normed(x).to(x.dtype)


class BeforeRounding(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight.float() * self.normed(x)).to(x.dtype)


class OnePlus(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.normed(x) * (1.0 + self.weight.float())).type_as(x)


OURS = dict(zip(SCALES, (AfterRounding, BeforeRounding, OnePlus), strict=True))


def made(kind: type[Normed], width: int = 48, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Normed:
    return kind(width, **options).to(dtype).requires_grad_(False)


def taken(norm: nn.Module) -> bool:
    return take_over(norm, None) == count(norm, NormForward) == 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """How often the kernel computes while something runs."""
    return computed_calls(monkeypatch, norms, "rms_norm")


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(a) - ordered(b)).abs()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [1, 3, 31, 64, 129, 1000, 4099])
def test_rounds_where_torch_does(width: int, scale: str, dtype: torch.dtype, isa: str) -> None:
    norm = made(OURS[scale], width, dtype)
    x = numbers(1 + 200_000 // width, width, dtype=dtype) * torch.logspace(-3, 3, 7, dtype=dtype).repeat(9999)[:width]
    found, expected = rms_norm(x, norm.weight, norm.epsilon_of_mine, scale), norm(x)
    assert found is not None
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    apart = ulps_apart(found, expected)
    # Sums of squares differ in the last bits, which shows where a rounding was nearly a tie.
    assert apart.count_nonzero() < 1e-3 * apart.numel()
    assert apart.max() <= (2 if scale == "after_rounding" else 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_instruction_set_and_every_neighbour_gives_the_same_bits(scale: str, dtype: torch.dtype) -> None:
    norm, x = made(OURS[scale], 333, dtype), numbers(600, 333, dtype=dtype)
    before, found = cpu.isa(), []
    try:
        for name in cpu.isa_names():
            cpu.use_isa(name)
            found.append(rms_norm(x, norm.weight, 1e-6, scale))
    finally:
        cpu.use_isa(before)
    assert len(found) > 1
    assert all(torch.equal(one, found[0]) for one in found)
    alone = torch.stack([rms_norm(row, norm.weight, 1e-6, scale) for row in x])
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_zeros_infinities_and_nan_are_torchs(eps: float, scale: str, dtype: torch.dtype, isa: str) -> None:
    norm = made(OURS[scale], 40, dtype, eps=eps)
    x = numbers(7, 40, dtype=dtype)
    x[0] = 0
    x[1, 3] = torch.inf
    x[2, 39] = -torch.inf
    x[3, 0] = torch.nan
    x[4] = torch.finfo(dtype).tiny
    x[5] *= torch.finfo(dtype).max / 8
    for weight in (norm.weight, torch.full((40,), torch.inf, dtype=dtype), torch.full((40,), torch.nan, dtype=dtype)):
        norm.weight.data = weight
        found, expected = rms_norm(x, norm.weight, eps, scale), norm(x)
        assert found is not None
        assert torch.equal(found.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert torch.equal(found[expected.isinf()], expected[expected.isinf()])
        assert (ulps_apart(found, expected)[finite] <= (2 if scale == "after_rounding" else 1)).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:1, :1, 0],
        lambda x: x[0, 0, 0],
        lambda x: x[..., 8:40],
        lambda x: x[:, :, 1],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(2, 1, 0, 3),
    ],
    ids=["token", "row", "columns", "head", "transposed", "permuted"],
)
def test_rows_are_read_as_they_lie(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(numbers(3, 4, 5, 48))
    norm = made(AfterRounding, x.shape[-1])
    found, expected = rms_norm(x, norm.weight, norm.epsilon_of_mine, "after_rounding"), norm(x)
    assert found is not None
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_nothing_is_written_beyond_the_rows() -> None:
    whole = torch.full((64, 33), 7.0, dtype=torch.bfloat16)
    x, weight = whole[:, :17], numbers(17)
    before = whole.clone()
    assert rms_norm(x, weight, 1e-6, "one_plus") is not None
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (numbers(2, 8).float(), numbers(8).float()),
        (numbers(2, 8).half(), numbers(8)),
        (numbers(2, 8), numbers(9)),
        (numbers(8, 2).T, numbers(8)),
        (numbers(2, 8), numbers(16)[::2]),
        (numbers(0, 8), numbers(8)),
        (torch.tensor(1.0).bfloat16(), numbers(1)),
        (numbers(1, 8).expand(3, 8), numbers(8)),
        (numbers(3, 4, 5, 8)[:, ::2], numbers(8)),
        (numbers(2, 8).to("meta"), numbers(8)),
    ],
)
def test_other_operands_are_not_for_the_kernel(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert rms_norm(x, weight, 1e-6, "after_rounding") is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [4, 64, 511])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.0])
def test_which_norm_it_is_is_found(scale: str, dtype: torch.dtype, width: int, eps: float) -> None:
    norm = made(OURS[scale], width, dtype, eps=eps)
    with torch.no_grad():
        norm.weight.fill_(1)  # as nobody trained it: nothing to tell one from the other
    weight = norm.weight
    assert taken(norm)
    forward = vars(norm)["forward"]
    assert (forward._eps, forward._scale) == (eps, scale)
    assert norm.weight is weight
    assert (weight == 1).all()
    norm.weight.data = numbers(width, dtype=dtype)
    x = numbers(5, width, dtype=dtype)
    assert ulps_apart(norm(x), type(norm).forward(norm, x)).max() <= 2


class Centred(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normed(x - x.mean(-1, keepdim=True)).to(x.dtype)


class InItsDtype(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon_of_mine)


class InGroups(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.normed(x.unflatten(-1, (2, -1))).flatten(-2) * self.weight.float()).to(x.dtype)


class Counting(AfterRounding):
    seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x)


class Noisy(AfterRounding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class InPlace(AfterRounding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(super().forward(x))


class ByLength(AfterRounding):
    """Another norm for one token than for many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if x.shape[:-1].numel() == 1 else 1)


class WithBuffer(AfterRounding):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class WithTensor(AfterRounding):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.factor = torch.ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor.to(x.dtype)


@pytest.mark.parametrize(
    "kind", [Centred, InItsDtype, InGroups, Counting, Noisy, InPlace, ByLength, WithBuffer, WithTensor]
)
def test_other_norms_stay_their_own(kind: type[Normed]) -> None:
    norm = made(kind, dtype=torch.float16)
    assert take_over(norm, None) == 0
    assert "forward" not in vars(norm)
    assert "seen" not in vars(norm)


def test_modules_that_are_no_norms_stay_their_own() -> None:
    hooked = made(AfterRounding)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    others = [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.PReLU(8), nn.Embedding(8, 8), nn.SiLU()]
    model = nn.ModuleList([*(module.bfloat16() for module in others), AfterRounding(8), hooked])
    assert take_over(model, None) == 0
    assert hooked(1) == 1


@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_norms_of_families_are_found(family: str, zoo: Zoo) -> None:
    model = zoo.fresh(family, torch.bfloat16)
    named = [
        module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and len(module._parameters)
    ]
    with moert.patch(model, host_memory="50%"):
        assert count(model, NormForward) >= len(named)
    assert count(model, NormForward) == 0


def test_model_computes_with_the_kernel_and_verify_does_so_too(
    zoo: Zoo, calls: Callable[[Callable[[], Any]], int]
) -> None:
    specimen = zoo.specimen("qwen3_moe", torch.bfloat16)
    plain = zoo.fresh("qwen3_moe", torch.bfloat16)
    products = round_as_moert(plain)
    assert products is not None
    with moert.load(specimen.path, host_memory="25%", dtype=torch.bfloat16) as model:
        held = count(model, NormForward)
        assert held == count(plain, NormForward) == 4 * model.config.num_hidden_layers + 1
        assert calls(lambda: logits(model, specimen.inputs)) == held
        layers = {path: module for path, module in plain.named_modules() if isinstance(module.forward, NormForward)}
        for path, layer in layers.items():
            before, x = products.compared, numbers(9, *layer.weight.shape)
            with torch.no_grad():
                assert torch.equal(layer(x), model.get_submodule(path)(x))
            assert products.compared == before + 1
        assert 0 <= products.largest_error_ulps <= 1
    with moert.load(specimen.path, host_memory="25%", dtype=torch.bfloat16, dense_kernels=False) as model:
        assert count(model, NormForward) == 0


def test_weight_and_settings_are_read_anew(calls: Callable[[Callable[[], Any]], int]) -> None:
    norm, x = made(AfterRounding), numbers(3, 48)
    assert taken(norm)
    norm.weight.data.mul_(3)
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
    assert calls(lambda: norm(x)) == 1
    assert torch.equal(norm(x), AfterRounding.forward(norm, x))
    norm.epsilon_of_mine = 10.0
    assert calls(lambda: norm(x)) == 0
    assert torch.equal(norm(x), AfterRounding.forward(norm, x))
    norm.epsilon_of_mine = 1e-6
    norm.half()
    x = x.half()
    norm(x)
    assert torch.equal(norm.float()(x.float()), AfterRounding.forward(norm, x.float()))
    assert norm.to("meta")(x.to("meta")).shape == x.shape


def test_class_that_is_changed_afterwards_is_followed(
    calls: Callable[[Callable[[], Any]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = made(AfterRounding)
    assert taken(norm)
    monkeypatch.setattr(AfterRounding, "forward", lambda self, x: x * 2)
    assert calls(lambda: norm(numbers(2, 48))) == 0
    assert torch.equal(norm(numbers(2, 48)), numbers(2, 48) * 2)


def test_keywords_and_wrong_input_are_the_classes_own(calls: Callable[[Callable[[], Any]], int]) -> None:
    norm, x = made(AfterRounding), numbers(3, 48)
    assert taken(norm)
    assert calls(lambda: norm(x=x)) == 0
    assert torch.equal(norm(x=x), norm(x))
    with pytest.raises(TypeError, match="positional"):
        norm()
    with pytest.raises(RuntimeError, match="size"):
        norm(numbers(3, 47))
    assert norm(numbers(0, 48)).shape == (0, 48)


def test_gradients_transforms_autocast_and_tracers_see_the_classes_own(
    calls: Callable[[Callable[[], Any]], int],
) -> None:
    from torch.autograd import forward_ad

    norm, plain = made(AfterRounding), made(AfterRounding)
    assert taken(norm)
    x, y = numbers(3, 48).requires_grad_(), numbers(3, 48).requires_grad_()
    assert calls(lambda: norm(x).sum().backward()) == 0
    plain(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    norm.weight.requires_grad_(True)
    assert calls(lambda: norm(numbers(3, 48)).sum().backward()) == 0
    assert norm.weight.grad is not None
    with torch.no_grad():
        assert calls(lambda: norm(x)) == 1
    norm.weight.requires_grad_(False)
    x = numbers(3, 48)

    def tangent() -> Any:
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    assert calls(tangent) == 0
    assert tangent() is not None
    assert calls(lambda: torch.vmap(norm)(x)) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls(lambda: norm(x)) == 0
    torch._dynamo.reset()
    whole = nn.Sequential(norm)
    assert calls(lambda: torch.compile(whole, backend="eager", fullgraph=True)(x)) == 0
    assert calls(lambda: torch.export.export(whole, (x,))) == 0
    assert calls(lambda: torch.jit.trace(whole, (x,), check_trace=False)) == 0
    other = {"weight": torch.zeros(48, dtype=torch.bfloat16)}
    assert not torch.func.functional_call(norm, other, (x,)).any()


def test_copies_and_pickles(calls: Callable[[Callable[[], Any]], int]) -> None:
    norm, x = made(AfterRounding), numbers(3, 48)
    assert taken(norm)
    expected, copied = norm(x), copy.deepcopy(norm)
    copied.weight.zero_()
    assert calls(lambda: copied(x)) == 1
    assert not copied(x).any()
    assert torch.equal(norm(x), expected)
    again = pickle.loads(pickle.dumps(norm))
    assert calls(lambda: again(x)) == 0
    assert torch.equal(again(x), AfterRounding.forward(norm, x))
    give_back(norm)
    assert "forward" not in vars(norm)
    forward = vars(copy.deepcopy(copied))["forward"]
    with pytest.raises(moert.MoertError, match="gone"):
        forward(x)
