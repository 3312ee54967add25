"""A search for the tables of block sizes; gpu_tables.py puts what it finds into them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from gpu_layers import FORMATS, Routing, Setting, make_bank, make_routing
from gpu_results import Rows
from gpu_tables import WORTH_IT, Config
from gpu_timing import Call, race

from moert.kernels._samples import sample_banks, sample_step
from moert.kernels.bank import Bank
from moert.kernels.configs import DecodeConfig, decode_config, decode_kind
from moert.kernels.decode_down import _launch as decode_down
from moert.kernels.decode_gate_up import _launch as decode_gate_up
from moert.kernels.dispatch import dispatch
from moert.kernels.grouped_configs import GroupedConfig, grouped_config, grouped_kind, sample_blocks
from moert.kernels.grouped_down import _launch as grouped_down
from moert.kernels.grouped_gate_up import _launch as grouped_gate_up
from moert.kernels.grouped_gate_up import runs_on

DIFFERENT = 2e-2
"""Results with other block sizes differ by rounding alone."""


@dataclass(frozen=True)
class Search:
    """The candidates for one entry of a table."""

    kernel: str
    choice: str
    block_m: int
    """0 for the decode kernels."""
    module: str
    """Of `moert.kernels`, with the table."""
    keys: tuple[Any, ...]
    """Of the entry, from the outermost table on."""
    candidates: tuple[Config, ...]
    """The entry's own comes first."""

    @property
    def label(self) -> str:
        return f"{self.kernel}, {self.choice}" + (f", blocks of {self.block_m}" if self.block_m else "")


def searches(setting: Setting) -> Iterator[Search]:
    """What matters most comes first: time may end before they do."""
    capability = runs_on(setting.device)
    gate_up = [
        DecodeConfig(n, k, 1, warps) for n, k, warps in itertools.product((4, 8, 16), (256, 512, 1024), (2, 4, 8))
    ]
    down = [
        DecodeConfig(n, k, picks, 4) for n, k, picks in itertools.product((2, 4, 8, 16), (128, 256, 512), (2, 4, 8))
    ]
    few = FORMATS if not setting.is_dry else ("bf16",)
    for choice in few:
        matrix = sample_banks()[choice]
        for kernel, configs, of in (
            ("decode_gate_up", gate_up, matrix.up),
            ("decode_down", down, matrix.down),
        ):
            table = decode_config(kernel, of, capability)
            keys = ((kernel, decode_kind(of)), capability)
            yield Search(kernel, choice, 0, "configs", keys, _cut([table, *configs], setting))
    for choice, block_m in (("bf16", 128), ("bf16", 64), ("bf16", 16), ("int4", 128), ("mxfp4", 128), ("bf16", 32)):
        if setting.is_dry and (choice, block_m) != ("bf16", 16):
            continue
        tiles = itertools.product(
            (64, 128, 256), (32, 64, 128), (4, 8), (3, 4), (False, True) if block_m < 64 else (False,)
        )
        grouped = [
            GroupedConfig(n, k, swapped, warps, stages) for n, k, warps, stages, swapped in tiles if n * k <= 16384
        ]
        for kernel, name in (("grouped_gate_up", "gate_up"), ("grouped_down", "down")):
            matrix = sample_banks()[choice]
            of = matrix.up if name == "gate_up" else matrix.down
            table = grouped_config(name, of, block_m, torch.bfloat16, capability)
            keys = ((name, grouped_kind(of, torch.bfloat16)), block_m, capability)
            yield Search(kernel, choice, block_m, "grouped_configs", keys, _cut([table, *grouped], setting))


def _cut(configs: Sequence[Config], setting: Setting) -> tuple[Config, ...]:
    """Each once, that of the table first."""
    different = tuple({replace(config, origin="compiled"): None for config in configs})
    return different[:2] if setting.is_dry else different


def compile_ahead(search: Search, config: Config) -> bool:
    """In a process of its own: compile what a launch with this will want, into triton's cache on disk."""
    from kernel_check import AbsentDriver
    from triton.runtime import driver

    AbsentDriver.device = int(os.environ["MOERT_CAPABILITY"])
    driver.set_active(AbsentDriver())
    bank = sample_banks()[search.choice]
    try:
        launch = _launch(search, bank, None, config)
        launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    except Exception:  # whatever a compiler raises: the search meets it again
        return False
    return True


