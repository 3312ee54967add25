"""Interrupts (Ctrl-C) at whatever line while copies are on their way to a device, and a disk that fails under it."""

from __future__ import annotations

import functools
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from fault_support import LAYERS, ROUTING, E, Experts, check_books, right, step
from faulty_disk import PATIENCE_S, Fault, FaultyDisk
from test_faults_interrupt import Interrupter

from moert.config import parse_budget
from moert.device.simulated import Machine, SimulatedDevice
from moert.device.work import Done
from moert.errors import MoertError
from moert.runtime.device_building import attach_device
from moert.runtime.device_tier import DeviceTier
from moert.runtime.runtime import OffloadRuntime
from moert.schedule import Costs, Curve
from moert.types import ExpertId

pytestmark = pytest.mark.timeout(200)

UNTIL_TOLD_S = 3600.0
COSTS = Costs(Curve.proportional(2e-4), Curve.constant(1e-5), move_s=3e-4, read_s=1e-3)


def attached(runtime: OffloadRuntime, *, virtual: bool = True, **options: object) -> DeviceTier:
    """A device with room for a third of each layer's experts, whose copies take their time."""
    machine = Machine(latency_s=5e-4, launch_s=1e-4)
    settings = {"headroom_bytes": 0, "costs": COSTS, "guarded": False, **options}
    device = SimulatedDevice(machine, virtual=virtual)
    return attach_device(runtime, device, budget=parse_budget("34%", ""), **settings)  # type: ignore[arg-type]


def check(runtime: OffloadRuntime, tier: DeviceTier, experts: Experts) -> None:
    """The books agree, and what is called ready is what it is called."""
    tier.check_integrity()
    ledger = tier.device.ledger  # type: ignore[attr-defined]
    for cache in tier.caches:
        for expert in cache.residency.residents:
            row = cache.row_of(expert)
            if ledger.is_ready(cache.bank.lease(row)):
                for name, tensor in cache.bank.views(row).items():
                    assert torch.equal(tensor, experts.weights[expert.layer][expert.expert][name]), expert
    check_books(runtime, experts)


@pytest.mark.parametrize("virtual", [True, False], ids=["virtual", "threads"])
@pytest.mark.parametrize("what", ["step", "prefetch", "resize"])
def test_an_interrupt_at_any_line_loses_no_more_than_time(what: str, virtual: bool, tmp_path: Path) -> None:
    experts, disk = Experts(tmp_path), FaultyDisk()
    want = {layer: right(experts, layer) for layer in LAYERS}
    sizes = [parse_budget(size, "") for size in ("50%", "100%", "67%")]
    uses: dict[str, Callable[[OffloadRuntime, int], object]] = {
        "step": lambda runtime, turn: step(runtime, turn % 4, [[turn % E, (turn + 1) % E], [5, 2]]),
        "prefetch": lambda runtime, turn: runtime.prefetch([ExpertId(turn % 4, e) for e in (turn % E, (turn + 3) % E)]),
        "resize": lambda runtime, turn: runtime.resize(sizes[turn % 3]),
    }
    with experts.runtime(disk, host_memory="50%") as runtime:
        tier = attached(runtime, virtual=virtual)
        line = turn = uninterrupted = 0
        while uninterrupted < 4:
            line += 17 if what == "step" else 7
            turn += 1
            # Something is on its way already.
            runtime.prefetch([ExpertId(layer, (turn + 2) % E) for layer in LAYERS])
            uninterrupted += Interrupter(line).run(functools.partial(uses[what], runtime, turn))
            layer = turn % 4
            assert torch.equal(step(runtime, layer, ROUTING), want[layer]), f"interrupted at line {line}"
            check(runtime, tier, experts)
        assert turn > 10
        for layer in LAYERS:
            assert torch.equal(step(runtime, layer, ROUTING), want[layer])
        check(runtime, tier, experts)
    assert not tier.device.locked_bytes  # type: ignore[attr-defined]


def test_a_signal_while_a_step_waits_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy goes on; the next step waits for it before anything else is put where it reads or writes."""
    experts = Experts(tmp_path)
    waiting, raised, go_on = threading.Event(), threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with experts.runtime(host_memory="50%", preload=True) as runtime:
            tier = attached(runtime, virtual=False, schedule="fetch_all", promoting=False)
            device = tier.device
            assert isinstance(device, SimulatedDevice)
            sleep, wait_for = device._engine.sleep, device.wait_for

            def copying(seconds: float) -> None:
                if seconds < UNTIL_TOLD_S:
                    sleep(seconds)
                    return
                assert waiting.wait(PATIENCE_S)
                # One that comes just before the thread falls asleep does not wake it.
                while not raised.wait(0.01):
                    os.kill(os.getpid(), signal.SIGUSR1)
                assert go_on.wait(PATIENCE_S)

            def waited_for(done: Done) -> None:
                waiting.set()
                wait_for(done)

            monkeypatch.setattr(device._engine, "sleep", copying)
            monkeypatch.setattr(device, "wait_for", waited_for)
            for layer in LAYERS:
                for event in (waiting, raised, go_on):
                    event.clear()
                device.change(latency_s=UNTIL_TOLD_S)
                with pytest.raises(KeyboardInterrupt):
                    step(runtime, layer, ROUTING)
                device.change(latency_s=0.0)
                timer = threading.Timer(0.05, go_on.set)
                timer.start()
                assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
                timer.join()
                device.synchronize()
                check(runtime, tier, experts)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_closing_in_the_middle_of_copies(tmp_path: Path) -> None:
    experts = Experts(tmp_path)
    runtime = experts.runtime(host_memory="100%", preload=True)
    tier = attached(runtime, virtual=False)
    assert isinstance(tier.device, SimulatedDevice)
    tier.device.change(latency_s=0.05)
    runtime.prefetch([ExpertId(layer, 5) for layer in LAYERS])
    assert tier.transfers.copying
    runtime.close()
    runtime.close()
    assert not tier.device.used_bytes
    with pytest.raises(MoertError, match="closed"):
        step(runtime, 0, ROUTING)


def test_memory_pressure_takes_slots_from_under_a_device(tmp_path: Path) -> None:
    """Pages are unlocked before they are given back, and what is left is locked again."""
    experts = Experts(tmp_path)
    with experts.runtime(host_memory="100%", preload=True) as runtime:
        tier = attached(runtime)
        for size in ("40%", "80%", "34%"):
            runtime.prefetch([ExpertId(layer, 5) for layer in LAYERS])
            runtime.resize(parse_budget(size, ""))
            assert tier.pinned.locked_bytes == sum(nbytes for _, nbytes in runtime.slot_ranges())
            for layer in LAYERS:
                assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
            check(runtime, tier, experts)


def test_a_disk_that_fails_fails_the_step_and_no_more(tmp_path: Path) -> None:
    experts, disk = Experts(tmp_path), FaultyDisk()
    with experts.runtime(disk, host_memory="34%", preload=False) as runtime, warnings.catch_warnings():
        tier = attached(runtime)
        disk.add(Fault(code=5))
        failures = 0
        for layer in LAYERS:
            try:
                step(runtime, layer, ROUTING)
            except MoertError:
                failures += 1
            check(runtime, tier, experts)
        assert failures
        disk.mend()
        for layer in LAYERS:
            assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
            check(runtime, tier, experts)
