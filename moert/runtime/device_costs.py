"""What an expert costs on the device, the link and the CPU of this machine, for the scheduler to begin with."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from moert.device.base import Device, OutOfDeviceMemoryError
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

DISK_BYTES_PER_S = 2e9
"""Assumed of a disk; what is on it is read whoever computes it, so it decides little."""


def measure_costs(
    device: Device,
    cache: DeviceCache,
    kernels: LayerKernels,
    on_cpu: ExpertCompute,
    pinned: PinnedHost,
    compute: Compute,
    width: int,
    dtype: torch.dtype,
) -> Costs | None:
    """Time one expert of a layer that is in host memory: copied, and computed on both sides. Blocks for some
    milliseconds; leaves nothing behind. Hidden states are [T, `width`] in `dtype`.

    Returns:
        None if none of the layer's experts is in host memory now, or the device has no row or no memory to try one in.

    The parts are timed one after the other, so what they take from each other is not in it: the `Guard` sees to that.

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

        def move() -> None:
            weights, buffer = pinned.source(cache.host.weights(expert), bank.specs, bank.row_bytes)
            event = bank.fill(row, stream, weights, pageable=buffer is not None and not buffer.is_pinned)
            if buffer is not None:
                buffer.until = event
            event.wait()

        move_s = _median(device, move)
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
    except OutOfDeviceMemoryError:
        return None  # fewer tokens may fit
    finally:
        bank.give_back(row)
    read_s = spec.expert_bytes / DISK_BYTES_PER_S
    return Costs(_curve(cpu), _curve(on_device), move_s=move_s, read_s=read_s)


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
