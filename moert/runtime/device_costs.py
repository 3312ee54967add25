"""What an expert costs on the device, the link and the CPU of this machine, for the scheduler to begin with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from moert.device.base import Device, Event, OutOfDeviceMemoryError
from moert.runtime.compute import Compute, ExpertCompute
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import Inputs, LayerKernels
from moert.runtime.device_pinning import PinnedHost
from moert.schedule import Costs, Curve
from moert.tiers.read import Priority
from moert.types import ExpertId

REPEATS = 5
TOKENS = (1, 8)
"""How many tokens an expert is timed with; in between and beyond it is taken to go on as a straight line."""

CALLS = 4
"""How often an expert is to be computed while copies go on beside it..."""

MOST_COPIES, SAMPLES = 32, 3
"""...of which there are no more than that, so many times."""

DISK_BYTES_PER_S = 2e9
"""Assumed of a disk; what is on it is read whoever computes it, so it decides little."""


class Contention(NamedTuple):
    """How many times as long something takes while the other is at work; both read host memory."""

    move: float = 1.0
    """Copying an expert while the CPU computes."""
    cpu: float = 1.0
    """The CPU's work on an expert while others are copied."""


class Measured(NamedTuple):
    """What an expert costs here."""

    costs: Costs
    """With the link and the CPU at work side by side, as a scheduler has them."""
    contention: Contention


def measure_costs(
    device: Device,
    cache: DeviceCache,
    kernels: LayerKernels,
    on_cpu: ExpertCompute,
    pinned: PinnedHost,
    compute: Compute,
    width: int,
    dtype: torch.dtype,
) -> Measured | None:
    """Time one expert of a layer that is in host memory: copied, computed on both sides, and copied while the CPU
    computes. Blocks for some milliseconds; leaves nothing behind. Hidden states are [T, `width`] in `dtype`.

    Returns:
        None if none of the layer's experts is in host memory now, or the device has no row or no memory to try one in.

    Raises:
        DeviceLostError: the device is gone.
    """
    spec, bank = cache.spec, cache.bank
    all_experts = (ExpertId(spec.index, expert) for expert in range(spec.num_experts))
    expert = next((expert for expert in all_experts if cache.host.has(expert)), None)
    row = bank.take() if expert is not None else None
    if expert is None or row is None:
        return None
    try:
        stream = device.copies[Priority.DEMAND]

        def start() -> Event:
            weights, buffer = pinned.source(cache.host.weights(expert), bank.specs, bank.row_bytes)
            event = bank.fill(row, stream, weights, pageable=buffer is not None and not buffer.is_pinned)
            if buffer is not None:
                buffer.until = event
            return event

        move_s = _median(device, lambda: start().wait())
        on_device, cpu = [], []
        for tokens in TOKENS:
            hidden = torch.zeros(tokens, width, dtype=dtype)
            ids = torch.full((tokens, 1), expert.expert)
            weights = torch.ones(tokens, 1)
            there = [tensor.to(device.torch_device) for tensor in (hidden, ids, weights)]
            inputs = Inputs(there[0], there[1], there[2], ids, weights, spec, compute)

            def run(inputs: Inputs = inputs) -> None:
                step = kernels.open(inputs, whole=True)
                bank.read([row], device.compute, step.compute({0: row}))
                device.compute.launch(step.finish())
                device.compute.record().wait()

            def run_here(inputs: Inputs = inputs, hidden: torch.Tensor = hidden) -> None:
                on_cpu.outputs(inputs.groups, hidden)

            on_device.append(_median(device, run))
            cpu.append(_median(device, run_here))
            if tokens == TOKENS[0]:
                contention = _contention(device, start, run_here, move_s, cpu[0])
    except (OutOfDeviceMemoryError, torch.OutOfMemoryError):
        return None  # fewer tokens may fit
    finally:
        bank.give_back(row)
    read_s = spec.expert_bytes / DISK_BYTES_PER_S
    beside = [seconds * contention.cpu for seconds in cpu]
    costs = Costs(_curve(beside), _curve(on_device), move_s=move_s * contention.move, read_s=read_s)
    return Measured(costs, contention)


def _contention(
    device: Device, start: Callable[[], Event], run_here: Callable[[], None], move_s: float, cpu_s: float
) -> Contention:
    """`start` starts one copy, `run_here` has the CPU compute; each takes so long alone."""
    copies = min(MOST_COPIES, math.ceil(CALLS * cpu_s / move_s) + 1) if move_s > 0 else 1

    def times(beside: Callable[[Event], None]) -> float:
        begin = device.now()
        for _ in range(copies - 1):
            start()
        beside(last := start())
        last.wait()
        return device.now() - begin

    calls: list[float] = []

    def compute(until: Event) -> None:
        # The one under way when the copies are over does not count.
        for _ in range(MOST_COPIES):
            begin = device.now()
            run_here()
            if until.ready:
                return
            calls.append(device.now() - begin)

    alone_s = statistics.median(times(lambda event: None) for _ in range(SAMPLES))
    both_s = statistics.median(times(compute) for _ in range(SAMPLES))
    if not calls or alone_s <= 0 or cpu_s <= 0:
        return Contention()
    # It is noticed that they are over when a call is, half of one later in the mean.
    both_s -= statistics.median(calls) / 2
    return Contention(max(1.0, both_s / alone_s), max(1.0, statistics.median(calls) / cpu_s))


def _curve(seconds: list[float]) -> Curve:
    return Curve(TOKENS, (seconds[0], max(seconds)))


def _median(device: Device, action: Callable[[], None]) -> float:
    action()  # what is compiled or allocated at first is not what it costs
    found = []
    for _ in range(REPEATS):
        begin = device.now()
        action()
        found.append(device.now() - begin)
    return statistics.median(found)
