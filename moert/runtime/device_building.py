"""A device tier put on top of a runtime whose experts are in host memory and on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moert.config import Budget, format_bytes
from moert.device.base import Device, OutOfDeviceMemoryError
from moert.errors import CapacityError
from moert.formats import TensorSpec
from moert.plan import LayerNeed
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime.device_budget import GRAPH_BYTES, Besides, device_slots
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_host import HostLayer, tensor_ranges
from moert.runtime.device_kernels import LayerKernels, RowByRow
from moert.runtime.device_pinning import PinnedHost, SharedPinning
from moert.runtime.device_rows import RowBank, row_bytes
from moert.runtime.device_table import SlotTable
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import PURE, Ways
from moert.runtime.layer import LayerCache, ParameterLayer
from moert.runtime.runtime import OffloadRuntime
from moert.schedule import Costs

SPARE_ROWS = 3
"""Beside as many as one token needs: what is promoted comes up in them, and what is predicted."""

WORKSPACE_TOKENS = 2048
"""A step of so many tokens is to find memory for what it computes; longer ones are cut in two where it is short."""


@dataclass(frozen=True)
class Share:
    """A device, and what of a model it has."""

    device: Device
    layers: Sequence[LayerCache]
    dense_bytes: int = 0
    """Of the model's dense weights, those that are still to be moved there."""
    cache_bytes: int = 0
    """Of the KV cache at the context that is asked for."""


def attach_device(
    runtime: OffloadRuntime,
    device: Device,
    *,
    dense_bytes: int = 0,
    cache_bytes: int = 0,
    schedule: str = "exact",
    guarded: bool = True,
    planned: bool | str | None = None,
    **options: Any,
) -> DeviceTier:
    """Have `runtime` run its steps over `device`, which it owns and closes from then on, also if this fails.

    Blocks until `build_tier` and, unless `config.preload` is False, `DeviceTier.preload` are done.

    Args:
        dense_bytes, cache_bytes: see `Share`.
        schedule: the scheduler's name.
        guarded: leave it for a pure way where that is seen to be faster.
        planned: have the device run passes of one token by itself, where it can, or, with "planned_hybrid", with a
            share for the CPU; None: where that is seen to be faster, which needs `guarded`.
        **options: of `build_tier`.

    Raises:
        CapacityError: the device has not so much memory; the numbers are in the message.
        ConfigError: there is no such scheduler.
    """
    try:
        ways = Ways(schedule, device.now, PURE if guarded else (), planned)
        share = Share(device, runtime.layers, dense_bytes, cache_bytes)
        tier = build_tier(runtime, share, ways, planned=planned, **options)
        if runtime.config.preload is not False:
            tier.preload()
        runtime.attach(tier)
        return tier
    except BaseException:
        device.close()
        raise


def build_tier(
    runtime: OffloadRuntime,
    share: Share,
    ways: Ways,
    *,
    budget: Budget | None = None,
    headroom_bytes: int | None = None,
    promoting: bool = True,
    costs: Costs | None = None,
    triton: bool | None = None,
    planned: bool | str | None = None,
    max_bytes: int | None = None,
    lead: PinnedHost | None = None,
) -> DeviceTier:
    """The tier of a device over some of a model's layers. Allocates its slots, and page-locks the host memory of all
    experts unless `lead` has done that. Blocks. The device is the caller's to close where this fails.

    Args:
        budget: of bytes for experts there; None: what is left beside everything else.
        headroom_bytes: for what torch and the model's own layers need; None: `device_budget.HEADROOM_BYTES`.
        promoting: bring experts up over the idle link.
        costs: see `DeviceTier`.
        triton: have the Triton kernels compute what they can; None: on a GPU.
        planned: see `DeviceTier`.
        lead: see `SharedPinning`.

    Raises:
        CapacityError: the device has not so much memory; the numbers are in the message.
    """
    device, layers = share.device, share.layers
    needs = [_need(layer) for layer in layers]
    groups: dict[tuple[TensorSpec, ...], list[LayerCache]] = {}
    for layer in layers:
        groups.setdefault(layer.spec.stored, []).append(layer)
    spare = {specs: _spare_rows(group) for specs, group in groups.items()}
    use_triton = device.torch_device.type == "cuda" if triton is None else triton
    besides = Besides(
        dense_bytes=share.dense_bytes,
        cache_bytes=share.cache_bytes,
        staging_bytes=sum(row_bytes(specs) * n for specs, n in spare.items()),
        workspace_bytes=max(_workspace_bytes(layer) for layer in layers),
        graph_bytes=GRAPH_BYTES if use_triton and planned is not False and device.reads_host else 0,
    )
    if headroom_bytes is not None:
        besides = replace(besides, headroom_bytes=headroom_bytes)
    numbers = device_slots(needs, budget, device.memory, besides)
    slots = {layer.spec.index: n for layer, n in zip(layers, numbers, strict=True)}
    caches = _caches(runtime, device, groups, spare, slots)
    table = SlotTable(device, caches)
    kernels = [_kernels(device, cache, table, use_triton) for cache in caches]
    _warn_of_fallbacks(caches, kernels, use_triton)
    return DeviceTier(
        device,
        caches,
        kernels,
        table,
        runtime.pipeline,
        lambda: _ranges(runtime),
        reads=runtime.reads,
        ways=ways,
        promoting=promoting,
        costs=costs,
        max_bytes=max_bytes,
        planned=planned,
        debug=runtime.config.debug,
        pinned=None if lead is None else SharedPinning(device, lead),
        reserve_bytes=besides.nbytes - besides.dense_bytes - besides.staging_bytes,
    )


