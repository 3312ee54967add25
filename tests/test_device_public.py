"""`device_memory` as users give it, over simulated devices in the place of the machine's GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Cli, checkpoint
from families import experts_modules, logits
from transformers import OlmoeForCausalLM

import moert
from moert.device.simulated import Machine, SimulatedDevice
from moert.errors import CapacityError, ConfigError, KernelUnavailableError
from moert.hf.device_tiered import TieredExperts
from moert.hf.model import offloaded_modules, runtime_of
from moert.runtime import device_opening

PROMPT = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(1))


class Gpus:
    """Those of a machine that has some."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.opened: list[SimulatedDevice] = []

    def open(self, wanted: Any) -> list[SimulatedDevice]:
        self.opened.append(SimulatedDevice(self.machine, name=f"simulated {len(self.opened)}"))
        return self.opened[-1:]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    found = Gpus(Machine(latency_s=1e-5))
    monkeypatch.setattr(device_opening, "check_machine", lambda config: None)
    monkeypatch.setattr(device_opening, "open_devices", found.open)
    return found


def tokens(model: Any) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.fixture
def wanted(tiny_olmoe: Path) -> list[int]:
    with moert.load(tiny_olmoe) as model:
        return tokens(model)


def load(path: Path, **options: Any) -> Any:
    return moert.load(path, **options)


def load_with_transformers(path: Path, **options: Any) -> Any:
    return OlmoeForCausalLM.from_pretrained(path, quantization_config=moert.OffloadConfig(**options))


def patch(path: Path, **options: Any) -> Any:
    return moert.patch(OlmoeForCausalLM.from_pretrained(path), **options)


@pytest.mark.parametrize("way", [load, load_with_transformers, patch])
@pytest.mark.parametrize("size", ["50%", "auto", 1 << 20])
def test_tokens_are_those_of_the_cpu(
    way: Callable[..., Any], size: int | str, gpus: Gpus, tiny_olmoe: Path, wanted: list[int]
) -> None:
    with way(tiny_olmoe, device_memory=size, host_memory="75%") as model:
        assert tokens(model) == wanted
        tier = runtime_of(model).device
        assert tier is not None
        assert tier.counts.on_device + tier.counts.on_cpu
        assert {type(module) for module in offloaded_modules(model).values()} == {TieredExperts}
        assert moert.stats(model).hit_rate
    assert len(gpus.opened) == 1
    assert gpus.opened[0].used_bytes == gpus.opened[0].locked_bytes == 0


def test_a_model_that_asks_for_no_device_opens_none(gpus: Gpus, tiny_olmoe: Path, wanted: list[int]) -> None:
    for way in (load, load_with_transformers, patch):
        with way(tiny_olmoe, host_memory="75%") as model:
            assert tokens(model) == wanted
    assert not gpus.opened


def test_the_command_line_asks_for_it_too(gpus: Gpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = Cli(capfd)
    plain, tiered = (
        cli("run", checkpoint(tmp_path), "a text", "--max-new-tokens", 4, "--json", *more)
        for more in ([], ["--device-memory", "50%"])
    )
    assert (plain.code, tiered.code) == (0, 0)
    assert plain.document["token_ids"] == tiered.document["token_ids"]
    assert len(gpus.opened) == 1
    more = ["--device-memory", "50%", "--max-new-tokens", 4, "--reference", "resident"]
    ran = cli("verify", checkpoint(tmp_path), *more)
    assert ran.code == 0
    assert len(gpus.opened) == 3


@pytest.mark.parametrize("way", [load, patch])
@pytest.mark.parametrize("context", [16, 64])
def test_the_kv_cache_has_room_on_the_device(
    context: int, way: Callable[..., Any], gpus: Gpus, tiny_olmoe: Path
) -> None:
    gpus.machine = Machine(total_bytes=4 << 20)
    # fp32 keys and values of 2 layers of 64 numbers.
    size = f"{context * 2 * 2 * 64 * 4 / 1024:.1f} KiB KV cache"
    with pytest.raises(CapacityError, match=rf"\({size}, .* ask for a shorter context"):
        way(tiny_olmoe, device_memory="auto", context=context)


@pytest.mark.parametrize("host", ["50%", None])
@pytest.mark.parametrize(
    ("total_bytes", "size", "message"),
    [
        (1 << 20, "auto", r"the device has 1\.0 MiB of 1\.0 MiB free, and 259\.\d MiB are needed \("),
        ((259 << 20) + (1 << 17), "100%", r"device_memory=1 of the expert bytes takes .* give device_memory at most"),
        (1 << 30, 100, "device_memory is 100 B .* one token"),
    ],
)
def test_budgets_that_cannot_be_leave_the_model_as_it_is(
    total_bytes: int, size: int | str, message: str, host: str | None, gpus: Gpus, tiny_olmoe: Path
) -> None:
    gpus.machine = Machine(total_bytes=total_bytes)
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    inputs, modules = {"input_ids": PROMPT}, dict(experts_modules(model))
    right = logits(model, inputs)
    with pytest.raises(CapacityError, match=message):
        moert.patch(model, device_memory=size, host_memory=host)
    assert dict(experts_modules(model)) == modules
    assert torch.equal(logits(model, inputs), right)
    with pytest.raises(CapacityError, match=message):
        moert.load(tiny_olmoe, device_memory=size, host_memory=host)
    assert not any(device.used_bytes or device.locked_bytes for device in gpus.opened)


@pytest.mark.parametrize("way", [load, load_with_transformers, patch])
def test_without_a_gpu_it_says_so_before_anything_is_loaded(
    way: Callable[..., Any], tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore of it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", none)
    with pytest.raises(
        ConfigError,
        match=r"device_memory='auto' needs a CUDA device, and there is none here \(Found no NVIDIA driver on your "
        r"system\.\); install or update",
    ):
        way(tiny_olmoe, device_memory="auto")


@pytest.mark.parametrize("way", [load, load_with_transformers, patch])
def test_a_gpu_that_is_too_old_is_refused(
    way: Callable[..., Any], gpus: Gpus, tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(wanted: Any) -> None:
        raise KernelUnavailableError("it is of compute capability 7.5")

    monkeypatch.setattr(device_opening, "open_devices", refuse)
    with pytest.raises(KernelUnavailableError, match=r"7\.5"):
        way(tiny_olmoe, device_memory="auto")


def test_unpatching_restores_and_may_be_done_again(gpus: Gpus, tiny_olmoe: Path, wanted: list[int]) -> None:
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    modules = dict(experts_modules(model))
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    for _ in range(2):
        moert.patch(model, device_memory="50%", host_memory="50%")
        assert tokens(model) == wanted
        moert.unpatch(model)
        assert dict(experts_modules(model)) == modules
        for name, parameter in model.named_parameters():
            assert parameter is before[name][0]
            assert torch.equal(parameter, before[name][1])
    loaded = moert.load(tiny_olmoe, device_memory="50%")
    assert tokens(moert.unpatch(loaded)) == wanted
