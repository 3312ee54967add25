"""Whole models over a simulated device: the same logits at every budget, and what happens when the device fails."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, experts_modules, inputs_for, logits

import moert
from moert.config import OffloadConfig
from moert.device.base import DeviceLostError
from moert.device.simulated import Machine, SimulatedDevice
from moert.errors import CapacityError, ConfigError, MoertError
from moert.hf import loading, patching
from moert.hf.device_tiered import TieredExperts
from moert.hf.model import runtime_of
from moert.runtime import device_parts
from moert.runtime.device_tier import DeviceTier
from moert.schedule import Costs, Curve, scheduler_names

PROMPT = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))

# The CPU takes a third or so of what is missing; so every part of the machine has something to do.
COSTS = Costs(Curve.proportional(2e-4), Curve.constant(1e-5), move_s=3e-4, read_s=1e-3)

LINK = Machine(up_bytes_per_s=2e9, latency_s=2e-5)


def make(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=40,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM._from_config(config, dtype=dtype).eval()


def generate(model: Any, prompt: torch.Tensor = PROMPT, n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits that they were chosen by."""
    found = model.generate(prompt, max_new_tokens=n, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


@pytest.fixture(scope="module")
def wanted() -> dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]:
    """What moert's own CPU kernels give with every expert in memory and no device."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = moert.patch(make(dtype))
        found[dtype] = generate(model)
        moert.close(model)
    return found


@pytest.fixture
def tiered() -> Iterator[Callable[..., tuple[Any, DeviceTier]]]:
    """`tiered(device_memory=..., ...)`: the model over a simulated device, checked after each step, and its tier."""
    models = []

    def build_one(
        machine: Machine = LINK, dtype: torch.dtype = torch.float32, model: Any = None, **options: Any
    ) -> tuple[Any, DeviceTier]:
        names = OffloadConfig.option_names()
        config = OffloadConfig(debug=True, **{name: value for name, value in options.items() if name in names})
        others = {name: value for name, value in options.items() if name not in names}
        others = {"costs": COSTS, "headroom_bytes": 0, **others}
        device = others.pop("device", None) or SimulatedDevice(machine)
        model = make(dtype) if model is None else model
        patching.patch(model, config, device=device, **others)
        models.append(model)
        tier = runtime_of(model).device
        assert tier is not None
        return model, tier

    yield build_one
    for model in models:
        with contextlib.suppress(MoertError):  # some have been unpatched
            moert.close(model)


def same(model: Any, right: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Tokens are equal, and so is every logit to the last bit."""
    tokens, numbers = generate(model)
    assert torch.equal(tokens, right[0])
    assert torch.equal(numbers, right[1])


@pytest.mark.parametrize("host", ["100%", "30%"])
@pytest.mark.parametrize("share", ["100%", "50%", "25%", "10%"])
def test_logits_are_the_same_at_every_budget(share: str, host: str, tiered: Callable[..., Any], wanted: Any) -> None:
    dtype = torch.bfloat16 if share == "25%" else torch.float32
    model, tier = tiered(device_memory=share, host_memory=host, dtype=dtype)
    same(model, wanted[dtype])
    counts = tier.counts
    assert counts.on_device
    if share != "100%":
        assert counts.fetched
        assert counts.on_cpu
    elif host == "100%":
        assert moert.stats(model).hit_rate == 1.0
        assert not counts.fetched
    if host == "30%":
        assert moert.stats(model).bytes_read
    assert tier.device.ledger.reads >= counts.on_device  # each of them was checked


@pytest.mark.parametrize(
    ("schedule", "policy"), [*((name, "ema") for name in scheduler_names()), ("exact", "lru"), ("exact", "sieve")]
)
def test_no_schedule_and_no_policy_changes_a_bit(
    schedule: str, policy: str, tiered: Callable[..., Any], wanted: Any
) -> None:
    model, _ = tiered(device_memory="20%", host_memory="50%", policy=policy, schedule=schedule, guarded=False)
    same(model, wanted[torch.float32])


