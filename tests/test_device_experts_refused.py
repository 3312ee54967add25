"""What the GPU's kernels do not compute, and bad input to what they do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import device_experts_support
import pytest
import torch
from device_experts_support import TOLERANCE, moved, same
from families import build, experts_modules, inputs_for, logits

import moert
from moert.errors import ConfigError, KernelUnavailableError, MoertError, UnsupportedModelError
from moert.formats import TensorSpec
from moert.hf.device_experts import DeviceExperts, check_layers
from moert.kernels import grouped_gate_up
from moert.kernels.gate import Gate
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime import device_layer
from moert.runtime.fused import FfnLayout, FusedExperts
from moert.runtime.layer import LayerSpec

device, olmoe = device_experts_support.device, device_experts_support.olmoe


@pytest.mark.gpu
def test_experts_of_one_layer_on_two_devices_are_refused() -> None:
    model = build("olmoe").to("cuda")
    _, module = experts_modules(model)[0]
    module.down_proj.data = module.down_proj.data.cpu()
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj on cuda:0, down_proj on cpu"):
        moert.patch(model)


def test_experts_that_the_kernels_do_not_compute_run_their_own_code(device: str) -> None:
    model = build("dbrx").to(device)
    inputs = moved(inputs_for("dbrx", model), device)
    wanted = logits(model, inputs)
    with pytest.warns(RuntimeWarning, match=r"3 of 3 layers .* more than two products and a gate"):
        moert.patch(model)
    same(logits(model, inputs), wanted)
    moert.reset_stats(model)
    stats = moert.stats(model)
    assert all("more than two products" in str(layer.fallback) for layer in stats.layers)
    assert "more than two products" in stats.as_dict()["layers"][0]["fallback"]
    moert.close(model)
    with pytest.raises(MoertError, match="closed"):
        logits(model, inputs)


def test_a_gate_that_the_kernels_do_not_have(device: str) -> None:
    model = build("olmoe").to(device)
    inputs = moved(inputs_for("olmoe", model), device)
    _, module = experts_modules(model)[1]
    module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0].erf()
    wanted = logits(model, inputs)
    with pytest.warns(RuntimeWarning, match=r"1 of \d layers .* computes something that moert's kernels do not offer"):
        moert.patch(model)
    fallbacks = [layer.fallback for layer in moert.stats(model).layers]
    assert sum(reason is not None for reason in fallbacks) == 1 and fallbacks[1] is not None
    torch.testing.assert_close(logits(model, inputs), wanted, **TOLERANCE)
    moert.close(model)


def test_a_layer_that_is_too_large_for_the_kernels_falls_back() -> None:
    """Its numbers are counted in 31 bits; on tensors without memory."""

    hidden, width = 2**16, 2**15
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    tensors = tuple(TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items())
    spec = LayerSpec(0, "experts", 2, tensors, fused=FusedExperts(FfnLayout(), Gate(), tensors))
    stacked = {name: torch.empty(2, *shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    layer = device_layer.DeviceLayer(spec, Residency(2, make_policy("fifo", 2)), [{}, {}], stacked)
    assert "31 bits" in str(layer.fallback) and layer.stats.fallback == layer.fallback


def test_bad_input(olmoe: Any, device: str) -> None:
    module = next(module for module in olmoe.modules() if isinstance(module, DeviceExperts))
    hidden, ids = torch.randn(3, 64, device=device), torch.zeros(3, 2, dtype=torch.int64, device=device)
    weights = torch.rand(3, 2, device=device)
    with pytest.raises(MoertError, match=r"called with torch.float16"):
        module(hidden.half(), ids, weights)
    with pytest.raises(MoertError, match=r"hidden states on meta; unpatch"):
        module(hidden.to("meta"), ids, weights)
    for wrong, message in (
        ((hidden, ids.float(), weights), "ids must be torch.int32 or torch.int64, not torch.float32"),
        ((hidden, ids, weights.double()), "weights must be .* not torch.float64"),
        ((hidden, ids.to("meta"), weights), "ids is on meta"),
        ((hidden, ids, weights[:, :1]), r"ids are \[3, 2\], the router's weights \[3, 1\]"),
        ((hidden[:2], ids, weights), r"hidden has 2 rows, ids are for 3 tokens"),
        ((hidden[:, :32], ids, weights), r"x is \[3, 32\], the bank takes 64 columns"),
        ((hidden, ids[:, :0], weights[:, :0]), "0 picks a token"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*wrong)
    assert moert.stats(olmoe).device_steps == 0
    assert module(hidden, ids, weights).isfinite().all()


def test_what_cannot_run_is_refused_and_leaves_the_model_as_it_was(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("olmoe").to(device)
    modules = dict(experts_modules(model))

    def refused(error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            moert.patch(model, **options)
        assert dict(experts_modules(model)) == modules

    refused(ConfigError, r"host_memory='50%' is less than .* layers have theirs on a GPU", host_memory="50%")
    with monkeypatch.context() as patched:

        def too_old(device: torch.device) -> int:
            raise KernelUnavailableError("of compute capability 7.5")

        patched.setattr(grouped_gate_up, "runs_on", too_old)
        refused(KernelUnavailableError, "compute capability 7.5")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "moert.kernels.grouped_gate_up", None)
        refused(KernelUnavailableError, r"triton cannot be imported .*moert\[gpu\]")
    spec, there = SimpleNamespace(name="experts", index=0), torch.empty(1, device="cpu")
    owner = SimpleNamespace(names=("a", "b"), stacked={"a": there, "b": there.to("meta")}.__getitem__)
    with pytest.raises(UnsupportedModelError, match="experts has a on cpu, b on meta"):
        check_layers([spec], [owner])  # type: ignore[list-item]  # as much of them as is looked at
