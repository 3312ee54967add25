"""How fast a long prompt goes through a model that does not fit: the bytes it reads, and how much of the reading hides.

    python bench/prefill.py --prompt-tokens 2048 --host-memory 25% --rounds 3 --json prefill.json
    python bench/prefill.py /data/olmoe-bench --chunk 512

The model is loaded twice, with every expert in memory and with the budget. Both take turns at the same prompt, and the
disk is measured in each round, past the page cache. Reading takes at least the bytes read over that; computing takes
what the model takes that reads nothing; a pass cannot be faster than the slower of the two. torch's threads spin as
they do under moert's command line. The logits must be the same bit for bit, or no time is given.
"""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from architectures import configuration
from checkpoint import read_checkpoint
from cpu_report import about_machine
from diskspeed import measure
from make_checkpoint import write_checkpoint
from rich.console import Console
from rich.table import Table
from start import spinning_line, start_with

import moert
from moert.errors import MoertError
from moert.torch_threads import wanted_settings


@dataclass(frozen=True)
class Pass:
    """One prompt through one model."""

    seconds: float
    cpu_s: float
    bytes_read: int
    hits: int
    misses: int
    stall_s: float
    expert_s: float


def run_pass(model: Any, ids: torch.Tensor, chunk: int | None) -> tuple[Pass, torch.Tensor]:
    """The prompt `ids` [1, T], `chunk` tokens at a time or all at once; and the last position's logits. Blocks."""
    moert.reset_stats(model)
    cpu, begin = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        cache = None
        for part in ids.split(chunk or ids.shape[1], dim=1):
            out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    stats = moert.stats(model)
    return Pass(seconds, cpu, stats.bytes_read, stats.hits, stats.misses, stats.stall_s, stats.compute_s), out.logits


def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A checkpoint's folder; else one is made.")] = None,
    arch: Annotated[str, typer.Option(help="Of the checkpoint that is made.")] = "olmoe-bench",
    layers: Annotated[int | None, typer.Option(help="Of the checkpoint that is made.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 2048,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens in one forward; all by default.")] = None,
    host_memory: Annotated[str, typer.Option(help="The budget.")] = "25%",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    disk_seconds: Annotated[float, typer.Option(help="Length of each measurement of the disk.")] = 1.0,
    scratch: Annotated[Path | None, typer.Option(help="Where a checkpoint is made.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was measured there.")] = None,
) -> None:
    """Measure prefill with a budget against the limits of the disk and of the computing."""
    console = Console()
    try:
        with contextlib.ExitStack() as cleanup:
            if checkpoint is None:
                folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="moert-prefill-", dir=scratch)))
                checkpoint = folder / arch
                write_checkpoint(configuration(arch, layers=layers), checkpoint)
            facts = read_checkpoint(checkpoint)
            resident = moert.load(str(checkpoint), dtype="auto", host_memory="100%")
            cleanup.callback(moert.close, resident)
            model = moert.load(str(checkpoint), dtype="auto", host_memory=host_memory)
            cleanup.callback(moert.close, model)
            draw = random.Random(0)
            ids = torch.tensor([[draw.randrange(facts.vocabulary) for _ in range(prompt_tokens)]])
            whole, _ = run_pass(resident, ids, None)
            needed_bytes = (whole.hits + whole.misses) * facts.record_bytes
            _, want = run_pass(resident, ids, chunk)
            _, got = run_pass(model, ids, chunk)
            equal = torch.equal(want, got)
            passes: list[Pass] = []
            computing: list[Pass] = []
            disk: list[float] = []
            for _ in range(rounds if equal else 0):
                disk.append(measure(facts.shards, facts.record_bytes, seconds=disk_seconds).bytes_per_s)
                for one, into in draw.sample([(resident, computing), (model, passes)], 2):
                    done, logits = run_pass(one, ids, chunk)
                    into.append(done)
                    equal = equal and torch.equal(logits, want)
    except MoertError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    console.print(spinning_line(), highlight=False)
    colour = "green" if equal else "red"
    console.print(f"parity: [{colour}]{'equal' if equal else 'other logits'}[/] with every expert in memory")
    summary = _summary(passes, computing, disk, needed_bytes) if equal else {}
    if summary:
        console.print(_table(summary, f"{checkpoint.name}, {prompt_tokens} tokens, host_memory={host_memory}"))
    if json_path is not None:
        content = {
            "command": shlex.join(sys.argv),
            "machine": about_machine(),
            "checkpoint": checkpoint.name,
            "prompt_tokens": prompt_tokens,
            "chunk": chunk,
            "host_memory": host_memory,
            "parity": equal,
            "summary": summary,
            "disk_bytes_per_s": disk,
            "passes": [asdict(one) for one in passes] if equal else [],
            "computing": [asdict(one) for one in computing] if equal else [],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if not equal:
        raise typer.Exit(1)


def _summary(passes: list[Pass], computing: list[Pass], disk: list[float], needed_bytes: int) -> dict[str, float]:
    read_s = [one.bytes_read / speed for one, speed in zip(passes, disk, strict=True)]
    compute_s = [one.seconds for one in computing]
    over_limit = [
        one.seconds / max(read, compute) for one, read, compute in zip(passes, read_s, compute_s, strict=True)
    ]
    return {
        "seconds": statistics.median(one.seconds for one in passes),
        "compute_limit_s": statistics.median(compute_s),
        "read_limit_s": statistics.median(read_s),
        "over_the_slower_limit": statistics.median(over_limit),
        "bytes_read": statistics.median(one.bytes_read for one in passes),
        "bytes_needed": needed_bytes,
        "read_over_needed": statistics.median(one.bytes_read for one in passes) / needed_bytes,
        "stall_s": statistics.median(one.stall_s for one in passes),
        "expert_s": statistics.median(one.expert_s for one in passes),
        "expert_s_alone": statistics.median(one.expert_s for one in computing),
        "cpu_s": statistics.median(one.cpu_s for one in passes),
        "cpu_s_alone": statistics.median(one.cpu_s for one in computing),
        "hits": statistics.median(one.hits for one in passes),
        "misses": statistics.median(one.misses for one in passes),
        "disk_bytes_per_s": statistics.median(disk),
    }


def _table(summary: dict[str, float], title: str) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False)
    table.add_row("a pass takes", f"{summary['seconds']:.2f} s")
    table.add_row("computing alone takes", f"{summary['compute_limit_s']:.2f} s")
    table.add_row(
        "reading alone would take",
        f"{summary['read_limit_s']:.2f} s at {summary['disk_bytes_per_s'] / 1e9:.2f} GB/s",
    )
    table.add_row("over the slower of the two", f"{summary['over_the_slower_limit']:.2f}x")
    table.add_row("read", f"{summary['bytes_read'] / 1e6:.0f} MB, {summary['read_over_needed']:.2f}x what it needs")
    table.add_row("standing still for a read", f"{summary['stall_s']:.2f} s")
    return table


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
