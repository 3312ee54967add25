"""The Triton kernels over rows of a bank on a simulated device, under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_support
from families import build, inputs_for, logits

import moert
from moert.config import OffloadConfig
from moert.device.simulated import Machine, SimulatedDevice
from moert.hf import patching
from moert.hf.model import runtime_of
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_triton import RowByPick
from moert.schedule import Costs, Curve

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")

# Sums are in another order than on the CPU, in fp32 both.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

ON_DEVICE = Costs(Curve.constant(1.0), Curve.constant(1e-6), move_s=1e-6)
ON_CPU = Costs(Curve.constant(1e-6), Curve.constant(1e-6), move_s=1.0)


def patched(family: str, **options: Any) -> tuple[Any, DeviceTier]:
    """A model of the family over a simulated device on which the Triton kernels compute."""
    model = build(family)
    config = OffloadConfig(debug=True, device_memory=options.pop("device_memory", "50%"))
    device = SimulatedDevice(Machine(latency_s=1e-5), virtual=True)
    settings = {"triton": True, "headroom_bytes": 0, "guarded": False, "costs": ON_DEVICE, **options}
    patching.patch(model, config, device=device, **settings)
    tier = runtime_of(model).device
    assert tier is not None
    assert all(isinstance(kernels, RowByPick) for kernels in tier._kernels)
    return model, tier


def prompts(family: str, model: Any) -> list[dict[str, Any]]:
    """One of so many tokens that they are computed together, and one of a token."""
    inputs = inputs_for(family, model)
    return [{**inputs, "input_ids": inputs["input_ids"][:1, :n]} for n in (3, 1)]


@pytest.mark.parametrize("costs", [ON_DEVICE, ON_CPU], ids=["device", "cpu"])
@pytest.mark.parametrize(
    "family",
    ["olmoe", pytest.param("gpt_oss", marks=pytest.mark.slow), pytest.param("longcat_flash", marks=pytest.mark.slow)],
)
def test_logits_are_those_of_transformers(family: str, costs: Costs) -> None:
    several = prompts(family, plain := build(family))
    right = [logits(plain, each) for each in several]
    model, tier = patched(family, costs=costs)
    for each, wanted in zip(several, right, strict=True):
        torch.testing.assert_close(logits(model, each), wanted, **TOLERANCE)
    assert bool(tier.counts.fetched) == (costs is ON_DEVICE)
    assert bool(tier.counts.on_cpu) == (costs is ON_CPU)
    moert.close(model)


@pytest.mark.slow
def test_without_the_cpu_the_bits_are_the_same_at_every_budget() -> None:
    several = prompts("olmoe", build("olmoe"))
    found = []
    for share in ("100%", "50%", "25%"):
        model, tier = patched("olmoe", device_memory=share, promoting=False)
        found.append([logits(model, each) for each in several])
        assert not tier.counts.on_cpu
        assert bool(tier.counts.fetched) == (share != "100%")
        moert.close(model)
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            assert torch.equal(got, wanted)


def test_a_layer_that_the_kernels_cannot_compute_says_so() -> None:
    family = "phimoe"
    model = build(family)
    model.get_submodule(
        next(path for path, module in model.named_modules() if hasattr(module, "act_fn"))
    ).act_fn = torch.nn.Softsign()
    config = OffloadConfig(device_memory="50%")
    device = SimulatedDevice(virtual=True)
    with pytest.warns(RuntimeWarning, match="layers of experts are computed on the device by the model's own code"):
        patching.patch(model, config, device=device, triton=True, headroom_bytes=0, costs=ON_DEVICE)
    assert any(layer.fallback for layer in moert.stats(model).layers)
    moert.close(model)
