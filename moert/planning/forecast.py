"""How fast a model will be on a machine with so many of its experts in each tier."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moert.plan import LayerNeed
from moert.planning.machine import Machine
from moert.planning.model import ModelNeeds
from moert.schedule import Costs, Item, Place, make_scheduler, makespan
from moert.types import ExpertId

HitCurve = Callable[[float], float]
"""The hit rate of a cache with that share of its layer's experts."""

_TYPICAL = ((0.0, 0.0), (0.125, 0.439), (0.25, 0.687), (0.5, 0.906), (1.0, 1.0))
"""Medians of EMA caches over the 15 real traces of bench/results/policies.json; a quarter of the experts hits 51 to
84 % there, by model."""


def typical_hits(share: float) -> float:
    """What trained models' routing does as a rule."""
    shares = [at for at, _ in _TYPICAL]
    right = min(max(bisect_right(shares, share), 1), len(shares) - 1)
    (x0, y0), (x1, y1) = _TYPICAL[right - 1], _TYPICAL[right]
    return y0 + (y1 - y0) * (min(max(share, 0.0), 1.0) - x0) / (x1 - x0)


def uniform_hits(share: float) -> float:
    """What routing without any preference does, as of random weights: the worst there is."""
    return share


@dataclass(frozen=True)
class Prompts:
    """What prompts of a trace have in common."""

    tokens: int
    """Of one."""
    used: float
    """The share of a layer's experts that one uses."""
    hits: HitCurve
    """What it finds of them."""


@dataclass(frozen=True)
class Speed:
    """A forecast for one kind of step."""

    seconds: float
    """Of the step."""
    tokens: int
    """That it makes, or reads of a prompt."""
    busy: dict[str, float]
    """Seconds that each part of the machine works in the step."""
    hit_rate: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds if self.seconds else math.inf

    @property
    def overlapped_s(self) -> float:
        """No schedule and no reads ahead of time make the step shorter than this, on a machine without a device.

        The disk reads from the beginning to the end, beside everything else, what is read now and no more.
        """
        disk_s = self.busy.get("disk", 0.0)
        return min(self.seconds, max(disk_s, sum(self.busy.values()) - disk_s))

    @property
    def bottleneck(self) -> str:
        """The part that works longest."""
        return max(self.busy, key=lambda part: self.busy[part])


@dataclass(frozen=True)
class Placement:
    """Slots of each layer of experts."""

    host: tuple[int, ...]
    device: tuple[int, ...] | None = None
    """None: there is no device."""


def decode_speed(
    needs: ModelNeeds, machine: Machine, placement: Placement, *, context: int, batch: int, hits: HitCurve
) -> Speed:
    """A step in which each of `batch` sequences of `context` tokens gets one more."""
    return _speed(needs, machine, placement, tokens=batch, cached=(context, batch), hits=hits)


def prefill_speed(
    needs: ModelNeeds,
    machine: Machine,
    placement: Placement,
    *,
    prompt: int,
    batch: int,
    hits: HitCurve,
    prompts: Prompts | None = None,
) -> Speed:
    """A step that reads `batch` prompts of that length at once; `prompts` count if they are of about that length."""
    tokens = prompt * batch
    if prompts is not None and not prompts.tokens / 2 <= tokens <= 2 * prompts.tokens:
        prompts = None
    return _speed(needs, machine, placement, tokens=tokens, cached=(prompt, batch), hits=hits, prompts=prompts)


