"""What a policy, prefetches and eviction that sees ahead gain in decoding from disk, each part on and off.

    python bench/make_checkpoint.py olmoe-bench-32 /data/olmoe-bench-32
    moert trace import gpt-oss-20b_mmlu_pro_test.npz --experts 32 -o routing.safetensors
    python bench/look_ahead_live.py /data/olmoe-bench-32 --trace routing.safetensors --json live.json
    python bench/look_ahead_live.py moert/data/demo
    python bench/look_ahead_live.py moert/data/demo --disk 100

With a trace, tokens choose the experts that it says (`moert.follow`): random weights have no routing worth predicting.
Without one, the model's own routers decide. All ways are loaded at once, in one process, and take turns, a block of
tokens each, in another order each time, so that a disk that changes its speed does so for all. The tokens before those
that count are as many as it may take to find out whether reads ahead of time gain. Experts are read past the page
cache, with `--disk` no faster than it says (as root, by a cgroup), for a disk that is slow beside a small model. Each
way's tokens must be those of the first. A gain is of tokens a second over all that count, against the first way; beside
it the median over blocks, each against that of the first way in the same round.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from checkpoint import read_checkpoint
from diskspeed import measure
from report import machine
from rich.console import Console
from rich.table import Table
from slow_disk import slow_disk
from start import start_with

import moert
from moert.torch_threads import wanted_settings
from moert.trace import Phase, Sequence, Trace, TraceFile

PROMPT = "The history of the city begins"


class Way:
    """A model with some parts on and others off, in the middle of a text."""

    def __init__(self, name: str, checkpoint: Path, host_memory: str, options: dict[str, Any]) -> None:
        self.name = name
        self.options = options
        self.model = moert.load(checkpoint, host_memory=host_memory, **options)
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self._cache: Any = None
        self._next = torch.zeros(1, 1, dtype=torch.int64)

    def begin(self, prompt: torch.Tensor) -> None:
        """Run the prompt."""
        output = self.model(prompt, use_cache=True)
        self._cache, self._next = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def run(self, tokens: int) -> float:
        """Decode; returns seconds."""
        begin = time.perf_counter()
        for _ in range(tokens):
            output = self.model(self._next, past_key_values=self._cache, use_cache=True)
            self.tokens.append(int(self._next))
            self._next = output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin


def ways_of(predictor: str) -> dict[str, dict[str, Any]]:
    """Name -> options."""
    return {
        "lru": {"policy": "lru", "predictor": "none"},
        "ema": {"policy": "ema", "predictor": "none"},
        "ema, prefetches": {"policy": "ema", "predictor": predictor},
        "ema_ahead": {"policy": "ema_ahead", "predictor": predictor, "prefetch": False},
        "ema_ahead, prefetches": {"policy": "ema_ahead", "predictor": predictor},
    }


def routing(path: Path, tokens: int) -> Trace:
    """The tokens of a trace's longest sequences as one sequence of so many, one pass each."""
    with TraceFile(path) as trace:
        parts: list[Sequence] = []
        for number in sorted(range(len(trace)), key=lambda number: -len(trace[number].steps)):
            parts.append(trace[number])
            if sum(len(part.steps) for part in parts) >= tokens:
                break
        experts = np.concatenate([part.experts for part in parts])[:tokens]
        one = Sequence(experts, np.arange(len(experts)), np.full(len(experts), Phase.DECODE, np.uint8))
        return Trace(replace(trace.header, source="moert"), [one])


