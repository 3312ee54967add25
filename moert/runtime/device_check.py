"""Whether a device computes what the CPU does, asked of it with the model's own experts before the model is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from moert.errors import KernelUnavailableError, MoertError, PolicyError
from moert.runtime.compute import Compute, Scratch, add_weighted
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import LayerKernels, RowByRow
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import BY_ITSELF, HYBRID, PLANNED, Ways
from moert.runtime.layer import Weights
from moert.runtime.routing import group_by_expert
from moert.runtime.runtime import OffloadRuntime
from moert.runtime.step import run_step
from moert.types import ExpertId

STEPS = ((1, "fetch_all"), (40, "fetch_all"), (40, "cpu_all"), (1, HYBRID), (1, PLANNED))
"""Tokens, and who computes what is not on the device yet: one token and many have kernels of their own, what the CPU
computes is added on the device, and single tokens may be the device's alone, but for what it leaves to the CPU: all
that is missing, here."""

FUSED_ROUNDINGS, OWN_ROUNDINGS = 2, 5
"""How often one side rounds to the model's dtype, at most: what goes into the down product, and the result; in the
model's own code the products, the activation and what it is multiplied with, and the result."""

INT8_HIDDEN = ("int8", "int4", "mxfp4")
"""Formats for which the CPU's kernels round what goes into both products to 8 bits."""

INT8_SHARE = 2 * math.sqrt(32) / 254
"""How far that takes a result, at most: each of 32 numbers is off by a 254th of their largest, and so for two
products."""


def check_device(
    runtime: OffloadRuntime, tiers: Sequence[DeviceTier], computes: Mapping[int, Compute], width: int
) -> None:
    """Run steps of one layer of each format on each device, and compare them with the CPU's. Blocks; leaves nothing but
    experts on the device, and one or two steps that the policies of those layers have seen.

    Args:
        tiers: those of `runtime`, which nobody uses yet.
        computes: layer -> one expert through the module's own code.
        width: of hidden states, for layers that have no kernels to say it.

    Raises:
        KernelUnavailableError: they differ by more than `tolerance`, or the device's kernels do not run.
        MoertError: an expert could not be read, or the device is lost or full.
    """
    for tier in tiers:
        seen = set()
        for cache, kernels in zip(tier.caches, tier.kernels, strict=True):
            spec = cache.spec
            kind = (spec.stored, spec.num_identity, kernels.name, None if spec.fused is None else spec.fused.ffn.gate)
            if kind not in seen:
                seen.add(kind)
                with _unnoticed(tier, cache):
                    _check_layer(runtime, tier, cache, kernels, computes[spec.index], width)


def tolerance(dtype: torch.dtype, sides: Sequence[int], products: Sequence[int]) -> float:
    """How far two results may be apart, relative to the length of a token's output.

    A rounding changes each number by half a unit in the last place at most, and so the whole. A sum of n products in
    fp32, whose errors are of either sign, is off by less than the root of n such halves.

    Args:
        sides: how often each side rounds to `dtype`.
        products: over how many numbers each product sums.
    """
    sums = sum(math.sqrt(n) for n in products) * torch.finfo(torch.float32).eps / 2
    return sum(sides) * torch.finfo(dtype).eps / 2 + len(sides) * sums


@contextmanager
def _unnoticed(tier: DeviceTier, cache: DeviceCache) -> Iterator[None]:
    """Steps within are in no count, and go by schedulers of their own."""
    layer, ways = cache.host.cache, tier.ways
    before = copy.copy(layer.stats)
    try:
        yield
    finally:
        tier.go_by(ways)
        tier.reset_counts()
        now = layer.stats
        layer.stats = replace(before, resident_bytes=now.resident_bytes, fallback=now.fallback)


