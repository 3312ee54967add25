"""The self-check of a device: it passes where the device computes what the CPU does, and only there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_support
from families import build, experts_modules, inputs_for, logits
from pack_support import make_pack

import moert
from moert.config import OffloadConfig
from moert.device.simulated import SimulatedDevice
from moert.errors import KernelUnavailableError
from moert.hf import loading, patching
from moert.hf.device_tiered import NEW
from moert.hf.homes import move_back, note_homes
from moert.hf.model import runtime_of
from moert.runtime import device_check, device_kernels
from moert.runtime.device_check import tolerance
from moert.runtime.device_kernels import RowByRow
from moert.runtime.device_planned import PlannedPasses
from moert.schedule import Costs, Curve

COSTS = Costs(Curve.proportional(2e-4), Curve.constant(1e-5), move_s=3e-4, read_s=1e-3)
CHECKED = {"check": True, "headroom_bytes": 0, "costs": COSTS}


def checked(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model of the family over a simulated device that has been checked."""
    model = build(family).to(dtype)
    config = OffloadConfig(device_memory="50%", host_memory=options.pop("host_memory", "75%"), debug=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        patching.patch(model, config, device=SimulatedDevice(), **{**CHECKED, **options})
    assert [str(one.message) for one in found] == [NEW]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "longcat_flash", "phimoe"])
