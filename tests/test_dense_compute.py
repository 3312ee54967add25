"""Dense layers computed by moert's kernels: the same products, nothing else of a layer changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_support import HALVES, ROUNDING, Calls, block, exact, numbers
from torch import nn

import moert
from moert.hf.dense_compute import DenseForward, count, give_back, take_over


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (4, 48), (9, 48), (2, 3, 48), (2, 1, 1, 48), (0, 48), (2, 0, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_fp64_rounded(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(48, 40, bias=bias).to(dtype).requires_grad_(False)
    x = numbers(*shape, dtype=dtype)
    assert take_over(layer, None) == 1
    found, expected = layer(x), exact(layer, x)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    scale = expected.abs() + 2**-20 * (x.double().abs() @ layer.weight.double().abs().T)
    assert ((found.double() - expected).abs() <= ROUNDING[dtype] * scale).all()


def test_strided_input_is_read_as_it_lies(calls: Calls) -> None:
    layer = nn.Linear(48, 40).bfloat16().requires_grad_(False)
    x = numbers(3, 96)
    views = [x[:, ::2], x[:, 48:], x.T[:48].T, x.view(3, 2, 48).transpose(0, 1), x[:1, :48].expand(3, 48)]
    expected = [layer(view.contiguous()) for view in views]
    take_over(layer, None)
    assert calls.during(lambda: [layer(view) for view in views]) == len(views)
    for view, value in zip(views, expected, strict=True):
        torch.testing.assert_close(layer(view), value, rtol=2**-7, atol=2**-8)
        assert torch.equal(layer(view), layer(view.contiguous()))


@pytest.mark.parametrize("shape", [(3, 47), (49,), (0, 47), ()])
def test_input_of_a_wrong_shape_is_told_as_torch_tells_it(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(48, 40).bfloat16()
    with pytest.raises(RuntimeError) as expected:
        layer(numbers(*shape))
    take_over(layer, None)
    with pytest.raises(RuntimeError) as found:
        layer(numbers(*shape))
    assert str(found.value) == str(expected.value)


def test_input_of_another_dtype_is_told_as_torch_tells_it() -> None:
    layer = nn.Linear(48, 40).bfloat16()
    take_over(layer, None)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.ones(2, 48))


class OfItsOwnKind(nn.Linear):
    """Somebody's own layer."""


def test_only_plain_layers_of_16_bits_are_taken() -> None:
    halves = [nn.Linear(8, 8).to(dtype) for dtype in HALVES]
    hooked = nn.Linear(8, 8).bfloat16()
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    strided = nn.Linear(8, 16).bfloat16()
    strided.weight = nn.Parameter(torch.randn(8, 16).bfloat16().T)
    others = [nn.Linear(8, 8), OfItsOwnKind(8, 8).bfloat16(), hooked, strided, nn.Bilinear(8, 8, 8).bfloat16()]
    model = nn.ModuleList([*halves, *others])
    assert take_over(model, None) == count(model) == 2
    assert all(isinstance(vars(layer)["forward"], DenseForward) for layer in halves)
    assert hooked(1) == 1
    give_back(model)
    assert count(model) == 0
    assert hooked(1) == 1


def test_none_means_where_the_whole_model_is_on_the_cpu() -> None:
    model = nn.ModuleList([nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8, device="meta").bfloat16()])
    assert take_over(model, None) == count(model) == 0
    assert take_over(model, False) == count(model) == 0
    assert take_over(model, True) == count(model) == 1


def test_nothing_but_the_forward_changes() -> None:
    model = block()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    text, names = repr(model), list(model.state_dict())
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    take_over(model, None)
    assert repr(model) == text
    assert list(model.state_dict()) == names
    assert type(model[0]) is nn.Linear
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    give_back(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


def test_a_model_that_nobody_holds_is_freed_at_once() -> None:
    gc.disable()
    try:
        model = block()
        take_over(model, None)
        model(numbers(2, 48))
        gone = [weakref.ref(model), weakref.ref(model[0].weight)]
        del model
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_forward_that_outlives_its_layer_says_so() -> None:
    layer = nn.Linear(8, 8).bfloat16()
    take_over(layer, None)
    forward = layer.forward
    del layer
    with pytest.raises(moert.MoertError, match="gone"):
        forward(numbers(1, 8))


def test_hooks_run_as_before(calls: Calls) -> None:
    model, seen = block(), []
    take_over(model, None)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, output: seen.append((args[0], output)) or output + 1)
    x = numbers(2, 48)
    assert calls.during(lambda: model(x)) == 2
    ((given, made),) = seen
    assert torch.equal(given, x * 2)
    assert torch.equal(made, vars(model[0])["forward"](x * 2))


