"""A simulated device: order, overlap and failure are those of a GPU, on threads and in virtual time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from moert.device.base import (
    Device,
    DeviceLostError,
    Lease,
    OutOfDeviceMemoryError,
    PinningRefusedError,
    SlotAccessError,
)
from moert.device.simulated import Machine, SimulatedDevice
from moert.tiers.read import Priority

MIB = 1 << 20


@pytest.fixture(params=["virtual", "threads"])
def virtual(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "virtual")


@pytest.fixture
def device(virtual: bool) -> Iterator[SimulatedDevice]:
    """One whose copies of a MiB take 10 ms."""
    found = SimulatedDevice(Machine(up_bytes_per_s=100 * MIB, down_bytes_per_s=100 * MIB), virtual=virtual)
    yield found
    found.close()


def pinned(device: Device, nbytes: int = MIB, value: int = 7) -> torch.Tensor:
    memory = device.allocate_pinned(nbytes)
    return memory.fill_(value)


def took(device: Device, begin: float) -> float:
    return device.now() - begin


def test_bytes_arrive_and_take_their_time(device: SimulatedDevice) -> None:
    there, back = device.allocate(MIB), pinned(device, value=0)
    begin = device.now()
    stream = device.copies[Priority.DEMAND]
    stream.copy(there, pinned(device))
    arrived = stream.record()
    assert not arrived.ready
    arrived.wait()
    assert took(device, begin) >= 0.01
    assert bool((there == 7).all())
    device.back.copy(back, there)
    device.back.record().wait()
    assert bool((back == 7).all())
    assert device.up.nbytes == device.down.nbytes == MIB


def test_streams_overlap_and_one_link_carries_one_copy_at_a_time(device: SimulatedDevice, virtual: bool) -> None:
    device.change(launch_s=0.02)
    begin = device.now()
    for priority in (Priority.DEMAND, Priority.PREFETCH):
        device.copies[priority].copy(device.allocate(MIB), pinned(device))
    device.compute.launch(lambda: None)
    device.back.copy(pinned(device), device.allocate(MIB))
    device.synchronize()
    assert took(device, begin) >= 0.02
    assert device.up.busy_s == pytest.approx(0.02)
    if virtual:
        assert took(device, begin) == pytest.approx(0.02)  # up, computing and, half as long, down: all at once


def test_virtual_time_is_exact() -> None:
    device = SimulatedDevice(Machine(up_bytes_per_s=100 * MIB, launch_s=0.004, sync_s=0.001), virtual=True)
    demand, promotion = device.copies[Priority.DEMAND], device.copies[Priority.PROMOTION]
    promotion.copy(device.allocate(MIB), pinned(device))
    device.sleep(0.002)
    for _ in range(2):
        promotion.copy(device.allocate(MIB), pinned(device))
    demand.copy(device.allocate(MIB), pinned(device))
    event = demand.record()
    event.wait()
    # The promotion that had begun, then the demand before the two that had not; and the wait itself.
    assert device.now() == pytest.approx(0.021)
    device.compute.wait(event)
    device.compute.launch(lambda: None)
    device.compute.record().wait()
    assert device.now() == pytest.approx(0.021 + 0.005)
    device.synchronize()
    assert device.now() == pytest.approx(0.04)


def filled(device: SimulatedDevice, lease: Lease, row: torch.Tensor, source: torch.Tensor) -> None:
    device.copies[Priority.DEMAND].copy(row, source, writes=lease)


def test_a_launch_behind_its_event_reads_whole_slots(device: SimulatedDevice) -> None:
    row, lease, seen = device.allocate(MIB), Lease(0, 3, 1), []
    filled(device, lease, row, pinned(device))
    device.compute.wait(device.copies[Priority.DEMAND].record())
    device.compute.launch(lambda: seen.append(bool((row == 7).all())), [lease])
    device.synchronize()
    assert seen == [True]
    assert device.ledger.reads == 1


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_launch_that_does_not_wait_is_caught(device: SimulatedDevice, when: str) -> None:
    row, source = device.allocate(MIB), pinned(device)
    lease = Lease(0, 3, 1)
    if when == "before":
        device.compute.launch(lambda: None, [lease])
        filled(device, lease, row, source)
    else:
        filled(device, lease, row, source)
        if when == "after":
            device.synchronize()
            filled(device, Lease(0, 3, 2), row, source)
        _pass(device, 0.005)
        device.compute.launch(lambda: None, [lease])
    with pytest.raises(SlotAccessError, match="is read"):
        device.synchronize()
    with pytest.raises(SlotAccessError):  # it stays so
        device.allocate(1)


def test_a_slot_that_is_read_is_not_to_be_overwritten(device: SimulatedDevice) -> None:
    row, source, lease = device.allocate(MIB), pinned(device), Lease(0, 3, 1)
    filled(device, lease, row, source)
    device.synchronize()
    device.change(launch_s=0.05)
    device.compute.launch(lambda: None, [lease])
    _pass(device, 0.01)
    filled(device, Lease(0, 3, 2), row, source)
    with pytest.raises(SlotAccessError, match="is written while 1 launches read"):
        device.synchronize()


def _pass(device: SimulatedDevice, seconds: float) -> None:
    """Let the streams begin what they have."""
    device.sleep(seconds)


def test_a_slot_in_parts_is_whole_with_the_last_one(device: SimulatedDevice) -> None:
    row, source, lease = device.allocate(MIB), pinned(device), Lease(1, 0, 1)
    stream = device.copies[Priority.PROMOTION]
    half = MIB // 2
    stream.copy(row[:half], source[:half], writes=lease, is_last=False)
    device.synchronize()
    assert not device.ledger.is_ready(lease)
    stream.copy(row[half:], source[half:], writes=lease)
    device.synchronize()
    assert device.ledger.is_ready(lease)
    stream.fill(row, 0xFF, writes=Lease(1, 0, 2))
    device.synchronize()
    assert not device.ledger.is_ready(lease)
    assert bool((row == 0xFF).all())


def test_memory_is_counted_and_given_back(device: SimulatedDevice) -> None:
    device.change(total_bytes=4 * MIB)
    kept = device.allocate(3 * MIB)
    with pytest.raises(OutOfDeviceMemoryError, match=r"2\.0 MiB on the device 'simulated' cannot be had: 1\.0 MiB of"):
        device.allocate(2 * MIB)
    device.others_bytes = MIB
    assert device.memory.free_bytes == 0
    del kept
    assert device.memory == (3 * MIB, 4 * MIB)


def test_page_locking_has_a_limit_and_copies_ask_for_it(device: SimulatedDevice) -> None:
    device.change(lockable_bytes=MIB)
    source = pinned(device)
    with pytest.raises(PinningRefusedError, match=r"cannot be page-locked: 1\.0 MiB of 1\.0 MiB"):
        device.allocate_pinned(1)
    there = device.allocate(MIB)
    with pytest.raises(AssertionError, match="not page-locked"):
        device.copies[Priority.DEMAND].copy(there, torch.zeros(MIB, dtype=torch.uint8))
    device.copies[Priority.DEMAND].copy(there, torch.zeros(MIB, dtype=torch.uint8), pageable=True)
    device.copies[Priority.DEMAND].copy(there, source)
    device.synchronize()
    del source
    assert device.locked_bytes == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_work_is_done_in_the_mode_of_who_asked_for_it(device: SimulatedDevice, mode: type) -> None:
    seen = []
    with mode():
        asked = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        # Such a tensor of inference mode may be written to in that mode only.
        there = torch.zeros(4, dtype=torch.uint8)
        device.compute.launch(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled())))
        device.back.copy(there, pinned(device, 4), pageable=True)
    device.synchronize()
    assert seen == [asked]
    assert there.tolist() == [7] * 4


def test_an_error_in_a_launch_is_raised_by_who_waits(device: SimulatedDevice) -> None:
    def wrong() -> None:
        raise ZeroDivisionError("a kernel went wrong")

    device.compute.launch(wrong)
    with pytest.raises(ZeroDivisionError, match="a kernel went wrong"):
        device.compute.record().wait()


def test_a_lost_device_ends_every_wait(device: SimulatedDevice) -> None:
    stream = device.copies[Priority.DEMAND]
    device.change(latency_s=3600.0)
    stream.copy(device.allocate(1), pinned(device, 1))
    event = stream.record()
    begin = time.perf_counter()
    device.lose("ECC error")
    assert device.is_lost
    for call in (event.wait, lambda: event.ready, device.synchronize, lambda: device.allocate(1), stream.record):
        with pytest.raises(DeviceLostError, match="ECC error"):
            call()
    device.close()
    assert time.perf_counter() - begin < 60


def test_closing_does_what_is_queued_first(device: SimulatedDevice) -> None:
    there = device.allocate(MIB)
    device.copies[Priority.DEMAND].copy(there, pinned(device))
    device.close()
    device.close()
    assert bool((there == 7).all())


def test_waiting_for_what_nobody_does_is_no_hang_in_virtual_time() -> None:
    device = SimulatedDevice(virtual=True)
    other = SimulatedDevice(virtual=True)
    device.compute.wait(other.compute.record())
    with pytest.raises(AssertionError, match="waits for work that waits for itself"):
        device.compute.record().wait()
