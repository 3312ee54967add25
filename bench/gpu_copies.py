"""G6 and G8: rows brought over the link by the copy engine and by a kernel, and the planner that says which."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gpu_layers import Setting
from gpu_results import Rows, Target
from gpu_timing import elapsed, race

from moert.kernels.copy_rows import copy_rows, row_table
from moert.kernels.plan_ema import new_ema, plan_ema
from moert.kernels.plan_lru import new_lru, plan_lru

ROWS = 16


def run(setting: Setting, rows: Rows, peaks: Mapping[str, float]) -> None:
    shape = setting.shape
    # A bf16 expert as one row, and one of 4 bits.
    for name, row_bytes in (
        ("9 MiB", 6 * shape.hidden * shape.width),
        ("2.4 MiB", 3 * shape.hidden * shape.width // 2),
    ):
        _rates(setting, rows, peaks, name, row_bytes)
    _planner(setting, rows)


def _rates(setting: Setting, rows: Rows, peaks: Mapping[str, float], name: str, row_bytes: int) -> None:
    device = setting.device
    source = torch.randint(0, 99, (2 * ROWS, row_bytes // 4), dtype=torch.int32)
    source = source if setting.is_dry else source.pin_memory()
    target = torch.zeros(ROWS, row_bytes // 4, dtype=torch.int32, device=device)
    places = torch.randperm(2 * ROWS)[:ROWS]
    chosen = places.tolist()
    sources = places.to(device, torch.int32)
    destinations = torch.arange(ROWS, dtype=torch.int32, device=device)
    count = torch.full((1,), ROWS, dtype=torch.int32, device=device)
    table = row_table([(source, target)], device)
    peak = peaks.get("host_to_device")

    def engine() -> None:
        for row, place in enumerate(chosen):
            target[row].copy_(source[place], non_blocking=True)

    def add(what: str, seconds: float, goal: str, least: float, **more: object) -> None:
        rate = ROWS * row_bytes / seconds / 1e9
        aim = Target(least * peak, at_most=False) if goal and peak else None
        rows.add(what, rate, "GB/s", goal=goal, target=aim, share_of_peak=rate / peak if peak else None, **more)

    add(f"copy engine, rows of {name}", elapsed(engine, device).median, "G6", 0.95)
    for programs in setting.of((1, 2, 4, 8, 16, 32), (2,)):
        target.zero_()
        copy_rows(table, sources, destinations, count, programs=programs)
        if not torch.equal(target.cpu(), source[places]):
            rows.add(f"copy_rows, {programs} programs, rows of {name}", None, "GB/s", wrong=True)
            continue
        job = [lambda programs=programs: copy_rows(table, sources, destinations, count, programs=programs)]  # type: ignore[misc]
        taken = race({"copy_rows": job}, device, rounds=5)["copy_rows"]
        goal = "G6" if programs == 8 else ""
        what = f"copy_rows, {programs} programs, rows of {name}"
        add(what, taken.median, goal, 0.9, programs=programs, row=name, how=taken.how)


def _planner(setting: Setting, rows: Rows) -> None:
    experts, slots, tokens, top_k = (8192, 4096, 8, 8) if not setting.is_dry else (64, 32, 4, 2)
    for name, plan, state in (
        ("plan_lru", plan_lru, new_lru(experts, slots, setting.device)),
        ("plan_ema", plan_ema, new_ema(experts, slots, setting.device)),
    ):
        everyone = torch.randperm(experts, device=setting.device)
        for begin in range(0, slots, 512):
            plan(state, everyone[begin : min(begin + 512, slots)].view(1, -1))  # type: ignore[operator]
        for what, pool in (("all resident", everyone[:slots]), ("half of them misses", everyone)):
            events = [pool[torch.randint(0, pool.numel(), (tokens, top_k), device=setting.device)] for _ in range(16)]
            calls = [lambda ids=ids, plan=plan, state=state: plan(state, ids) for ids in events]  # type: ignore[misc]
            taken = race({name: calls}, setting.device)[name]
            hits = what == "all resident"
            goal = "G8" if hits and name == "plan_lru" else ""
            text = f"{name}, {tokens * top_k} picks, {slots} slots, {what}"
            rows.add(text, taken.us, "us", goal=goal, target=Target(6) if goal else None, how=taken.how)
