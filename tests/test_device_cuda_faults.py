"""What may go wrong with a GPU, over a fake of `torch.cuda` or a simulated device, from where users meet it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, experts_modules, inputs_for, logits
from test_device_cuda import GIB, FakeCuda, fake_device
from test_device_group import machines
from test_faults_interrupt import Interrupter

import moert
from moert.config import OffloadConfig
from moert.device.base import DeviceLostError
from moert.device.simulated import Machine, SimulatedDevice
from moert.errors import CapacityError
from moert.hf import device_tiered, patching
from moert.hf.model import offloaded_modules, runtime_of
from moert.runtime import device_kernels, device_opening

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory"


@pytest.fixture
def model() -> Any:
    return build("olmoe")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeCuda], FakeCuda]:
    """`gpu(FakeCuda(...))`: what `device_memory` finds here."""

    def install(cuda: FakeCuda) -> FakeCuda:
        monkeypatch.setattr(device_opening, "check_machine", lambda config: None)
        monkeypatch.setattr(device_opening, "open_devices", lambda wanted: [fake_device(cuda)])
        return cuda

    return install


def test_memory_that_others_have_at_load(
    gpu: Callable[[FakeCuda], FakeCuda], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = gpu(FakeCuda())
    modules, inputs = dict(experts_modules(model)), inputs_for("olmoe", model)
    right = logits(model, inputs)
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (100 << 20, 16 * GIB))
    monkeypatch.setattr(cuda, "memory_reserved", lambda index: 1 * GIB)
    for host in ("100%", "50%"):
        with pytest.raises(CapacityError, match=r"has 100\.0 MiB of 16\.0 GiB free, and 2\d\d\.\d MiB are needed"):
            moert.patch(model, device_memory="auto", host_memory=host)
        assert dict(experts_modules(model)) == modules
        assert torch.equal(logits(model, inputs), right)
        assert not cuda.runtime.locked


def test_memory_that_others_take_before_the_dense_weights_come(
    gpu: Callable[[FakeCuda], FakeCuda], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    cuda = gpu(FakeCuda())
    modules = dict(experts_modules(model))
    monkeypatch.setattr(device_tiered, "dense_tensors", lambda model: {"x": torch.empty(1 << 20, device="meta")})
    monkeypatch.setattr(device_tiered, "move", full)
    with pytest.raises(
        CapacityError, match=r"room for 4\.0 MiB of dense weights .* and is no longer \(CUDA out of mem"
    ):
        moert.patch(model, device_memory="auto")
    assert dict(experts_modules(model)) == modules
    assert not cuda.runtime.locked


def test_kernels_that_find_no_memory_for_a_prompt_get_parts_of_it(
    gpu: Callable[[FakeCuda], FakeCuda], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, when some of its experts are on their way already."""
    own = device_kernels._RowByRowStep._compute

    def compute(step: Any, rows: Any) -> None:
        if len(step._inputs.hidden) > 6:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        own(step, rows)

    inputs = inputs_for("olmoe", model)
    assert inputs["input_ids"].numel() > 12
    with moert.patch(model):
        right = logits(model, inputs)
    gpu(FakeCuda())
    moert.patch(model, device_memory="50%", host_memory="75%", debug=True)
    tier = runtime_of(model).device
    assert tier is not None
    monkeypatch.setattr(device_kernels._RowByRowStep, "_compute", compute)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(logits(model, inputs), right, rtol=1e-4, atol=2e-5)
    (warning,) = found
    assert "a fake (0) is out of memory: CUDA out of memory. Tried" in str(warning.message)
    assert "at a time for now" in str(warning.message)
    assert tier.counts.halved
    assert tier.counts.on_device
    assert not tier.counts.without
    moert.unpatch(model)


def test_memory_that_others_take_in_mid_generation(
    gpu: Callable[[FakeCuda], FakeCuda], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one token finds any: the CPU goes on, and the GPU again when there is some."""
    own = device_kernels._RowByRowStep._compute
    taken = [False]

    def compute(step: Any, rows: Any) -> None:
        if taken[0]:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        own(step, rows)

    inputs = inputs_for("olmoe", model)
    with moert.patch(model):
        right = logits(model, inputs)
    gpu(FakeCuda())
    moert.patch(model, device_memory="50%", host_memory="75%", debug=True)
    tier = runtime_of(model).device
    assert tier is not None
    monkeypatch.setattr(device_kernels._RowByRowStep, "_compute", compute)
    for taken[0] in (False, True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            torch.testing.assert_close(logits(model, inputs), right, rtol=1e-4, atol=2e-5)
        assert bool(tier.counts.without) == bool(tier.counts.halved)
    assert tier.counts.without
    moert.unpatch(model)


def test_a_gpu_that_is_lost_in_mid_run(gpu: Callable[[FakeCuda], FakeCuda], model: Any) -> None:
    cuda = gpu(FakeCuda())
    moert.patch(model, device_memory="50%", host_memory="75%")
    inputs = inputs_for("olmoe", model)
    logits(model, inputs)

    def lose(*_: object) -> None:
        cuda.error = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")

    list(offloaded_modules(model).values())[-1].register_forward_pre_hook(lose)
    for _ in range(2):
        with pytest.raises(
            DeviceLostError, match=r"a fake \(0\) was lost in mid-run \(CUDA error: unspecified launch f"
        ):
            logits(model, inputs)
    moert.close(model)
    assert not cuda.runtime.locked


def test_page_locking_that_is_refused_is_said_once(gpu: Callable[[FakeCuda], FakeCuda], model: Any) -> None:
    cuda = gpu(FakeCuda(lockable_bytes=0))
    inputs = inputs_for("olmoe", model)
    with moert.patch(model):
        right = logits(model, inputs)
    with pytest.warns(RuntimeWarning, match="of experts in host memory can be page-locked here") as found:
        moert.patch(model, device_memory="50%", host_memory="75%")
    assert len(found) == 1
    assert torch.equal(logits(model, inputs), right)
    assert not cuda.runtime.locked
    moert.unpatch(model)


@pytest.mark.parametrize("n", [1, 2], ids=["one device", "two"])
def test_ctrl_c_in_generate_with_copies_in_flight(n: int, model: Any) -> None:
    """Wherever it comes; the next call waits for what is under way, and its tokens are right."""
    inputs = inputs_for("olmoe", model)
    with moert.patch(model):
        right = logits(model, inputs)
    devices: list[SimulatedDevice] = machines(n, *(Machine(latency_s=1e-3),) * n)
    options: dict[str, Any] = {"headroom_bytes": 0, "guarded": False, "schedule": "fetch_all"}
    if n > 1:
        paths = list(dict(experts_modules(model)))
        options["device_map"] = {"": 0, paths[-1]: 1}
    config = OffloadConfig(device_memory="50%", host_memory="75%", debug=True)
    patching.patch(model, config, device=devices[0] if n == 1 else devices, **options)
    interrupted = in_flight = 0
    for line in itertools.count(100, 700):
        if Interrupter(line).run(lambda: logits(model, inputs)):
            break
        interrupted += 1
        tier = runtime_of(model).device
        assert tier is not None
        tiers = getattr(tier, "tiers", (tier,))
        in_flight += any(one.transfers.copying for one in tiers)
        assert torch.equal(logits(model, inputs), right), f"interrupted at line {line}"
        for one in tiers:
            one.check_integrity()
    assert interrupted > 3
    assert in_flight
    moert.unpatch(model)
    assert not any(device.used_bytes for device in devices)
