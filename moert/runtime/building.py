"""Runtimes made from a model's layers: over parameters in memory, or over records and slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from moert.config import OffloadConfig
from moert.plan import LayerNeed, default_budget, plan_slots
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime.device_host import HeldResidency
from moert.runtime.device_layer import DeviceLayer
from moert.runtime.host_tier import HostTier
from moert.runtime.layer import LayerCache, LayerSpec, ParameterLayer, Weights
from moert.runtime.preload import Progress, preload
from moert.runtime.records import RecordSource
from moert.runtime.runtime import OffloadRuntime, reads_ahead
from moert.runtime.slot_layer import SlotLayer
from moert.runtime.staging import StagingPool
from moert.tiers.disk import DiskReader
from moert.tiers.memory import available_bytes


def runtime_in_parameters(
    specs: Sequence[LayerSpec],
    weights: Sequence[Sequence[Weights]],
    config: OffloadConfig,
    on_device: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
) -> OffloadRuntime:
    """All experts stay where they are; `weights[layer][expert]` are views the caller owns.

    `on_device` has, for each layer on a GPU, its tensors over all experts; see `DeviceLayer`.
    """
    layers: list[LayerCache] = []
    for spec, views in zip(specs, weights, strict=True):
        stacked = (on_device or {}).get(spec.index)
        # On a GPU nothing leaves, and nothing is to be brought from there for a policy that would want to know it.
        policy = make_policy(config.policy if stacked is None else "fifo", spec.num_experts)
        residency = Residency(spec.num_experts, policy)
        if stacked is None:
            layers.append(ParameterLayer(spec, residency, views))
        else:
            layers.append(DeviceLayer(spec, residency, views, stacked))
    return OffloadRuntime(layers, config)


def runtime_in_slots(
    specs: Sequence[LayerSpec],
    source: RecordSource,
    config: OffloadConfig,
    progress: Progress | None = None,
    reserved_bytes: int = 0,
) -> OffloadRuntime:
    """Experts come from `source`, which the runtime owns (and closes) once this has returned.

    Allocates the host tier, and blocks while experts are preloaded if `config.preload` asks for it. Where no budget is
    given, `reserved_bytes` of memory are left free for what comes later, the KV cache above all.

    Raises:
        CapacityError: the budget is too small for one token, or the memory cannot be had.
        CorruptFileError, TransferError: a preloaded expert could not be read.
    """
    opened: list[Callable[[], None]] = []
    try:
        needs = _needs(specs, source)
        slots = plan_slots(needs, config.host_budget or default_budget(needs, available_bytes(), reserved_bytes))
        records = [source.record(spec.index, expert) for spec in specs for expert in range(spec.num_experts)]
        staged = [record.buffer_bytes for record in records if not record.is_direct]
        tier = HostTier(needs, slots, *((reads_ahead(config), max(staged)) if staged else (0, 0)))
        opened.append(tier.close)
        reader = DiskReader(depth=config.io_depth)
        opened.append(reader.close)
        staging = StagingPool(tier.staging) if tier.staging is not None else None
        layers = [
            SlotLayer(
                spec,
                HeldResidency(n, make_policy(config.policy, n)),
                bank,
                source,
                reader,
                staging,
                poison=config.debug,
            )
            for spec, bank, n in zip(specs, tier.banks, slots, strict=True)
        ]
        fits = all(n == spec.num_experts for n, spec in zip(slots, specs, strict=True))
        runtime = OffloadRuntime(layers, config, tier=tier, reader=reader, source=source, staging=staging)
        if config.preload if config.preload is not None else fits:
            preload(layers, runtime.pipeline, progress)
        return runtime
    except BaseException:
        for close in reversed(opened):
            close()
        raise


def slots_planned(
    specs: Sequence[LayerSpec], source: RecordSource, config: OffloadConfig, available_bytes: int
) -> list[int]:
    """Slots of each layer in `runtime_in_slots`, with `available_bytes` of memory to be had; nothing is allocated.

    Raises:
        CapacityError: the budget is too small for one token.
    """
    needs = _needs(specs, source)
    return plan_slots(needs, config.host_budget or default_budget(needs, available_bytes))


def _needs(specs: Sequence[LayerSpec], source: RecordSource) -> list[LayerNeed]:
    return [
        LayerNeed(
            name=spec.name,
            num_experts=spec.num_experts,
            slot_bytes=max(source.record(spec.index, expert).slot_bytes for expert in range(spec.num_experts)),
            expert_bytes=spec.expert_bytes,
            top_k=spec.top_k,
        )
        for spec in specs
    ]