def _speed(
    needs: ModelNeeds,
    machine: Machine,
    placement: Placement,
    *,
    tokens: int,
    cached: tuple[int, int],
    hits: HitCurve,
    prompts: Prompts | None = None,
) -> Speed:
    n_layers = len(needs.cache or needs.layers)
    overhead_s, dense_s = machine.forward_s(needs.dense_read_bytes, n_layers, tokens, needs.weight_bits)
    cache_s = machine.layer_s(needs.cache_bytes(*cached)) - machine.layer_start_s
    part = "device" if machine.has_device else "cpu"
    busy = {"overhead": overhead_s, part: dense_s + cache_s}
    seconds = sum(busy.values())
    used = hit = 0.0
    known: dict[tuple[object, ...], tuple[float, dict[str, float], float, float]] = {}
    for place, need in enumerate(needs.layers):
        host = placement.host[place]
        device = None if placement.device is None else placement.device[place]
        key = (need.num_experts, need.slot_bytes, need.top_k, host, device)
        if key not in known:
            known[key] = _layer(need, machine, host, device, tokens, hits, needs.weight_bits, prompts)
        layer_s, layer_busy, n_used, n_hit = known[key]
        seconds += layer_s
        used += n_used
        hit += n_hit
        for name, value in layer_busy.items():
            busy[name] = busy.get(name, 0.0) + value
    return Speed(seconds, tokens, busy, hit / used if used else 1.0)


def _layer(
    need: LayerNeed,
    machine: Machine,
    host: int,
    device: int | None,
    tokens: int,
    hits: HitCurve,
    weight_bits: float,
    prompts: Prompts | None,
) -> tuple[float, dict[str, float], float, float]:
    """(seconds, each part's busy seconds, experts used, hits) of one layer's event, on average over its misses."""
    costs = machine.costs(need.slot_bytes, weight_bits)
    experts = need.num_experts
    used = max(1, min(experts, round(experts * (1 - (1 - need.top_k / experts) ** tokens))))
    if prompts is not None:
        used = max(need.top_k, round(experts * prompts.used))
    each = max(1, round(tokens * need.top_k / used))
    held = host if device is None else device
    # Where a step uses nearly all experts, those that are held are hit, and no more.
    rate = min(1.0, hits(held / experts)) if used <= held else held / experts
    if prompts is not None:
        rate = min(1.0, held / used, prompts.hits(held / experts))
    from_disk = 0.0
    if device is not None and host < experts:
        from_disk = min(1.0, (1 - min(1.0, hits(host / experts))) / max(1e-9, 1 - rate)) if rate < 1 else 0.0
    seconds = 0.0
    busy: dict[str, float] = {}
    for misses, weight in _binomial(used, 1 - rate):
        hit = used - misses
        layer_s, layer_busy = _event(costs, hit, misses, each, held - hit, has_device=device is not None)
        disk_s = costs.read_s * misses * from_disk
        seconds += weight * (layer_s + disk_s)
        layer_busy["disk"] = layer_busy.get("disk", 0.0) + disk_s
        for name, value in layer_busy.items():
            busy[name] = busy.get(name, 0.0) + weight * value
    return seconds, busy, used, used * rate


def _binomial(n: int, p: float) -> Sequence[tuple[int, float]]:
    """How many of `n` miss, and how often; just the mean where there are many."""
    if n > 16 or p in (0.0, 1.0):
        return [(round(n * p), 1.0)]
    return [(i, math.comb(n, i) * p**i * (1 - p) ** (n - i)) for i in range(n + 1)]


def _event(
    costs: Costs, hits: int, misses: int, tokens: int, room: int, *, has_device: bool
) -> tuple[float, dict[str, float]]:
    here, away = (Place.DEVICE, Place.HOST) if has_device else (Place.HOST, Place.DISK)
    items = [Item(ExpertId(0, i), tokens, here if i < hits else away) for i in range(hits + misses)]
    schedule = make_scheduler("exact").plan(items, costs)
    timing = makespan(schedule, costs, None if has_device else room)
    busy = {
        "cpu": sum(costs.cpu_s(item.tokens) for item in schedule.cpu),
        "link": costs.move_s * len(schedule.fetch),
        "disk": costs.read_s * len(schedule.read),
    }
    if schedule.device:
        busy["device"] = sum(costs.device_s(item.tokens) for item in schedule.device)
    return timing.makespan_s, busy