def _check_layer(
    runtime: OffloadRuntime,
    tier: DeviceTier,
    cache: DeviceCache,
    kernels: LayerKernels,
    compute: Compute,
    width: int,
) -> None:
    spec, device = cache.spec, tier.device
    dtype = spec.tensors[0].dtype
    is_own = isinstance(kernels, RowByRow) and not kernels.is_fused
    is_coded = spec.storage is not None and not spec.storage.choice.is_plain and not isinstance(kernels, RowByRow)
    is_coarse = is_coded and spec.storage is not None and spec.storage.choice.name in INT8_HIDDEN
    roundings = (OWN_ROUNDINGS if is_own or spec.fused is None else FUSED_ROUNDINGS,) * 2
    # Without kernels nobody says how wide an expert is inside; most are narrower than what they are given.
    width, inner = (width, width) if spec.fused is None else (spec.fused.ffn.hidden, spec.fused.ffn.width)
    rounding = tolerance(dtype, roundings, (width, inner))
    for tokens, schedule in STEPS:
        if schedule == HYBRID and tier.planned.sharing is None:
            continue
        allowed = rounding + (INT8_SHARE if is_coarse and schedule in ("cpu_all", HYBRID) else 0.0)
        hidden, ids, weights = _inputs(cache, tokens, width, dtype)
        alone = schedule if schedule in BY_ITSELF else False
        tier.go_by(Ways("fetch_all" if alone else schedule, device.now, (), alone))
        try:
            with _all_left(tier):
                if alone:
                    tier.begin_planned(lambda: True)
                found = _on_device(tier, spec.index, compute, hidden, ids, weights)
                if tier.is_void():
                    continue  # too little is in host memory
                tier.settle()
            tier.transfers.drain()  # the CPU's own step does not ask who is copying
            wanted = (_decoded if is_coded else _on_cpu)(runtime, cache, compute, hidden, ids, weights)
        except (MoertError, PolicyError):
            raise
        except Exception as error:
            raise KernelUnavailableError(
                f"{device.name} could not compute {spec.name} by {kernels.name} ({type(error).__name__}: {error}); "
                "leave device_memory out to run the experts on the CPU"
            ) from error
        apart = (found.double() - wanted.double()).norm(dim=1) / wanted.double().norm(dim=1)
        if not bool((apart <= allowed).all()):
            raise KernelUnavailableError(
                f"{device.name} does not compute what the CPU does: {spec.name} by {kernels.name}, {tokens} tokens of "
                f"{dtype}, is off by {float(apart.max()):.2g} of its length, and rounding explains {allowed:.2g}; "
                "leave device_memory out to run the experts on the CPU, and please report this with `moert doctor`"
            )


@contextmanager
def _all_left(tier: DeviceTier) -> Iterator[None]:
    """Whatever is left to the CPU by shares is all that is missing."""
    sharing = tier.planned.sharing
    if sharing is not None:
        sharing.forced = lambda top_k: [0] * (top_k + 1)
    try:
        yield
    finally:
        if sharing is not None:
            sharing.forced = None


def _on_device(
    tier: DeviceTier,
    layer: int,
    compute: Compute,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    given = [tensor.to(tier.device.torch_device) for tensor in (hidden, ids, weights)]
    return tier.device.to_host(tier.run(layer, compute, given[0], given[1], given[2]))


def _inputs(
    cache: DeviceCache, tokens: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states as a norm leaves them, and tokens that choose in turns among twice as many experts as one needs:
    those that are in host memory, if there are so many."""
    spec = cache.spec
    generator = torch.Generator().manual_seed(0)
    there = [cache.host.has(ExpertId(spec.index, expert)) for expert in range(spec.num_experts)]
    # A single token has some of those that are not on the device, if any are not.
    missing = [ExpertId(spec.index, expert) not in cache.residency for expert in range(spec.num_experts)]
    order = sorted(range(spec.num_experts), key=lambda expert: (not there[expert], tokens == 1 and not missing[expert]))
    experts = order[: 2 * spec.top_k]
    # From the last one on, as there may be one that is.
    picks = (torch.arange(tokens).unsqueeze(1) + torch.arange(spec.top_k) - 1) % len(experts)
    weights = torch.rand(tokens, spec.top_k, generator=generator) + 0.5
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    return hidden, torch.tensor(experts)[picks], weights / weights.sum(1, keepdim=True)


def _on_cpu(
    runtime: OffloadRuntime,
    cache: DeviceCache,
    compute: Compute,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What a step without a device gives."""
    host = cache.host.cache
    return run_step(host, compute, hidden, ids, weights, pipeline=runtime.pipeline, scratch=Scratch())


def _decoded(
    runtime: OffloadRuntime,
    cache: DeviceCache,
    compute: Compute,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What the module's own code gives with decoded weights: the CPU's kernels would round the hidden states too."""
    out = torch.zeros(hidden.shape)
    for group in group_by_expert(ids, weights, cache.spec.num_experts):
        expert = runtime.weights(cache.spec.index, group.expert)
        wide: Weights = {name: tensor.float() for name, tensor in expert.items()}
        add_weighted(group, compute(group.rows(hidden).float(), wide), out)
    return out
