"""A model whose single tokens a simulated device runs by itself, small enough for Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moert.config import OffloadConfig
from moert.device.base import OutOfDeviceMemoryError
from moert.device.simulated import Machine, SimulatedDevice
from moert.hf import patching
from moert.hf.model import runtime_of
from moert.kernels import device_experts as device_experts_module
from moert.runtime.device_tier import DeviceTier
from moert.schedule import Costs, Curve

ON_DEVICE = Costs(Curve.constant(1.0), Curve.constant(1e-6), move_s=1e-6)
"""So that the schedulers leave the CPU nothing to do, and a token's bits are the same whoever decides."""

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def make(**changes: Any) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return OlmoeForCausalLM(OlmoeConfig(**{**config, **changes})).eval()


def settings(**options: Any) -> tuple[OffloadConfig, SimulatedDevice, dict[str, Any]]:
    """What `patch` and `load` take; `planned=True` unless said otherwise, and half of the experts on the device."""
    names = OffloadConfig.option_names()
    config = {"debug": True, "device_memory": "50%", "dense_kernels": False}
    config |= {name: value for name, value in options.items() if name in names}
    device = SimulatedDevice(options.pop("machine", Machine(latency_s=1e-5)), virtual=True)
    rest = {
        "triton": True,
        "planned": True,
        "headroom_bytes": 0,
        "guarded": False,
        "costs": ON_DEVICE,
        "promoting": False,
        **{name: value for name, value in options.items() if name not in names},
    }
    return OffloadConfig(**config), device, rest


def patched(model: Any = None, **options: Any) -> tuple[Any, DeviceTier]:
    """A model over a simulated device; see `settings`."""
    model = model or make()
    config, device, rest = settings(**options)
    patching.patch(model, config, device=device, **rest)
    return model, tier_of(model)


def tier_of(model: Any) -> DeviceTier:
    tier = runtime_of(model).device
    assert tier is not None
    return tier


def generate(model: Any, n: int = 6, prompt: int = 5, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits that they were chosen by."""
    ids = torch.randint(3, 60, (1, prompt), generator=torch.Generator().manual_seed(1))
    found = model.generate(
        ids, max_new_tokens=n, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return found.sequences, torch.stack(found.logits)


def check_rows(tier: DeviceTier) -> None:
    """Whoever the books call resident has its own bytes in its row."""
    tier.check_integrity()
    for cache in tier.caches:
        assert len(cache.residency.residents) <= cache.residency.capacity
        for expert in filter(cache.host.has, cache.residency.residents):
            there = cache.bank.views(cache.row_of(expert))
            for name, tensor in cache.host.weights(expert).items():
                assert torch.equal(there[name], tensor), f"{expert} {name}"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def third_step_finds_no_memory(tier: DeviceTier, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The third step that the device is to compute raises when its planner has run and nothing has been computed.

    Returns:
        As many numbers as there have been steps.
    """
    experts = device_experts_module.device_experts
    calls: list[int] = []

    def fails_once(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise OutOfDeviceMemoryError("no memory")
        return experts(*args, **kwargs)

    monkeypatch.setattr(device_experts_module, "device_experts", fails_once)
    monkeypatch.setattr(tier.device, "_engine", _Immediate(tier.device._engine))
    return calls


class _Immediate:
    """Launches happen at once, and what they raise is raised where they were asked for, as an allocation's is."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def submit(self, work: Any) -> None:
        action, failure = work.action, []

        def run() -> None:
            try:
                action()
            except OutOfDeviceMemoryError as error:
                failure.append(error)

        work.action = run
        self._engine.submit(work)
        self._engine.drain()
        if failure:
            raise failure[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
