"""Simulated time against a live run, with prediction of experts and without.

    python bench/make_checkpoint.py olmoe-bench-32 /data/olmoe-bench-32
    moert trace import gpt-oss-20b_mmlu_pro_test.npz --experts 32 -o routing.safetensors
    python bench/forecast_predictions.py /data/olmoe-bench-32 --trace routing.safetensors --json out.json

The tokens choose what the trace says (`moert.follow`). `known` is a predictor that has read the trace, and is wrong as
often as it is told to be: it stands for one that is as good. All ways are loaded at once and take turns, a block of
tokens each, so that a disk that changes its speed does so for all; the checkpoint is calibrated once before and once
after (`--short`: once in between), and the simulation is done for each, whose mean counts. What is compared is a
token's median time over the blocks, what is hit, and what each way gains over the one without prediction. The first 128
tokens come before any trial leaves reads ahead of time off, live and simulated.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from look_ahead_live import Way, routing
from report import machine
from rich.console import Console
from rich.table import Table
from start import start_with

import moert
from moert.calibration.result import Calibration, from_dict
from moert.hf.calibrating import calibrate
from moert.hf.text import hush
from moert.predictors.base import Model
from moert.predictors.oracle import Oracle
from moert.runtime.simulated import simulate_live
from moert.simulate.timed import Timed
from moert.torch_threads import wanted_settings
from moert.trace import Phase, Trace

PROMPT_TOKENS = 8


class Known(Oracle):
    """Knows what a followed trace will choose."""

    needs = frozenset()

    def __init__(self, model: Model, trace: str = "", tokens: int = 0, accuracy: float = 1.0) -> None:
        """`tokens` of a trace file, as `routing` has them."""
        super().__init__(model, accuracy=accuracy)
        self._known = routing(Path(trace), tokens).sequences[0].experts

    def begin_sequence(self) -> None:
        super().begin_sequence()
        self.foresee(self._known)


def ways_of(trace: Path, tokens: int) -> dict[str, dict[str, Any]]:
    """Name -> options."""
    known = f"forecast_predictions:Known,trace={trace},tokens={tokens}"
    return {
        "none": {"predictor": "none"},
        "joint": {"predictor": "joint"},
        "known": {"predictor": known},
        "known, 70 % right": {"predictor": f"{known},accuracy=0.7"},
    }


def as_run(followed: Trace, layers: int, warm_up: int) -> Trace:
    """The passes of a live run: the prompt's, then one token each, those after the warm-up to be counted."""
    one = followed.sequences[0]
    n = len(one.steps)
    steps = np.maximum(0, np.arange(n) - (PROMPT_TOKENS - 1))
    phases = np.where(np.arange(n) < PROMPT_TOKENS + warm_up, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    header = replace(followed.header, layers=followed.header.layers[:layers])
    return Trace(header, [replace(one, experts=one.experts[:, :layers], steps=steps, phases=phases)])


def simulated(run: Trace, found: Calibration, host_memory: str, options: dict[str, Any]) -> Timed:
    """The same in simulated time."""
    predictor = options["predictor"]
    layers = len(run.header.layers)
    return simulate_live(
        run,
        "ema",
        host_memory,
        found.costs(),
        layer_s=(found.dense_s(1) + found.steps_s(1)) / layers,
        predictor=None if predictor == "none" else predictor,
        expert_bytes=found.shape.slot_bytes,
    )


def measured(way: Way, block: int) -> dict[str, Any]:
    """What a way has done, live."""
    stats = moert.stats(way.model)
    tokens = block * len(way.seconds)
    return {
        "way": way.name,
        "live_ms_per_token": 1e3 * statistics.median(way.seconds) / block,
        "live_hit_rate": stats.hits / (stats.hits + stats.misses),
        "live_forwarded_per_token": sum(layer.forwarded for layer in stats.layers) / tokens,
        "live_bytes_per_token": stats.bytes_read / tokens,
        "live_waited_ms_per_token": 1e3 * stats.stall_s / tokens,
        "live_disk_ms_per_token": 1e3 * stats.read_s / tokens,
        "live_block_ms_per_token": [1e3 * s / block for s in way.seconds],
    }


def compared(live: dict[str, Any], timed: list[Timed]) -> dict[str, Any]:
    """That beside a simulation for each calibration."""
    each_ms = [1e3 * one.seconds_per_token for one in timed]
    return {
        **live,
        "simulated_ms_per_token": mean(each_ms),
        "simulated_each_ms_per_token": each_ms,
        "error": mean(each_ms) / live["live_ms_per_token"] - 1,
        "simulated_hit_rate": mean(one.hit_rate for one in timed),
        "simulated_forwarded_per_token": mean(one.forwarded / one.tokens for one in timed),
        "simulated_reads_per_token": mean((one.fetched - one.forwarded + one.read_ahead) / one.tokens for one in timed),
        "simulated_disk_ms_per_token": mean(1e3 * one.link_s / one.tokens for one in timed),
        "simulated_predict_ms_per_token": mean(1e3 * one.predict_s / one.tokens for one in timed),
    }


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def run_live(
    checkpoint: Path, trace: Path, host_memory: str, tokens: int, warm_up: int, block: int, *, is_short: bool
) -> tuple[list[Calibration], list[dict[str, Any]]]:
    """Calibrations before and after all ways have run, or in between, and what these did."""
    total = PROMPT_TOKENS + warm_up + tokens
    followed = routing(trace, total)
    found = [] if is_short else [calibrate(checkpoint, repeats=False)]
    with contextlib.ExitStack() as stack:
        ways = []
        for name, options in ways_of(trace, total).items():
            way = Way(name, checkpoint, host_memory, options)
            stack.callback(moert.close, way.model)
            stack.enter_context(moert.follow(way.model, followed))
            ways.append(way)
        stack.enter_context(torch.inference_mode())
        for way in ways:
            way.begin(torch.arange(PROMPT_TOKENS)[None])
            way.run(warm_up)
            moert.reset_stats(way.model)
        rounds = tokens // block
        for number in range(rounds):
            if number == rounds // 2 and is_short:
                found.append(calibrate(checkpoint, repeats=False))
            for way in random.Random(number).sample(ways, len(ways)):
                way.seconds.append(way.run(block))
        if not is_short:
            found.append(calibrate(checkpoint, repeats=False))
        return found, [measured(way, block) for way in ways]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a safetensors checkpoint of an MoE model.")],
    trace: Annotated[Path, typer.Option(help="A trace to follow.")],
    host_memory: Annotated[str, typer.Option(help="Of each way.")] = "25%",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that count, of each way.")] = 96,
    warm_up: Annotated[int, typer.Option(min=1, help="Tokens before them.")] = 24,
    short: Annotated[bool, typer.Option("--short", help="Calibrate once only.")] = False,
    block: Annotated[int, typer.Option(min=1, help="Tokens at a turn.")] = 16,
    again: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure nothing: simulate what such a file has measured.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write everything there.")] = None,
) -> None:
    """Compare simulated times with live ones."""
    if tokens % block:
        raise typer.BadParameter(f"{tokens} tokens are no whole number of turns of {block}")
    console = Console()
    hush(bars=True)
    if again is None:
        found, live = run_live(checkpoint, trace, host_memory, tokens, warm_up, block, is_short=short)
        about = machine()
    else:
        document = json.loads(again.read_text())
        found = [from_dict(one) for one in document["calibrations"]]
        live, about = document["results"], document["machine"]
        host_memory, tokens, warm_up, block = (document[n] for n in ("host_memory", "tokens", "warm_up", "block"))
    total = PROMPT_TOKENS + warm_up + tokens
    run = as_run(routing(trace, total), found[0].shape.num_layers, warm_up)
    ways = ways_of(trace, total)
    rows = [compared(one, [simulated(run, each, host_memory, ways[one["way"]]) for each in found]) for one in live]
    for row in rows:
        for kind in ("live", "simulated"):
            row[f"{kind}_gain"] = rows[0][f"{kind}_ms_per_token"] / row[f"{kind}_ms_per_token"]
    console.width = max(console.width, 120)
    table = Table(
        *("", "live", "simulated", "off by", "gain live", "simulated", "hits live", "simulated", "on the way live"),
        "simulated",
        title="ms",
    )
    for one in rows:
        each = ", ".join(f"{ms:.1f}" for ms in one["simulated_each_ms_per_token"])
        table.add_row(
            one["way"],
            f"{one['live_ms_per_token']:.1f}",
            f"{one['simulated_ms_per_token']:.1f} ({each})",
            f"{one['error']:+.1%}",
            f"{one['live_gain']:.3f}x",
            f"{one['simulated_gain']:.3f}x",
            f"{one['live_hit_rate']:.1%}",
            f"{one['simulated_hit_rate']:.1%}",
            f"{one['live_forwarded_per_token']:.2f}",
            f"{one['simulated_forwarded_per_token']:.2f}",
        )
    console.print(table)
    if json_path is not None:
        document = {
            "command": " ".join(Path(part).name if Path(part).exists() else part for part in sys.argv),
            "machine": about,
            "host_memory": host_memory,
            "tokens": tokens,
            "warm_up": warm_up,
            "block": block,
            "calibrations": [one.as_dict() for one in found],
            "ways": ways_of(Path(trace.name), total),
            "results": rows,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
