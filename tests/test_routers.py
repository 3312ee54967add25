"""Routers whose products are moert's: the class's own code, in which only `linear` is another."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_support import HALVES, Calls, numbers
from families import Zoo, build, logits, tiny_config
from torch import nn

import moert
from moert.hf.dense_compute import count, give_back, take_over
from moert.hf.reference import round_as_moert
from moert.hf.routers import RouterForward
from moert.kernels.cpu import linear, product

CALLED = 0
FACTOR = 1


class Router(nn.Module):
    """A class with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.weight = nn.Parameter(torch.randn(8, 48) / 7)


class Plain(Router):
    def forward(self, hidden: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = F.softmax(F.linear(hidden, self.weight), dim=-1).topk(2)
        return chosen.values * scale * FACTOR, chosen.indices


class ByFullName(Router):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input=hidden, weight=self.weight)


class WithBias(Router):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight, self.bias)


class OfItsParent(WithBias):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + F.linear(hidden, self.weight)


class InAnInnerFunction(Router):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        def product() -> torch.Tensor:
            return F.linear(hidden, self.weight)

        return product()


class OfRows(Router):
    """Takes three dimensions and no others."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = hidden.shape
        return F.linear(hidden.view(batch * tokens, width), self.weight)


def made(kind: type[nn.Module], dtype: torch.dtype = torch.bfloat16) -> Any:
    return kind().to(dtype).requires_grad_(False)


def taken(router: nn.Module) -> bool:
    return take_over(router, None) == count(router, RouterForward) == 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [Plain, ByFullName, WithBias, OfItsParent, InAnInnerFunction, OfRows])
def test_product_is_moerts_and_all_else_the_classes(kind: type[nn.Module], dtype: torch.dtype, calls: Calls) -> None:
    router, x = made(kind, dtype), numbers(2, 3, 48, dtype=dtype)
    assert taken(router)
    assert calls.during(lambda: router(x)) == 1
    weight, bias = router.weight, getattr(router, "bias", None)
    if kind is Plain:
        expected = linear(x, weight).softmax(-1).topk(2)
        for value, wanted in zip(router(x, scale=2.0), (expected.values * 2, expected.indices), strict=True):
            assert torch.equal(value, wanted)
        return
    expected = linear(x, weight, bias)
    if kind is OfItsParent:  # the parent's own product is left to torch
        expected = F.linear(x, weight, bias) + linear(x, weight)
    assert torch.equal(router(x), expected.flatten(0, 1) if kind is OfRows else expected)
    give_back(router)
    assert "forward" not in vars(router)
    assert calls.during(lambda: router(x)) == 0


class InFp32(WithBias):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.type(torch.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_product_in_fp32_of_what_is_cast_to_it(dtype: torch.dtype) -> None:
    router, x = made(InFp32, dtype), numbers(2, 3, 48, dtype=dtype)
    assert taken(router)
    found = router(x)
    assert torch.equal(found, product(x.float(), router.weight.float(), router.bias.float()))
    wanted = F.linear(x.double(), router.weight.double(), router.bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2**-20)
    # Each row is the same whatever comes with it.
    assert torch.equal(router(x[1:, 2:]), found[1:, 2:])


def test_finer_router_of_a_model_of_16_bits() -> None:
    model = nn.Sequential(made(Plain, torch.float32), nn.Linear(8, 8, dtype=torch.bfloat16))
    take_over(model, None)
    assert count(model, RouterForward) == 1
    assert count(made(Plain, torch.float32), RouterForward) == 0
    x = numbers(3, 48, dtype=torch.float32)
    expected = product(x, model[0].weight).softmax(-1).topk(2)
    assert torch.equal(model[0](x)[0], expected.values)


class OfTwo(Router):
    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight) + bias


def test_router_that_is_given_a_vector_too(calls: Calls) -> None:
    router, x, bias = made(OfTwo), numbers(3, 48, dtype=torch.bfloat16), torch.ones(8)
    assert taken(router)
    assert calls.during(lambda: router(x, bias)) == 1
    assert torch.equal(router(x, bias), linear(x, router.weight) + bias)


class ByMatmul(Router):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


class OfMore(Router):
    def forward(self, hidden: torch.Tensor, scale: float, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight) * scale + bias


class Counting(Router):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        global CALLED  # noqa: PLW0603  # a function that writes to its module
        CALLED += 1
        return F.linear(hidden, self.weight)


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any) -> Any:
        return F.linear(torch.ones(1, 1), torch.ones(1, 1)) * forward(*args)

    return call


class Wrapped(Router):
    @wrapped
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


class LinearOfItsOwn(nn.Linear):
    def __init__(self) -> None:
        super().__init__(48, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


@pytest.mark.parametrize("kind", [ByMatmul, OfMore, Counting, Wrapped, LinearOfItsOwn])
def test_others_stay_their_own(kind: type[nn.Module]) -> None:
    router = made(kind)
    before = CALLED
    assert take_over(router, None) == 0
    assert "forward" not in vars(router)
    assert before == CALLED
    assert take_over(Plain(), None) == 0, "fp32"


def test_module_is_not_touched_by_trying_it() -> None:
    class Remembering(Router):
        last: torch.Tensor | None = None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("load", torch.zeros(8))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.last = F.linear(hidden, self.weight)
            self.load += 1
            return self.last

    router = made(Remembering)
    assert taken(router)
    assert router.last is None
    assert not router.load.any()
    y = router(numbers(2, 48))
    assert router.last is y
    assert router.load.all()


def test_globals_are_those_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x = made(Plain), numbers(2, 48)
    assert taken(router)
    assert router(x)[0].all()
    with monkeypatch.context() as changed:
        changed.setattr(F, "softmax", lambda logits, dim: logits * 0)
        assert not router(x)[0].any()
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 0)
    assert not router(x)[0].any()


def test_gradients_tracers_and_changed_classes_are_torchs(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    router, plain, x = made(WithBias), made(WithBias), numbers(3, 48)
    assert taken(router)
    for which in (router, plain):
        which.requires_grad_(True)
    assert calls.during(lambda: router(x).sum().backward()) == 0
    plain(x).sum().backward()
    assert torch.equal(router.weight.grad, plain.weight.grad)
    router.requires_grad_(False)
    whole = nn.Sequential(router)
    torch._dynamo.reset()
    assert calls.during(lambda: torch.compile(whole, backend="eager", fullgraph=True)(x)) == 0
    assert calls.during(lambda: torch.export.export(whole, (x,))) == 0
    assert calls.during(lambda: torch.jit.trace(whole, (x,), check_trace=False)) == 0
    assert calls.during(lambda: torch.vmap(router)(x)) == 0
    assert torch.equal(router.float()(x.float()), F.linear(x.float(), router.weight, router.bias))
    monkeypatch.setattr(WithBias, "forward", lambda self, hidden: hidden * 2)
    assert torch.equal(router(x), x * 2)


def test_copies_and_pickles(calls: Calls) -> None:
    router, x = made(WithBias), numbers(3, 48)
    assert taken(router)
    expected, copied = router(x), copy.deepcopy(router)
    copied.weight.zero_(), copied.bias.zero_()
    assert calls.during(lambda: copied(x)) == 1
    assert not copied(x).any()
    assert torch.equal(router(x), expected)
    written = pickle.dumps(router)
    assert b"moert" not in written
    assert calls.during(lambda: pickle.loads(written)(x)) == 0
    forward = vars(copy.deepcopy(copied))["forward"]
    with pytest.raises(moert.MoertError, match="gone"):
        forward(x)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe", "mixtral", "qwen3_next", "minimax"])
def test_routers_of_families_are_found(family: str) -> None:
    model = build(family, config=tiny_config(family)).bfloat16()
    named = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    with moert.patch(model):
        assert count(model, RouterForward) == len(named) > 0
    assert count(model, RouterForward) == 0


def test_reference_of_verify_routes_with_the_same_products(zoo: Zoo) -> None:
    specimen = zoo.specimen("olmoe", torch.bfloat16)
    plain = zoo.fresh("olmoe", torch.bfloat16)
    products = round_as_moert(plain)
    assert products is not None
    with moert.load(specimen.path, host_memory="25%", dtype=torch.bfloat16) as model:
        assert count(plain, RouterForward) == count(model, RouterForward) == model.config.num_hidden_layers
        assert torch.equal(logits(plain, specimen.inputs), logits(model, specimen.inputs))
        for path, router in plain.named_modules():
            if isinstance(vars(router).get("forward"), RouterForward):
                before, x = products.compared, numbers(3, model.config.hidden_size)
                with torch.no_grad():
                    for found, expected in zip(router(x), model.get_submodule(path)(x), strict=True):
                        assert torch.equal(found, expected)
                assert products.compared == before + 1
    assert products.largest_error_ulps <= 1