def result(way: Way, first: Way, block: int) -> dict[str, Any]:
    """A row of the table."""
    stats = moert.stats(way.model)
    tokens = block * len(way.seconds)
    return {
        "way": way.name,
        "options": way.options,
        "ms_per_token": 1e3 * statistics.mean(way.seconds) / block,
        "gain": sum(first.seconds) / sum(way.seconds),
        "block_gain": statistics.median(one / own for one, own in zip(first.seconds, way.seconds, strict=True)),
        "hit_rate": stats.hits / (stats.hits + stats.misses),
        "bytes_per_token": stats.bytes_read / tokens,
        "stall_ms_per_token": 1e3 * stats.stall_s / tokens,
        "seconds": way.seconds,
    }


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a safetensors checkpoint of an MoE model.")],
    trace: Annotated[Path | None, typer.Option(help="A trace to follow; else the model's own routing.")] = None,
    host_memory: Annotated[str, typer.Option(help="Of each way.")] = "25%",
    predictor: Annotated[str, typer.Option(help="With a trace it must go by picks.")] = "joint",
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that count, of each way.")] = 384,
    warm_up: Annotated[int, typer.Option(min=1, help="Tokens before them.")] = 896,
    block: Annotated[int, typer.Option(min=1, help="Tokens at a turn.")] = 16,
    disk: Annotated[int | None, typer.Option(min=1, metavar="MB/S", help="Hold the disk to so many MB/s.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write everything there.")] = None,
) -> None:
    """Compare what gains in decoding from disk."""
    console = Console()
    console.print(f"{checkpoint}: {tokens} tokens after {warm_up}, {host_memory} of the experts in memory")
    record_bytes = read_checkpoint(checkpoint).record_bytes
    files = sorted(checkpoint.glob("*.safetensors"))
    with contextlib.ExitStack() as stack:
        if disk is not None:
            stack.enter_context(slow_disk(checkpoint, disk * 10**6))
        ways = []
        for name, options in ways_of(predictor).items():
            way = Way(name, checkpoint, host_memory, options)
            stack.callback(moert.close, way.model)
            ways.append(way)
        if trace is not None:
            followed = routing(trace, tokens + warm_up + 8)
            for way in ways:
                stack.enter_context(moert.follow(way.model, followed))
        if (checkpoint / "tokenizer.json").exists():
            from transformers import AutoTokenizer

            prompt = AutoTokenizer.from_pretrained(checkpoint)(PROMPT, return_tensors="pt").input_ids[:, :8]
        else:
            prompt = torch.arange(8)[None]
        stack.enter_context(torch.inference_mode())
        for way in ways:
            way.begin(prompt)
            way.run(warm_up)
            moert.reset_stats(way.model)
        rates = [measure(files, record_bytes, seconds=1.0).bytes_per_s]
        for number in range(max(1, tokens // block)):
            for way in random.Random(number).sample(ways, len(ways)):
                way.seconds.append(way.run(block))
        rates.append(measure(files, record_bytes, seconds=1.0).bytes_per_s)
        rows = [result(way, ways[0], block) for way in ways]
        different = [way.name for way in ways if way.tokens != ways[0].tokens]
    if different:
        console.print(f"other tokens than with {ways[0].name}: {', '.join(different)}", style="red")
        raise typer.Exit(1)
    table = Table("", "ms a token", "gain", "of blocks", "hits", "MB read a token", "ms of it waited")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['ms_per_token']:.1f}",
            f"{row['gain']:.3f}x",
            f"{row['block_gain']:.3f}x",
            f"{100 * row['hit_rate']:.1f} %",
            f"{row['bytes_per_token'] / 1e6:.1f}",
            f"{row['stall_ms_per_token']:.1f}",
        )
    console.print(table)
    console.print(f"the disk before and after: {', '.join(f'{one / 1e9:.2f}' for one in rates)} GB/s")
    if json_path is not None:
        document = {
            "command": " ".join(Path(part).name if Path(part).exists() else part for part in sys.argv),
            "machine": machine(),
            "host_memory": host_memory,
            "disk_bytes_per_s": rates,
            "disk_held_to_bytes_per_s": None if disk is None else disk * 10**6,
            "tokens": tokens,
            "warm_up": warm_up,
            "block": block,
            "results": rows,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