def test_costs_are_measured_and_a_guard_looks_on(tiered: Callable[..., Any], wanted: Any) -> None:
    model, tier = tiered(device_memory="25%", costs=None)
    for _ in range(2):
        same(model, wanted[torch.float32])
    assert set(tier.counts.ways) <= {"exact", "cpu_all", "fetch_all"}
    assert len(tier.counts.ways) > 1, "no other way was ever tried"


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "nemotron_h", "longcat_flash", "phimoe"])
def test_families_of_other_layouts(family: str, tiered: Callable[..., Any]) -> None:
    """With biases, shared experts, without a gate, with experts that return their input, and unfused."""
    inputs = inputs_for(family, model := build(family))
    with moert.patch(model):
        right = logits(model, inputs)
    modules = dict(experts_modules(model))
    model, tier = tiered(device_memory="50%", host_memory="75%", model=model)
    assert torch.equal(logits(model, inputs), right)
    assert tier.counts.on_device
    moert.unpatch(model)
    assert dict(experts_modules(model)) == modules


def test_loading_from_a_checkpoint(tiny_olmoe: Path) -> None:
    with moert.load(tiny_olmoe) as model:
        right = generate(model)
    config = OffloadConfig(device_memory="50%", host_memory="50%", debug=True)
    device = SimulatedDevice(LINK)
    options = {"costs": COSTS, "headroom_bytes": 0}
    model = loading.load(tiny_olmoe, config, None, device=device, device_options=options)
    same(model, right)
    assert all(isinstance(layer.mlp.experts, TieredExperts) for layer in model.model.layers)
    moert.close(model)
    assert not device.used_bytes
    assert not device.locked_bytes
    with pytest.raises(MoertError, match="closed"):
        generate(model)


def test_unpatching_gives_everything_back(tiered: Callable[..., Any]) -> None:
    for host in ("100%", "30%"):
        model = make()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules = [layer.mlp.experts for layer in model.model.layers]
        model, tier = tiered(device_memory="25%", host_memory=host, model=model)
        generate(model)
        moert.unpatch(model)
        assert [layer.mlp.experts for layer in model.model.layers] == modules
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not tier.device.used_bytes
        assert not tier.device.locked_bytes


def test_host_memory_may_change_under_a_device(tiered: Callable[..., Any], wanted: Any) -> None:
    model, tier = tiered(device_memory="25%", host_memory="50%")
    for host in ("30%", "100%", "40%"):
        same(model, wanted[torch.float32])
        moert.resize(model, host)
        assert tier.pinned.locked_bytes == moert.stats(model).slot_bytes
    same(model, wanted[torch.float32])


def test_without_cuda_the_public_option_says_what_it_always_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device, and there is none here"):
        moert.patch(make(), device_memory="1GiB")


def test_too_little_memory_is_said_with_all_its_parts() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for host in ("100%", "50%"):
        device = SimulatedDevice(Machine(total_bytes=8 << 20))
        device.others_bytes = 2 << 20
        config = OffloadConfig(device_memory="100%", host_memory=host, context=128)
        with pytest.raises(CapacityError, match=r"of 8\.0 MiB there are 6\.0 MiB free, .*192\.0 KiB KV cache.*at most"):
            patching.patch(model, config, device=device, headroom_bytes=0)
        assert device.used_bytes == 0
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CapacityError, match=r"the device has 2\.0 MiB of 2\.0 MiB free, and .* headroom"):
        patching.patch(model, OffloadConfig(), device=SimulatedDevice(Machine(total_bytes=2 << 20)))


