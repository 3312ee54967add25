"""Single tokens that the device runs by itself, under Triton's interpreter: tokens, books and what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_support
from families import build, logits

import moert
from moert.config import OffloadConfig
from moert.device.simulated import Machine, SimulatedDevice
from moert.hf import patching
from moert.hf.model import runtime_of
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import PLANNED
from moert.schedule import Costs, Curve

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")

ON_DEVICE = Costs(Curve.constant(1.0), Curve.constant(1e-6), move_s=1e-6)


def patched(family: str = "olmoe", **options: Any) -> tuple[Any, DeviceTier]:
    """A model whose single tokens are planned on a simulated device unless `planned=False`."""
    model = options.pop("model", None) or build(family)
    names = OffloadConfig.option_names()
    config = {"debug": True, "device_memory": "50%", **{k: v for k, v in options.items() if k in names}}
    settings = {
        "triton": True,
        "planned": True,
        "headroom_bytes": 0,
        "guarded": False,
        "costs": ON_DEVICE,
        "promoting": False,
        **{k: v for k, v in options.items() if k not in names and k != "machine"},
    }
    device = SimulatedDevice(options.get("machine", Machine(latency_s=1e-5)), virtual=True)
    patching.patch(model, OffloadConfig(**config), device=device, **settings)
    tier = runtime_of(model).device
    assert tier is not None
    return model, tier


def generate(model: Any, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(1))
    found = model.generate(prompt, max_new_tokens=n, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


def test_a() -> None:
    model, tier = patched(planned=False)
    wanted = generate(model)
    moert.close(model)
    model, tier = patched()
    got = generate(model)
    print(tier.counts, tier.why_not_planned)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    print(moert.stats(model))
    assert tier.counts.ways[PLANNED]
    generate(model)
    tier.settle()
    tier.check_integrity()
    assert torch.equal(generate(model)[1], wanted[1])
    moert.close(model)
