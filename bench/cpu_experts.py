"""Expert layers on the CPU, side by side: moert, torch, transformers, kt-kernel, llama.cpp, and the machine's limits.

    python bench/cpu_experts.py --shapes olmoe --batches 1,64 --formats bf16,int4 --rounds 20 --json cpu.json
    python bench/cpu_experts.py --mask-isa avx512_vnni --systems moert,torch   # as on a CPU without bf16 and AMX
    python bench/cpu_experts.py --neighbour --shapes olmoe                     # decode beside a busy process

All run in one process and in turns, in another order each round, with the same number of threads; a turn starts when
the threads of the one before have come to rest. Weights lie in memory often enough that none is in a cache when its
turn comes. torch's threads spin for a quarter of a millisecond after an operation (GOMP_SPINCOUNT), for everybody,
unless the environment says otherwise. No time is given unless moert's output is right: before anything is timed, each
contender's output is compared with fp64. kt-kernel and llama.cpp take part when installed in the environment.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cpu_contest import MASKS, SYSTEMS, Contest, Parity, default_threads, masked_environment, refusals
from cpu_layers import FORMATS, SHAPES
from cpu_neighbour import neighbour_table
from cpu_report import about_machine, cell_table, plot
from rich.console import Console
from start import spinning_line, start_with

from moert.config import parse_budget
from moert.errors import ConfigError, MoertError
from moert.kernels import cpu
from moert.torch_threads import wanted_settings


def _chosen(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"--{option} {text!r}: choose from {', '.join(known)}")
    return names


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"--{option} {text!r} must be whole numbers from 1 on, with commas between")
    return numbers


def main(
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}, with commas between.")] = "olmoe",
    batches: Annotated[str, typer.Option(help="Tokens at once.")] = "1,16,64,256",
    formats: Annotated[str, typer.Option(help=f"Of {', '.join(FORMATS)}.")] = ",".join(FORMATS),
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(SYSTEMS)}.")] = ",".join(SYSTEMS),
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="For everyone; else one a core.")] = None,
    isas: Annotated[str, typer.Option(help="Instruction sets to run moert with besides its choice.")] = "",
    kt_workers: Annotated[str | None, typer.Option(help="kt-kernel's threads, one or more numbers.")] = None,
    working_set: Annotated[str, typer.Option(help="Bytes to go through before an expert comes again.")] = "2GB",
    mask_isa: Annotated[str | None, typer.Option(help=f"Do without what is newer: {', '.join(MASKS)}.")] = None,
    neighbour: Annotated[bool, typer.Option("--neighbour", help="Decode beside a busy core.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was measured there.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw it there; needs matplotlib.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, routing and order.")] = 0,
) -> None:
    """Compare implementations of MoE expert layers on this CPU."""
    console = Console()
    console.width = max(console.width, 110)
    try:
        if mask_isa is not None and mask_isa not in MASKS:
            raise ConfigError(f"--mask-isa {mask_isa!r}: choose from {', '.join(MASKS)}")
        start_with(masked_environment(mask_isa))
        if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plot needs matplotlib; install it, or leave --plot out")
        working_bytes = parse_budget(working_set, "working-set").nbytes
        if working_bytes is None:
            raise ConfigError(f"--working-set {working_set!r} must be a size, such as 2GB")
        chosen_shapes = _chosen(shapes, tuple(SHAPES), "shapes")
        chosen_formats = _chosen(formats, FORMATS, "formats")
        chosen_batches = [1] if neighbour else _numbers(batches, "batches")
        threads = threads or default_threads()
        chosen = _chosen(systems, SYSTEMS, "systems")
        absent = refusals(chosen)
        if len(absent) == len(chosen):
            raise ConfigError(f"none of {', '.join(chosen)} can run: {'; '.join(absent.values())}")
        torch.set_num_threads(threads)
        if "moert" in chosen and "moert" not in absent:
            cpu.set_threads(threads)
        contest = Contest(
            systems=[name for name in chosen if name not in absent],
            isas=[name for name in isas.split(",") if name],
            rounds=rounds,
            threads=threads,
            kt_workers=_numbers(kt_workers, "kt-workers") if kt_workers else [threads],
            working_bytes=working_bytes,
            draw=random.Random(seed),
            seed=seed,
        )
        cells: list[dict[str, Any]] = []
        with console.status("") as status, torch.inference_mode():
            for shape in chosen_shapes:
                cells += contest.run(shape, chosen_formats, chosen_batches, status.update, neighbour=neighbour)
    except MoertError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None

    console.print(spinning_line(), highlight=False)
    red = [f"{cell['shape']} {cell['format']} {cell['batch']}" for cell in cells if cell["parity"] != Parity.GREEN]
    for name, why in absent.items():
        console.print(f"{name} did not run: {why}", highlight=False)
    if red:
        console.print(f"[red]parity is red: {'; '.join(red)}; no time is given[/]", highlight=False)
        for cell in cells:
            for name, about in cell["contenders"].items():
                if about["gate"] is not None:
                    where = f"{cell['shape']} {cell['format']} {cell['batch']}"
                    console.print(
                        f"{where}: {name} {about['gate']:.2e}, allowed {about['allowed']:.0e}", highlight=False
                    )
    else:
        for cell in cells:
            show(console, cell, threads)
    if json_path is not None:
        kept = ("shape", "format", "batch", "parity", "contenders")
        content = {
            "command": shlex.join(sys.argv),
            "machine": about_machine(),
            "threads": threads,
            "rounds": rounds,
            "working_set_bytes": working_bytes,
            "mask_isa": mask_isa,
            "absent": absent,
            "parity": "red" if red else Parity.GREEN,
            # Times of wrong answers mean nothing, in a file no more than on the screen.
            "cells": [{key: cell[key] for key in kept} if red else cell for cell in cells],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if red:
        raise typer.Exit(1)
    if plot_path is not None and not neighbour:
        plot(cells, plot_path, f"{about_machine()['cpu']}, {threads} threads")


def show(console: Console, cell: dict[str, Any], threads: int) -> None:
    """Print one cell."""
    tokens = "one token" if cell["batch"] == 1 else f"{cell['batch']} tokens"
    title = f"{cell['shape']}, {cell['format']}, {tokens}, {threads} threads, {cell['rounds']} rounds"
    if "neighbour" in cell:
        console.print(neighbour_table(title, cell["neighbour"]))
        return
    console.print(cell_table(title, cell["rows"], cell["contenders"]))
    console.print(cell["limits_line"], highlight=False)
    for name, about in cell["contenders"].items():
        refused = f"; [red]{about['refused']}[/]" if about["refused"] else ""
        console.print(f"  {name}: {about['detail']}{refused}", highlight=False)


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