class Raced(SimulatedDevice):
    """Somebody takes all of it between the look at what is free and the first allocation."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.others_bytes = self.machine.total_bytes
        return super().allocate(nbytes)


def test_memory_that_somebody_takes_while_it_loads() -> None:
    model = make()
    with pytest.raises(CapacityError, match=r"were free on simulated and are no longer .*; end what else uses it"):
        patching.patch(model, OffloadConfig(device_memory="50%", host_memory="50%"), device=Raced(), headroom_bytes=0)
    assert generate(moert.patch(model))[0].shape == (2, 22)


def test_prompts_that_do_not_fit_are_halved_with_one_warning(tiered: Callable[..., Any], wanted: Any) -> None:
    model, tier = tiered(device_memory="25%")
    # Of 24 tokens at once there is room for the outputs of a few.
    tier.device.others_bytes = tier.device.memory.free_bytes - 5000
    with pytest.warns(RuntimeWarning, match="steps of 24 tokens are computed 12 at a time for now") as found:
        tokens, numbers = generate(model)
    assert len(found) == 1
    assert tier.counts.halved >= 2
    assert tier.hosted.parts.most_tokens is not None and 2 <= tier.hosted.parts.most_tokens <= 6
    assert torch.equal(tokens, wanted[torch.float32][0])
    torch.testing.assert_close(numbers, wanted[torch.float32][1])


def test_memory_taken_in_mid_generation_is_no_end(tiered: Callable[..., Any], wanted: Any) -> None:
    """Not even one token's outputs fit: the CPU goes on alone, and the device comes back when there is room again."""
    model, tier = tiered(device_memory="25%", host_memory="60%")
    same(model, wanted[torch.float32])
    tier.device.others_bytes = tier.device.machine.total_bytes
    with pytest.warns(RuntimeWarning) as found:
        tokens, _ = generate(model)
    assert [str(one.message)[-60:] for one in found].count("uses the device, or give device_memory less") <= 1
    assert len(found) == 2
    assert "the CPU computes them while that is so" in str(found[1].message)
    assert torch.equal(tokens, wanted[torch.float32][0])
    without = tier.counts.without
    assert without
    tier.device.others_bytes = 0
    assert torch.equal(generate(model)[0], wanted[torch.float32][0])
    assert tier.counts.without == without


@pytest.mark.parametrize("virtual", [True, False])
def test_a_device_lost_in_mid_run(virtual: bool, tiered: Callable[..., Any]) -> None:
    device = SimulatedDevice(Machine(latency_s=1e-5), virtual=virtual)
    model, _ = tiered(device_memory="25%", device=device)
    steps = itertools.count()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: device.lose() if next(steps) == 3 else None)
    for _ in range(2):
        with pytest.raises(DeviceLostError, match=r"was lost in mid-run .*; load the model again"):
            generate(model)
    moert.close(model)
    moert.close(model)


def test_what_stays_in_pageable_memory_gives_the_same(tiered: Callable[..., Any], wanted: Any) -> None:
    with pytest.warns(RuntimeWarning, match="can be page-locked here") as found:
        model, _ = tiered(Machine(lockable_bytes=1 << 17), device_memory="25%", host_memory="50%")
    same(model, wanted[torch.float32])
    assert len(found) == 1


def test_a_model_elsewhere_is_told_where_to_go(tiered: Callable[..., Any]) -> None:
    model, _ = tiered(device_memory="50%")
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(MoertError, match="the experts come to cpu, but were called with hidden states on meta"):
        experts(torch.zeros(1, 64, device="meta"), torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4))


def test_halved_prompts_become_whole_again_when_who_took_the_memory_has_left(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_parts, "SETTLED_STEPS", 5)
    model, tier = tiered(device_memory="25%")
    taken = tier.device.memory.free_bytes - 5000
    parts = tier.hosted.parts

    def prompt() -> int | None:
        assert torch.equal(generate(model)[0], wanted[torch.float32][0])
        return parts.most_tokens

    tier.device.others_bytes = taken
    with pytest.warns(RuntimeWarning, match="at a time for now"):
        least = prompt()
    assert least is not None and least <= 6
    tier.device.others_bytes = 0
    found = [prompt() for _ in range(2 * 4)]  # of three layers each; single tokens say nothing
    assert found[-1] is None
    assert found[0] is not None
    tier.device.others_bytes = taken
    halved = tier.counts.halved
    assert prompt() is not None
    assert tier.counts.halved > halved
    tier.device.others_bytes = 0
    assert [prompt() for _ in range(3)] == [parts.most_tokens] * 3, "it was wrong, and waits longer"
