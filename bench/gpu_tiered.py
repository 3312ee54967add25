"""A model over a device tier: tokens one by one and a prompt, each way of sharing the misses, and what was moved."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from gpu_layers import Setting
from gpu_results import Rows

import moert
from moert.device.base import Device
from moert.device.cuda import CudaDevice
from moert.device.simulated import Machine, SimulatedDevice
from moert.hf.model import runtime_of
from moert.runtime.device_group import DeviceGroup
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import PURE, Ways
from moert.trace import Trace

HYBRID, FETCHED, STATIC = "hybrid", "all fetched", "static split"
WAYS = {
    HYBRID: ("exact", PURE, False),
    FETCHED: ("fetch_all", (), False),
    "all on the CPU": ("cpu_all", (), False),
    STATIC: ("static_split", (), False),
    "the device alone": ("fetch_all", (), True),
}
"""Name -> scheduler, what a guard may leave it for, and whether the device runs single tokens by itself. All have the
same cache, and promotions."""

MEASURED, WARM_UP = 0, 1
"""Sequences of the trace."""

ENOUGH_S = 3.0
"""Nothing is begun with less time than that."""


@dataclass(frozen=True)
class Lengths:
    """In tokens."""

    prompt: int
    warm_up: int
    """Twice: with all fetched, so that every way finds the same cache, and by the way itself, for its guard."""
    tokens: int
    long_prompt: int

    @classmethod
    def of(cls, setting: Setting) -> Lengths:
        return cls(5, 2, 4, 24) if setting.is_dry else cls(32, 32, 64, 4096)


@dataclass
class Decoded:
    """Greedy tokens after a prompt, the seconds that each took, and what the tier did meanwhile."""

    greedy: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: Counts | None = None

    @property
    def s_per_token(self) -> float:
        return sum(self.seconds) / len(self.seconds)


@dataclass(frozen=True)
class Counts:
    """Of experts but for the bytes, until now or between two times."""

    copied_bytes: int
    read_bytes: int
    hits: int
    missed: int
    """Those that were not on the device when their step began. The CPU may compute others, too."""
    on_cpu: int

    @classmethod
    def of(cls, model: Any) -> Counts:
        stats = moert.stats(model)  # first: it brings the tier's counts up to date
        tiers = tiers_of(model)
        copied, on_cpu = (
            sum(n) for n in zip(*((t.transfers.counts.nbytes, t.counts.on_cpu) for t in tiers), strict=True)
        )
        return cls(copied, stats.bytes_read, stats.hits, stats.misses, on_cpu)

    def since(self, before: Counts) -> Counts:
        earlier = asdict(before)
        return Counts(**{name: number - earlier[name] for name, number in asdict(self).items()})

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.missed)


def make_device(setting: Setting) -> Device:
    if setting.is_dry:
        return SimulatedDevice(Machine(up_bytes_per_s=2e9, latency_s=2e-5))
    return CudaDevice(setting.device.index or 0)


def tier_of(model: Any) -> DeviceTier:
    tier = runtime_of(model).device
    assert tier is not None
    return tier


def tiers_of(model: Any) -> Sequence[DeviceTier]:
    """Of each of its devices."""
    device = runtime_of(model).device
    assert device is not None
    return device.tiers if isinstance(device, DeviceGroup) else (device,)


def go_by(model: Any, way: str) -> None:
    schedule, pure, planned = WAYS[way]
    tiers = tiers_of(model)
    ways = Ways(schedule, tiers[0].device.now, pure, planned)
    for tier in tiers:
        # As if the tier had been made with it, which would lock all of host memory anew. Others have the same object.
        tier.settle()
        tier.go_by(ways)


def follow_sequence(model: Any, routing: Trace, sequence: int) -> AbstractContextManager[None]:
    return moert.follow(model, Trace(routing.header, [routing[sequence]]))


def prompt_of(model: Any, setting: Setting, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, model.config.vocab_size - 3, (1, tokens), generator=generator).to(setting.device)


def decode(model: Any, prompt: torch.Tensor, tokens: int, until: float, look: Callable[[], Counts] | None) -> Decoded:
    """As many tokens as there is time for, but one."""
    found = Decoded()
    with torch.no_grad():
        output = model(prompt, use_cache=True, logits_to_keep=1)
        following = output.logits[:, -1:].argmax(-1)
        found.greedy.append(int(following))
        before = look() if look else None
        while len(found.seconds) < tokens and (not found.seconds or time.monotonic() < until - ENOUGH_S):
            begin = time.perf_counter()
            output = model(following, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            following = output.logits[:, -1:].argmax(-1)
            found.greedy.append(int(following))
            found.seconds.append(time.perf_counter() - begin)
        if look and before:
            found.counts = look().since(before)
    return found


def prefill(model: Any, prompt: torch.Tensor) -> float:
    """Seconds to a prompt's last logits."""
    begin = time.perf_counter()
    with torch.no_grad():
        int(model(prompt, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
    return time.perf_counter() - begin


class Tiered:
    """A model over a device tier whose tokens follow a trace, and the rows that it gives."""

    def __init__(self, model: Any, setting: Setting, routing: Trace, rows: Rows, until: float, **facts: Any) -> None:
        """`facts` go into every row."""
        self.model, self._setting, self._routing, self._rows, self._until = model, setting, routing, rows, until
        self._facts = {**facts, "layers": model.config.num_hidden_layers}
        self._lengths = Lengths.of(setting)
        stats = moert.stats(model).layers
        fallen = sorted({layer.fallback for layer in stats if layer.fallback})
        if fallen:
            what = f"layers without moert's kernels, {self._name}"
            self._rows.add(what, float(sum(bool(layer.fallback) for layer in stats)), "layers", why="; ".join(fallen))

    @property
    def _name(self) -> str:
        return f"{self._facts['stored_as']} at {self._facts['share']} %"

    def _follow(self, sequence: int) -> AbstractContextManager[None]:
        return follow_sequence(self.model, self._routing, sequence)

    def _is_late(self, what: str) -> bool:
        late = time.monotonic() > self._until - ENOUGH_S
        if late:
            self._rows.add(what, None, "", goal="offload", why="no time was left", **self._facts)
        return late

    def decode(self, way: str) -> None:
        """A row: tokens a second."""
        what = f"decode, {self._name}, {way}"
        if self._is_late(what):
            return
        lengths = self._lengths
        prompt = prompt_of(self.model, self._setting, lengths.prompt)
        for one in (FETCHED, way):
            go_by(self.model, one)
            with self._follow(WARM_UP):
                decode(self.model, prompt, lengths.warm_up, self._until, None)
        steps = Counter(tier_of(self.model).counts.ways)
        with self._follow(MEASURED):
            found = decode(self.model, prompt, lengths.tokens, self._until, lambda: Counts.of(self.model))
        counts, n = found.counts, len(found.seconds)
        assert counts is not None
        self._rows.add(
            what,
            1 / found.s_per_token,
            "tokens/s",
            goal="offload",
            kind="decode",
            way=way,
            **self._facts,
            s_per_token=found.s_per_token,
            median_s=sorted(found.seconds)[n // 2],
            n=n,
            hit_rate=counts.hit_rate,
            missed=counts.missed / n,
            on_cpu=counts.on_cpu / n,
            copied_bytes=counts.copied_bytes / n,
            read_bytes=counts.read_bytes / n,
            steps=dict(Counter(tier_of(self.model).counts.ways) - steps),
            contention=tuple(tier_of(self.model).hosted.contention or ()),
            greedy=found.greedy,
        )

    def prefill(self, way: str) -> None:
        """A row: seconds of a long prompt, the better of two after one that does not count."""
        what = f"{self._lengths.long_prompt} tokens of prompt, {self._name}, {way}"
        if self._is_late(what):
            return
        go_by(self.model, way)
        prompt = prompt_of(self.model, self._setting, self._lengths.long_prompt)
        runs = []
        with self._follow(MEASURED):
            for _ in range(3):
                before = Counts.of(self.model)
                seconds = prefill(self.model, prompt)
                runs.append((seconds, Counts.of(self.model).since(before)))
                if time.monotonic() > self._until - ENOUGH_S - seconds:
                    break
        seconds, counts = min(runs[1:] or runs, key=lambda run: run[0])
        self._rows.add(
            what,
            seconds,
            "s",
            goal="offload",
            kind="prefill",
            way=way,
            **self._facts,
            copied_bytes=counts.copied_bytes,
            hit_rate=counts.hit_rate,
            on_cpu=counts.on_cpu,
            runs=len(runs),
        )
