"""Simulated time against a live run, with prediction of experts and without.

    python bench/make_checkpoint.py olmoe-bench-32 /data/olmoe-bench-32
    moert trace import gpt-oss-20b_mmlu_pro_test.npz --experts 32 -o routing.safetensors
    python bench/forecast_predictions.py /data/olmoe-bench-32 --trace routing.safetensors --json out.json

The tokens choose what the trace says (`moert.follow`). `known` is a predictor that has read the trace, and is wrong as
often as it is told to be: it stands for one that is as good. All ways are loaded at once and take turns, a block of
tokens each, so that a disk that changes its speed does so for all; the checkpoint is calibrated before and after, and
the simulation is done for both, whose mean counts. What is compared is a token's median time over the blocks, and what
is hit.
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

import moert
from moert.calibration import Calibration
from moert.hf.calibrating import calibrate
from moert.hf.text import hush
from moert.predictors.base import Model
from moert.predictors.oracle import Oracle
from moert.runtime.simulated import simulate_live
from moert.simulate.timed import Timed
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


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def row(way: Way, timed: list[Timed], block: int) -> dict[str, Any]:
    """Of one way, with a simulation for each calibration."""
    stats = moert.stats(way.model)
    tokens = block * len(way.seconds)
    live_ms = 1e3 * statistics.median(way.seconds) / block
    each_ms = [1e3 * one.seconds_per_token for one in timed]
    return {
        "way": way.name,
        "options": way.options,
        "live_ms_per_token": live_ms,
        "simulated_ms_per_token": mean(each_ms),
        "simulated_each_ms_per_token": each_ms,
        "error": mean(each_ms) / live_ms - 1,
        "live_hit_rate": stats.hits / (stats.hits + stats.misses),
        "simulated_hit_rate": mean(one.hit_rate for one in timed),
        "live_forwarded_per_token": sum(layer.forwarded for layer in stats.layers) / tokens,
        "simulated_forwarded_per_token": mean(one.forwarded / one.tokens for one in timed),
        "live_bytes_per_token": stats.bytes_read / tokens,
        "simulated_predict_ms_per_token": mean(1e3 * one.predict_s / one.tokens for one in timed),
        "live_block_ms_per_token": [1e3 * s / block for s in way.seconds],
    }


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a safetensors checkpoint of an MoE model.")],
    trace: Annotated[Path, typer.Option(help="A trace to follow.")],
    host_memory: Annotated[str, typer.Option(help="Of each way.")] = "25%",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that count, of each way.")] = 96,
    warm_up: Annotated[int, typer.Option(min=1, help="Tokens before them.")] = 160,
    block: Annotated[int, typer.Option(min=1, help="Tokens at a turn.")] = 16,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write everything there.")] = None,
) -> None:
    """Compare simulated times with live ones."""
    console = Console()
    hush(bars=True)
    total = PROMPT_TOKENS + warm_up + tokens
    followed = routing(trace, total)
    found = [calibrate(checkpoint)]
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
        for number in range(tokens // block):
            for way in random.Random(number).sample(ways, len(ways)):
                way.seconds.append(way.run(block))
        found.append(calibrate(checkpoint))
        layers = len(moert.stats(ways[0].model).layers)
        run = as_run(followed, layers, warm_up)
        rows = [row(way, [simulated(run, one, host_memory, way.options) for one in found], block) for way in ways]
    console.width = max(console.width, 120)
    table = Table(
        "", "live", "simulated", "off by", "hits live", "simulated", "on the way live", "simulated", title="ms"
    )
    for one in rows:
        each = ", ".join(f"{ms:.1f}" for ms in one["simulated_each_ms_per_token"])
        table.add_row(
            one["way"],
            f"{one['live_ms_per_token']:.1f}",
            f"{one['simulated_ms_per_token']:.1f} ({each})",
            f"{one['error']:+.1%}",
            f"{one['live_hit_rate']:.1%}",
            f"{one['simulated_hit_rate']:.1%}",
            f"{one['live_forwarded_per_token']:.2f}",
            f"{one['simulated_forwarded_per_token']:.2f}",
        )
    console.print(table)
    if json_path is not None:
        document = {
            "command": " ".join(Path(part).name if Path(part).exists() else part for part in sys.argv),
            "machine": machine(),
            "host_memory": host_memory,
            "tokens": tokens,
            "warm_up": warm_up,
            "block": block,
            "calibrations": [one.as_dict() for one in found],
            "results": rows,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