def _launch(search: Search, bank: Bank, routing: Routing | None, config: Any) -> Any:
    """Of real tensors, or without a routing of "meta" ones in the same sizes."""
    if search.block_m:
        if routing is None:
            blocks = sample_blocks(search.block_m)
            x = torch.empty(blocks.tokens, bank.hidden, dtype=torch.bfloat16, device="meta")
            weights = torch.empty(blocks.tokens, blocks.top_k, device="meta")
        else:
            slot_of = torch.arange(bank.slots, dtype=torch.int32, device=bank.device)
            blocks = dispatch(routing.ids, routing.weights, slot_of, bank.slots, search.block_m)
            x, weights = routing.x, routing.weights
        if search.kernel == "grouped_gate_up":
            return grouped_gate_up(bank, x, blocks, config=config)[0]
        h = _like_h(bank, x, blocks.tokens * blocks.top_k)
        return grouped_down(bank, h, weights, blocks, config=config)[0]
    if routing is None:
        x, ids, weights, slot_of = sample_step(bank, tokens=1)
    else:
        slot_of = torch.arange(bank.slots, dtype=torch.int32, device=bank.device)
        x, ids, weights = routing.x, routing.ids, routing.weights
    if search.kernel == "decode_gate_up":
        return decode_gate_up(bank, x, ids, weights, slot_of, config=config)[0]
    h = _like_h(bank, x, ids.numel()).float()
    return decode_down(bank, h, ids, weights, slot_of, torch.bfloat16, config=config)[0]


def _like_h(bank: Bank, x: torch.Tensor, rows: int) -> torch.Tensor:
    shape = (rows, bank.width)
    if x.device.type == "meta":
        return torch.empty(shape, dtype=x.dtype, device="meta")
    return torch.randn(shape, dtype=x.dtype, device=x.device, generator=torch.Generator(x.device).manual_seed(1))


def run(setting: Setting, rows: Rows, until: float) -> None:
    """Until `time.monotonic()` is `until`."""
    todo = list(searches(setting))
    pool = None
    if not setting.is_dry:
        os.environ["MOERT_CAPABILITY"] = str(runs_on(setting.device))
        pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
        compiling = [[pool.submit(compile_ahead, one, config) for config in one.candidates] for one in todo]
    banks: dict[str, Bank] = {}
    for number, search in enumerate(todo):
        if time.monotonic() > until:
            rows.add(f"{search.label}: no time left for it", None, "us")
            continue
        if pool is not None:
            for job in compiling[number]:
                job.result()
        bank = banks.get(search.choice)
        if bank is None:
            banks.clear()
            bank = banks[search.choice] = make_bank(search.choice, setting)
        _search(setting, rows, search, bank)
    if pool is not None:
        pool.shutdown(cancel_futures=True)


def _search(setting: Setting, rows: Rows, search: Search, bank: Bank) -> None:
    per_expert = search.block_m // 2
    tokens = max(1, per_expert * setting.shape.experts // setting.shape.top_k)
    if setting.is_dry:
        tokens = min(tokens, 8)
    routings = [make_routing(setting, tokens) for _ in range(1 if setting.is_dry or search.block_m else 16)]
    calls: dict[str, list[Call]] = {}
    configs = {_text(config): config for config in search.candidates}
    wanted: torch.Tensor | None = None
    for config in search.candidates:
        launches = [_launch(search, bank, routing, config) for routing in routings]
        try:
            got = _output(launches[0], setting)
        except Exception as problem:  # too much shared memory, say: of a GPU only the driver knows all that it refuses
            if config is search.candidates[0]:
                rows.add(
                    f"{search.label}: the table's own cannot run", None, "us", error=str(problem)[:120], wrong=True
                )
            continue
        wanted = got if wanted is None else wanted
        if not (got - wanted).norm() <= DIFFERENT * wanted.norm():
            rows.add(f"{search.label}: {config} computes something else", None, "us", wrong=True)
            continue
        calls[_text(config)] = [_runner(launch, setting) for launch in launches]
    taken = race(calls, setting.device, rounds=3, may_fail=calls)
    if not taken:
        return
    best = min(taken, key=lambda name: taken[name].median)
    own = _text(search.candidates[0])
    gain = taken[own].median / taken[best].median if own in taken else None
    rows.add(
        f"{search.label}: the best of {len(taken)}",
        taken[best].us,
        "us",
        goal="sweep" if gain is None or gain > WORTH_IT else "",
        config=best,
        table=own,
        gain=gain,
        entry={"module": search.module, "keys": search.keys},
        own=_values(search.candidates[0]),
        candidates=[{"config": _values(configs[name]), "us": time.us} for name, time in taken.items()],
    )


def _runner(launch: Any, setting: Setting) -> Callable[[], object]:
    return lambda: launch.run(setting.device)


def _output(launch: Any, setting: Setting) -> torch.Tensor:
    name = "y_ptr" if "y_ptr" in launch.arguments else "h_ptr"
    launch.arguments[name].zero_()
    launch.run(setting.device)
    if not setting.is_dry:
        torch.cuda.synchronize()
    out: torch.Tensor = launch.arguments[name].float()
    return out


def _values(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "origin"}


def _text(config: Config) -> str:
    return ", ".join(f"{name}={value}" for name, value in _values(config).items())