class Adapted(nn.Module):
    """As PEFT wraps a layer: the layer is its `base_layer`, with something of low rank beside it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False).to(base_layer.weight.dtype)
        self.up = nn.Linear(2, base_layer.out_features, bias=False).to(base_layer.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_wrapped_layer_is_still_computed_and_given_back(calls: Calls) -> None:
    model = block()
    layer = model[0]
    expected = layer(numbers(2, 48))
    take_over(model, None)
    model[0] = Adapted(layer).requires_grad_(False)
    assert calls.during(lambda: model(numbers(2, 48))) == 2
    model[0].up.weight.zero_()
    torch.testing.assert_close(model[0](numbers(2, 48)), expected, rtol=2**-7, atol=2**-8)
    give_back(model)
    assert count(model) == 0
    assert "forward" not in vars(layer)


def test_layer_taken_out_of_the_model_is_given_back_too() -> None:
    model = block()
    take_over(model, None)
    layer, copied = model[0], copy.deepcopy(model[2])
    model[0], model[2] = nn.Identity(), copied
    give_back(model)
    assert "forward" not in vars(layer)
    assert "forward" not in vars(copied)


def test_weight_is_read_anew_at_every_call(calls: Calls) -> None:
    layer = nn.Linear(48, 40).bfloat16().requires_grad_(False)
    take_over(layer, None)
    x = numbers(2, 48)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.zero_()
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=2**-7, atol=2**-8)
    layer.weight = nn.Parameter(numbers(24, 48), requires_grad=False)
    layer.bias = None  # type: ignore[assignment]
    assert calls.during(lambda: layer(x)) == 1
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=2**-7, atol=2**-8)
    layer.weight.data = numbers(48, 24).T
    assert calls.during(lambda: layer(x)) == 0, "not contiguous"
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(
    "cast", [lambda m: m.float(), lambda m: m.double(), lambda m: m.half()], ids=["float", "double", "half"]
)
def test_layer_cast_afterwards_computes_in_its_new_dtype(cast: Callable[[Any], Any], calls: Calls) -> None:
    model, plain = block(), block()
    take_over(model, None)
    cast(model), cast(plain)
    x = numbers(3, 48, dtype=model[0].weight.dtype)
    assert calls.during(lambda: model(x)) == (2 if x.dtype == torch.float16 else 0)
    if x.dtype == torch.float16:
        torch.testing.assert_close(model(x), plain(x), rtol=2**-9, atol=2**-9)
    else:
        assert torch.equal(model(x), plain(x))


def test_moved_to_a_device_without_our_kernels_it_is_torchs() -> None:
    model = block()
    take_over(model, None)
    assert model.to("meta")(torch.empty(3, 48, dtype=torch.bfloat16, device="meta")).shape == (3, 56)


def test_gradients_are_torchs(calls: Calls) -> None:
    model, plain = block(), block()
    take_over(model, None)
    x, y = numbers(3, 48).requires_grad_(), numbers(3, 48).requires_grad_()
    assert calls.during(lambda: model(x).sum().backward()) == 0
    plain(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    for which in (model, plain):
        which.requires_grad_(True)
    assert calls.during(lambda: model(numbers(3, 48)).sum().backward()) == 0
    plain(numbers(3, 48)).sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    with torch.no_grad():
        assert calls.during(lambda: model(x)) == 2
    with torch.inference_mode():
        assert calls.during(lambda: model(x)) == 2
    model.requires_grad_(False)[0].bias.requires_grad_(True)
    assert calls.during(lambda: model(numbers(3, 48)).sum().backward()) == 0
    assert model[0].bias.grad is not None


def test_forward_mode_derivatives_are_torchs(calls: Calls) -> None:
    from torch.autograd import forward_ad

    model, plain = block(), block()
    take_over(model, None)
    x = numbers(3, 48)

    def by_input(of: Any) -> Any:
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(of(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def by_parameter(of: Any, name: str) -> Any:
        with forward_ad.dual_level(), torch.no_grad():
            value = of[0].get_parameter(name)
            dual = {name: forward_ad.make_dual(value, torch.ones_like(value))}
            return forward_ad.unpack_dual(torch.func.functional_call(of[0], dual, (x,))).tangent

    assert calls.during(lambda: by_input(model)) == 0
    assert torch.equal(by_input(model), by_input(plain))
    for name in ("weight", "bias"):
        assert calls.during(lambda name=name: by_parameter(model, name)) == 0
        assert torch.equal(by_parameter(model, name), by_parameter(plain, name))


def test_torch_func_sees_torchs_products(calls: Calls) -> None:
    model, plain = block(), block()
    take_over(model, None)
    x = numbers(3, 48)
    assert calls.during(lambda: torch.vmap(model)(x)) == 0
    assert torch.equal(torch.vmap(model)(x), torch.vmap(plain)(x))
    other = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    assert not torch.func.functional_call(model, other, (x,)).any()


def test_autocast_casts_as_without_us(calls: Calls) -> None:
    model, plain = block(), block()
    take_over(model, None)
    with torch.autocast("cpu", dtype=torch.float16):
        assert calls.during(lambda: model(numbers(3, 48))) == 0
        assert torch.equal(model(numbers(3, 48)), plain(numbers(3, 48)))


def test_tracers_see_torchs_products(calls: Calls) -> None:
    model, plain = block(), block()
    x = numbers(3, 48)
    expected = plain(x)
    take_over(model, None)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert calls.during(lambda: compiled(x)) == 0
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(model, (x,))
    assert [node.target for node in exported.graph.nodes].count(torch.ops.aten.linear.default) == 2
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(torch.jit.trace(model, (x,))(x), expected)

    class Through(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return False

    graph = Through().trace(model)
    assert [node.target for node in graph.nodes].count(torch.nn.functional.linear) == 2


def test_copy_computes_with_weights_of_its_own(calls: Calls) -> None:
    model = block()
    take_over(model, None)
    x = numbers(3, 48)
    expected = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x).any()
    assert torch.equal(model(x), expected)
    del model
    assert calls.during(lambda: copied(x)) == 2


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_pickled_layer_is_an_ordinary_one(way: str, calls: Calls) -> None:
    model, plain = block(), block()
    take_over(model, None)
    if way == "pickle":
        written = pickle.dumps(model)
        again = pickle.loads(written)
        assert b"moert" not in written
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    x = numbers(3, 48)
    assert calls.during(lambda: again(x)) == 0
    assert torch.equal(again(x), plain(x))
    again[0].weight.zero_()
    assert count(model) == 2
