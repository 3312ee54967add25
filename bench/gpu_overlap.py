"""G7: a layer computed while its weights come over the link: behind events, group by group, and behind epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_layers import Routing, Setting, expert_bytes, make_bank, make_routing, slot_table
from gpu_results import Rows, Target
from gpu_timing import elapsed, race

from moert.kernels.bank import Bank
from moert.kernels.device_experts import ArrivalGroup, grouped_experts
from moert.kernels.dispatch import arrival_order
from moert.kernels.grouped_gate_up import Arrivals

GROUPS = 6
LARGEST = 32768
"""Tokens: more would be computed in parts, each of which waits for all weights."""
MOST_POLLS = 1 << 20
"""In the check of what comes out: about a second, after which a block gives up."""


@dataclass
class Link:
    """Experts in pinned memory, and the stream that brings them into their slots in the order they are given."""

    bank: Bank
    setting: Setting
    epoch: int = 0
    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.setting.device
        for matrix in (self.bank.up, self.bank.down):
            for part in (matrix.codes, matrix.scales, matrix.zeros):
                if part is not None:
                    self.rows.append((part.clone() if self.setting.is_dry else part.cpu().pin_memory(), part))
        self.ready = torch.zeros(self.bank.slots, dtype=torch.int32, device=device)
        self.needed = torch.zeros(1, dtype=torch.int32, device=device)
        self.word = torch.zeros(4096, dtype=torch.int32, pin_memory=not self.setting.is_dry)
        self.stream = None if self.setting.is_dry else torch.cuda.Stream()

    def poison(self, experts: list[int]) -> None:
        """What has not come must not be right by accident."""
        for _, part in self.rows:
            for expert in experts:
                part[expert].view(torch.uint8).fill_(0xFF)

    def begin(self) -> None:
        """From now on copies wait for all that was launched before, and epochs are new."""
        self.epoch += 1
        self.word[self.epoch] = self.epoch
        self.needed.fill_(self.epoch)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def resident(self, experts: torch.Tensor) -> None:
        """These are there already."""
        self.ready.index_fill_(0, experts, self.epoch)

    def copy(self, experts: list[int]) -> None:
        """Every tensor of each expert, and then its epoch, by the copy engine."""
        with torch.cuda.stream(self.stream) if self.stream is not None else torch.no_grad():
            for expert in experts:
                for host, part in self.rows:
                    part[expert].copy_(host[expert], non_blocking=True)
                self.ready[expert : expert + 1].copy_(self.word[self.epoch : self.epoch + 1], non_blocking=True)

    def event(self) -> Callable[[], object] | None:
        """Has the current stream wait for the copies so far."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event.wait


def run(setting: Setting, rows: Rows) -> None:
    bank, slot_of = make_bank("int4", setting), slot_table(setting)
    link = Link(bank, setting)
    experts = setting.shape.experts
    for resident in setting.of((0, 50, 80), (50,)):
        arriving = list(range(experts - experts * resident // 100))  # the first by number
        copy_s = elapsed(lambda arriving=arriving: _only_copy(link, arriving), setting.device).median  # type: ignore[misc]
        routing = _balanced(setting, bank, slot_of, copy_s)
        _compare(setting, rows, link, routing, slot_of, arriving, f"{resident} % resident")


def _only_copy(link: Link, arriving: list[int]) -> None:
    link.begin()
    link.copy(arriving)
    wait = link.event()
    if wait is not None:
        wait()


def _balanced(setting: Setting, bank: Bank, slot_of: torch.Tensor, copy_s: float) -> Routing:
    """As many tokens as take about as long to compute as the copies do: only there can overlap halve the time."""
    if setting.is_dry:
        return make_routing(setting, 24)
    tokens = 2048
    probe = make_routing(setting, tokens)
    taken = race({"": [lambda: grouped_experts(bank, probe.x, probe.ids, probe.weights, slot_of)]}, setting.device)[""]
    wanted = int(tokens * copy_s / taken.median)
    return make_routing(setting, min(LARGEST, max(256, wanted // 256 * 256)))


def _compare(
    setting: Setting,
    rows: Rows,
    link: Link,
    routing: Routing,
    slot_of: torch.Tensor,
    arriving: list[int],
    what: str,
) -> None:
    bank, device = link.bank, setting.device
    step = routing.x, routing.ids, routing.weights, slot_of
    coming = torch.tensor(arriving, device=device)
    there = torch.arange(len(arriving), setting.shape.experts, device=device)
    # Those that are there first, then the others as they come.
    order = arrival_order(slot_of, coming)
    size = -(-len(arriving) // GROUPS)
    parts = [arriving[begin : begin + size] for begin in range(0, len(arriving), size)]

    def serial() -> torch.Tensor:
        _only_copy(link, arriving)
        return grouped_experts(bank, *step, order=order)

    def split() -> torch.Tensor:
        link.begin()
        groups = [ArrivalGroup(len(there), None)] if len(there) else []
        end = len(there)
        for part in parts:
            link.copy(part)
            end += len(part)
            groups.append(ArrivalGroup(end, link.event()))
        return grouped_experts(bank, *step, order=order, groups=groups)

    def flags(most_polls: int = 0) -> torch.Tensor:
        link.begin()
        link.resident(there)
        link.copy(arriving)
        arrivals = Arrivals(link.ready, link.needed, most_polls)
        return grouped_experts(bank, *step, order=order, arrivals=arrivals)

    compute_s = elapsed(lambda: grouped_experts(bank, *step, order=order), device).median
    copy_s = elapsed(lambda: _only_copy(link, arriving), device).median
    wanted = grouped_experts(bank, *step)
    taken: dict[str, float] = {}
    ways: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
        "serial": (serial, serial),
        "behind events": (split, split),
        "behind epochs": (lambda: flags(MOST_POLLS), flags),
    }
    for name, (check, work) in ways.items():
        link.poison(arriving)
        if not torch.equal(check(), wanted):
            rows.add(f"{name}, {what}", None, "us", wrong=True)
            continue
        taken[name] = elapsed(work, device).median
    limit = max(compute_s, copy_s)
    shared = {"tokens": routing.tokens, "copy_us": 1e6 * copy_s, "compute_us": 1e6 * compute_s}
    for name, seconds in taken.items():
        is_best = name != "serial" and seconds == min(s for n, s in taken.items() if n != "serial")
        target = Target(1.10) if is_best else None
        text = f"{name}, {what}, over the longer of copy and compute"
        rows.add(text, seconds / limit, "x", goal="G7" if is_best else "", target=target, us=1e6 * seconds, **shared)
    if "behind epochs" in taken and "serial" in taken:
        ratio = taken["serial"] / taken["behind epochs"]
        target = Target(1.7, at_most=False) if what == "0 % resident" else None
        rows.add(f"serial over epochs, {what}", ratio, "x", goal="G7" if target else "", target=target)
    if "behind epochs" in taken and "behind events" in taken:
        ratio = taken["behind events"] / taken["behind epochs"]
        target = Target(1.05, at_most=False) if what == "0 % resident" else None
        rows.add(f"events over epochs, {what}", ratio, "x", goal="G7" if target else "", target=target)
    rows.add(f"bytes that came, {what}", len(arriving) * expert_bytes(bank) / 1e6, "MB")