def _need(layer: LayerCache) -> LayerNeed:
    spec = layer.spec
    return LayerNeed(spec.name, spec.num_experts, row_bytes(spec.stored), spec.expert_bytes, spec.top_k)


def _spare_rows(layers: Sequence[LayerCache]) -> int:
    return max(layer.spec.top_k for layer in layers) + SPARE_ROWS


def _workspace_bytes(layer: LayerCache) -> int:
    """What the outputs of a step's experts take, and what is between their products."""
    fused = layer.spec.fused
    numbers = 0 if fused is None else 2 * fused.ffn.hidden + fused.ffn.width
    return WORKSPACE_TOKENS * layer.spec.top_k * numbers * 4


def _caches(
    runtime: OffloadRuntime,
    device: Device,
    groups: dict[tuple[TensorSpec, ...], list[LayerCache]],
    spare: dict[tuple[TensorSpec, ...], int],
    slots: Mapping[int, int],
) -> list[DeviceCache]:
    banks = {}
    for number, (specs, group) in enumerate(groups.items()):
        n_rows = sum(slots[layer.spec.index] for layer in group) + spare[specs]
        try:
            banks[specs] = RowBank(device, number, specs, n_rows, poison=runtime.config.debug)
        except OutOfDeviceMemoryError as error:
            # Between the look at what is free and now somebody else has taken it.
            raise CapacityError(
                f"{format_bytes(n_rows * row_bytes(specs))} for {n_rows} experts were free on {device.name} and are "
                f"no longer ({error}); end what else uses it, or give device_memory less"
            ) from error
    caches = []
    for layer in (runtime.layers[index] for index in slots):
        n = slots[layer.spec.index]
        residency = Residency(n, make_policy(runtime.config.policy, n))
        caches.append(DeviceCache(layer.spec, residency, banks[layer.spec.stored], HostLayer(layer)))
    return caches


def _kernels(device: Device, cache: DeviceCache, table: SlotTable, use_triton: bool) -> LayerKernels:
    is_host = device.torch_device.type == "cpu"
    if use_triton:
        try:
            from moert.runtime.device_triton import RowByPick

            return RowByPick(device, cache.spec, cache.bank, table)
        except (ValueError, ImportError) as error:
            cache.stats.fallback = str(error)
    return RowByRow(device, cache.spec, cache.bank, fused=is_host)


def _warn_of_fallbacks(caches: Sequence[DeviceCache], kernels: Sequence[LayerKernels], use_triton: bool) -> None:
    fallen = [
        cache.stats.fallback
        for cache, kernel in zip(caches, kernels, strict=True)
        if use_triton and isinstance(kernel, RowByRow)
    ]
    if fallen:
        warnings.warn(
            f"{len(fallen)} of {len(caches)} layers of experts are computed on the device by the model's own code, one "
            f"expert after the other, not by moert's kernels: {'; '.join(dict.fromkeys(map(str, fallen)))}",
            RuntimeWarning,
            stacklevel=4,
        )


def _ranges(runtime: OffloadRuntime) -> Iterable[tuple[int, int]]:
    """The host memory that experts are in now."""
    yield from runtime.slot_ranges()
    for layer in runtime.layers:
        if isinstance(layer, ParameterLayer):
            for expert in range(layer.spec.num_experts):
                yield from tensor_ranges(layer.weights(expert))
