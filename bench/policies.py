"""Cache policies over traces of expert routing, side by side, with the bound beside them: the table, in Markdown.

    python bench/policies.py trace.safetensors other.jsonl --json policies.json
    python bench/policies.py gpt-oss.npz:32 --capacities 25%,50% --policies lru,ema,sieve

A trace is moert's own or any file that `moert trace import` reads; where that does not say a layer's experts, `:N`
behind its name does. Each layer has a cache; the last column is one LRU cache for all layers, with as many slots
in all. Sequences that a file marks as a model repeating itself are left out.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from moert.errors import MoertError
from moert.policies import split_policies
from moert.simulate import Result, sweep
from moert.trace import Trace, TraceFile, TraceHeader, TraceLike
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer, recognise
from moert.trace.layout import VERSION_KEY

CAPACITIES = "12.5%,25%,50%"
POLICIES = "lru,fifo,random,least_stale,sieve,s3fifo,slru,arc,wtinylfu,lfu,lfru,mrs,ema"
TIE_POINTS = 0.05
"""Hit rates that are no further apart, as they are printed."""


@dataclass(frozen=True)
class Named:
    """A trace and what it is called in the table."""

    trace: TraceLike
    name: str


def open_trace(text: str) -> Named:
    """The trace at `PATH` or `PATH:EXPERTS`; one of another program is read into memory. Blocks."""
    name, _, experts = text.rpartition(":")
    path, n_experts = (Path(name), int(experts)) if name and experts.isdigit() else (Path(text), None)
    with open(path, "rb") as file:
        is_ours = VERSION_KEY.encode() in file.read(1 << 16)
    if is_ours:
        trace: TraceLike = TraceFile(path)
    else:
        header, sequences = load_importer(recognise(path)).read(
            path, ImportOptions(experts=n_experts, keep_repetition=False)
        )
        trace = Trace(header, list(sequences))
    return Named(trace, path.name.partition(".")[0])


def about(header: TraceHeader, tokens: int) -> str:
    """A trace's shape."""
    first = header.layers[0]
    return f"{len(header.layers)} x {first.num_experts}, top-{header.top_k}, {tokens:,} tokens"


def markdown(results: list[Result], policies: list[str], shapes: dict[str, str]) -> str:
    """The table: hit rates in percent, the best policy's in bold."""
    heads = ["trace", "experts cached", "MIN", *policies, "lru, one cache"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for cell in cells_of(results):
        live = {name: 100 * result.hit_rate for name, result in cell["layer"].items()}
        best = max(live.values())
        shown = [f"**{rate:.1f}**" if best - rate < TIE_POINTS else f"{rate:.1f}" for rate in live.values()]
        one = cell["layer"][policies[0]]
        label = f"{cell['trace']} ({shapes[cell['trace']]})"
        lines.append(
            f"| {label} | {cell['capacity']} | {100 * (1 - one.min_misses / one.accesses):.1f} | "
            f"{' | '.join(shown)} | {100 * cell['global'].hit_rate:.1f} |"
        )
    return "\n".join(lines)


def kept(result: Result) -> dict[str, Any]:
    """What is written of a result."""
    about = ["trace", "policy", "scope", "capacity", "capacity_experts"]
    numbers = ["accesses", "hits", "hit_rate_low", "hit_rate_high", "min_misses"]
    row = result.row(interval=True)
    return {name: round(row[name], 5) if isinstance(row[name], float) else row[name] for name in about + numbers}


def cells_of(results: list[Result]) -> list[dict[str, Any]]:
    """Results by trace and capacity: those of caches by layer by policy, and global LRU's."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        cell = found.setdefault(
            (result.trace, result.capacity), {"trace": result.trace, "capacity": result.capacity, "layer": {}}
        )
        if result.scope == "global":
            cell["global"] = result
        else:
            cell["layer"][result.policy] = result
    return list(found.values())


def summary(results: list[Result], policies: list[str]) -> dict[str, Any]:
    """How EMA stands against LRU, and how often each policy is the best or equal to it."""
    cells = cells_of(results)
    best = dict.fromkeys(policies, 0)
    for cell in cells:
        rates = {name: 100 * result.hit_rate for name, result in cell["layer"].items()}
        for name, rate in rates.items():
            best[name] += max(rates.values()) - rate < TIE_POINTS
    found: dict[str, Any] = {"cells": len(cells), "best_or_tied": best}
    if {"lru", "ema"} <= set(policies):
        gains = [100 * (cell["layer"]["ema"].hit_rate - cell["layer"]["lru"].hit_rate) for cell in cells]
        # Where a cache holds no more than one token needs there is nothing to decide, and all policies are equal.
        chosen = [gain for cell, gain in zip(cells, gains, strict=True) if cell["layer"]["lru"].gap_misses]
        found["ema_over_lru"] = {
            "median_points": statistics.median(gains),
            "cells_with_a_choice": len(chosen),
            "median_points_with_a_choice": statistics.median(chosen) if chosen else None,
            "least_points": min(gains),
            "worse": [
                {"trace": cell["trace"], "capacity": cell["capacity"], "points": gain}
                for cell, gain in zip(cells, gains, strict=True)
                if gain < 0
            ],
        }
    return found


def main(
    traces: Annotated[list[str], typer.Argument(help="Trace files; PATH:EXPERTS where a file does not say.")],
    policies: Annotated[str, typer.Option(help="Policies of the caches by layer.")] = POLICIES,
    capacities: Annotated[str, typer.Option(help="Shares of each layer's experts, or numbers.")] = CAPACITIES,
    reset: Annotated[str, typer.Option(help="never: caches stay warm; sequence: each begins cold.")] = "never",
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything there.")] = None,
) -> None:
    """Replay every trace with every policy, and print the table."""
    console = Console(stderr=True)
    names, sizes = split_policies(policies), capacities.split(",")
    results: list[Result] = []
    shapes: dict[str, str] = {}
    options: dict[str, Any] = {"reset": reset, "n_jobs": jobs}
    failed: MoertError | None = None
    try:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(traces))
            for text in traces:
                progress.update(bar, description=text)
                one = open_trace(text)
                found = sweep([one.trace], names, sizes, **options)
                found += sweep([one.trace], ["lru"], sizes, scopes=["global"], bounds=False, **options)
                results += [replace(result, trace=one.name) for result in found]
                shapes[one.name] = about(one.trace.header, one.trace.n_tokens)
                progress.advance(bar)
    except MoertError as error:
        failed = error
    if results:
        show(results, names, shapes, json_path)
    if failed is not None:
        console.print(str(failed), style="red")
        raise typer.Exit(2)


def show(results: list[Result], names: list[str], shapes: dict[str, str], json_path: Path | None) -> None:
    """Print the table, and write everything to `json_path`."""
    told = summary(results, names)
    print(markdown(results, names, shapes))
    print(f"\n{json.dumps(told)}")
    if json_path is not None:
        document = {
            "command": shlex.join(["bench/policies.py", *(Path(part).name for part in sys.argv[1:])]),
            "moert": metadata.version("moert"),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "traces": shapes,
            "summary": told,
        }
        rows = ",\n  ".join(json.dumps(kept(result)) for result in results)
        json_path.write_text(f'{json.dumps(document, indent=1)[:-2]},\n "results": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    typer.run(main)