def test_what_is_right_passes_and_is_not_counted(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    inputs = inputs_for(family, model)
    with moert.patch(model):
        right = logits(model, inputs)
    model = checked(family, dtype)
    stats, tier = moert.stats(model), runtime_of(model).device
    assert tier is not None
    assert (stats.hits, stats.misses, tier.counts.on_device, tier.counts.on_cpu) == (0, 0, 0, 0)
    assert torch.equal(logits(model, inputs), right)
    assert tier.counts.on_device
    moert.close(model)


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")
@pytest.mark.parametrize("stored_as", ["plain", "int8", "mxfp4"])
def test_the_triton_kernels_pass(
    stored_as: str, tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the CPU's kernels, and against decoded weights where those would round hidden states as well."""
    own, seen = PlannedPasses.run, []
    monkeypatch.setattr(PlannedPasses, "run", lambda *given: seen.append(given[1]) or own(*given))
    folder = tiny_olmoe
    if stored_as != "plain":
        folder = tmp_path / "pack"
        make_pack(tiny_olmoe, folder, stored_as)
    options = {**CHECKED, "triton": True}
    config = OffloadConfig(device_memory="50%", host_memory="75%")
    with pytest.warns(RuntimeWarning, match="the self-check on this one passed"):
        model = loading.load(folder, config, None, device=SimulatedDevice(), device_options=options)
    assert seen, "those of the device alone too, though some experts are on disk"
    moert.close(model)


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")
@pytest.mark.parametrize("share", [1.0, 1.01])
def test_single_tokens_that_are_the_devices_alone(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = PlannedPasses.run, []

    def run(passes: PlannedPasses, layer: int, *given: torch.Tensor) -> torch.Tensor:
        seen.append(layer)
        return own(passes, layer, *given) * share

    monkeypatch.setattr(PlannedPasses, "run", run)
    if share == 1.0:
        model = checked("olmoe", host_memory="100%", triton=True)
        tier = runtime_of(model).device
        assert tier is not None
        tier.check_integrity()
        moert.close(model)
    else:
        with pytest.raises(KernelUnavailableError, match=r"1 tokens of torch\.float32, is off by 0\.01 of its length"):
            checked("olmoe", host_memory="100%", triton=True)
    # With a share for the CPU and without.
    assert seen == ([0, 0] if share == 1.0 else [0])


def swapped(kernels: RowByRow, row: int, own: Any) -> Any:
    """The expert in a row with its gate and its up product taken for each other."""
    views = dict(kernels.bank.views(row))
    fused = kernels.spec.fused
    assert fused is not None
    up = views[fused.layout.up]
    views[fused.layout.up] = torch.cat(up.chunk(2)[::-1]).contiguous()
    return fused.expert(views)


def neighbours(kernels: RowByRow, row: int, own: Any) -> Any:
    """The expert in another row, once in a while."""
    return own(kernels, row - 1 if row % 4 == 3 else row)


@pytest.mark.parametrize("mistake", [swapped, neighbours])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_kernels_are_found_and_the_model_is_as_it_was(
    mistake: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = RowByRow.expert
    model = build("olmoe").to(dtype)
    inputs, modules = inputs_for("olmoe", model), dict(experts_modules(model))
    right = logits(model, inputs)
    with monkeypatch.context() as wrong:
        wrong.setattr(RowByRow, "expert", lambda kernels, row: mistake(kernels, row, own))
        for host in ("100%", "50%"):
            device = SimulatedDevice()
            config = OffloadConfig(device_memory="50%", host_memory=host)
            with pytest.raises(
                KernelUnavailableError, match=r"is off by \d.* and rounding explains .*; leave device_mem"
            ):
                patching.patch(model, config, device=device, **CHECKED)
            assert dict(experts_modules(model)) == modules
            assert not device.used_bytes
            assert torch.equal(logits(model, inputs), right)
    patching.patch(model, OffloadConfig(device_memory="50%"), device=SimulatedDevice())
    moert.unpatch(model)


def test_a_mistake_in_many_tokens_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = device_kernels._RowByRowStep._finish

    def wrong(step: Any) -> torch.Tensor:
        out = own(step)
        return out * 1.01 if len(out) > 16 else out

    monkeypatch.setattr(device_kernels._RowByRowStep, "_finish", wrong)
    with pytest.raises(KernelUnavailableError, match=r"40 tokens of torch\.float32, is off by 0\.01 of its length"):
        checked("olmoe")


def test_a_mistake_in_what_the_cpu_hands_over_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = device_kernels._RowByRowStep._take_in
    monkeypatch.setattr(
        device_kernels._RowByRowStep, "_take_in", lambda step, turns, outputs: own(step, turns, outputs.flip(0))
    )
    with pytest.raises(KernelUnavailableError, match="does not compute what the CPU does"):
        checked("olmoe", host_memory="100%")


def test_kernels_that_do_not_run_are_said_with_their_reason(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(device_kernels._RowByRowStep, "_compute", fails)
    device = SimulatedDevice()
    with pytest.raises(KernelUnavailableError, match=r"RuntimeError: no such instruction\); leave device_memory out"):
        loading.load(tiny_olmoe, OffloadConfig(device_memory="50%"), None, device=device, device_options=CHECKED)
    assert device._closed
    assert not device.locked_bytes


def test_numbers_that_are_none_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device_kernels._RowByRowStep, "_finish", lambda step: torch.full_like(step._inputs.hidden, float("nan"))
    )
    with pytest.raises(KernelUnavailableError, match="is off by nan"):
        checked("olmoe")


def test_the_tolerance_is_what_rounding_explains() -> None:
    """Of products in the dtypes that models have, rounded where kernels round, against fp64."""
    generator = torch.Generator().manual_seed(2)
    width, inner = 512, 256
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        up, down = (torch.randn(shape, generator=generator) for shape in ((inner, width), (width, inner)))
        weights: Mapping[str, torch.Tensor] = {"up": up.to(dtype) / 23, "down": down.to(dtype) / 16}
        hidden = torch.randn(40, width, generator=generator).to(dtype)
        half = torch.nn.functional.silu(hidden.float() @ weights["up"].float().T).to(dtype)
        found = (half.float() @ weights["down"].float().T).to(dtype)
        exact = torch.nn.functional.silu(hidden.double() @ weights["up"].double().T) @ weights["down"].double().T
        apart = float(((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())
        allowed = tolerance(dtype, (device_check.FUSED_ROUNDINGS,), (width, inner))
        assert apart <= allowed <= 8 * apart, dtype


def test_buffers_come_home() -> None:
    model = torch.nn.BatchNorm1d(3)
    homes = {**note_homes(model), "running_mean": torch.device("meta")}
    weight = model.weight
    move_back(model, homes)
    assert model.running_mean is not None
    assert model.running_mean.device.type == "meta"
    assert model.running_var is not None
    assert model.running_var.device.type == "cpu"
    assert model.weight is weight
