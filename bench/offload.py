"""Tokens per second of a model that does not fit, side by side under one memory limit, the disk's limit beside them.

    python bench/offload.py /data/olmoe-bench --memory-limit 1.1GB --host-memory 25% --rounds 3 --json offload.json

Each system runs in a process of its own inside a memory cgroup that counts the page cache too, starts with the model's
files out of the page cache, and takes turns with the others. The disk is measured before and after each round, past the
page cache. Every system's torch is limited in how long its threads spin, as in cpu_experts.py. Speeds of moert are
given only if its tokens are those of transformers. With moert-resident among the systems, moert also runs with every
expert in memory, and its share is given of the slower of the two limits: reading what was read at the disk's speed, and
computing at that run's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import signal
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import parity
import typer
from checkpoint import prepared_for_hf, read_checkpoint
from limited import limit_refused
from report import machine, set_share_of_limit, summarise, table
from rich.console import Console
from rounds import Bench
from start import spinning_line
from systems import SYSTEMS, Spec

from moert.config import format_bytes, parse_budget
from moert.errors import ConfigError, MoertError
from moert.torch_threads import limit_spinning

# What python, torch and transformers take before any weight: left free beside HuggingFace's share of the limit.
INTERPRETER_BYTES = 450 << 20


def _bytes(value: str, option: str) -> int:
    nbytes = parse_budget(value, option).nbytes
    if nbytes is None:
        raise ConfigError(f"{option}={value!r} must be a size, such as 1.1GB")
    return nbytes


def _systems(text: str, gguf: Path | None) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in SYSTEMS]
    if unknown or not chosen:
        raise ConfigError(f"systems={text!r}: choose from {', '.join(SYSTEMS)}")
    if "moert" in chosen and importlib.util.find_spec("moert.api") is None:
        raise ConfigError("this moert has no load(); leave moert out of --systems")
    if "llama.cpp" in chosen and gguf is None:
        raise ConfigError("llama.cpp needs --gguf, the same model as a GGUF file")
    return chosen


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a safetensors checkpoint of an MoE model.")],
    host_memory: Annotated[str | None, typer.Option(help="moert's budget, 4GiB or 25%; measured by default.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Hard limit for each system, such as 1.1GB.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 8,
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(SYSTEMS)}, with commas between.")] = "moert,hf",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was measured there.")] = None,
    hf_memory: Annotated[str | None, typer.Option(help="hf's memory for weights; else what the limit leaves.")] = None,
    reference_host_memory: Annotated[
        str, typer.Option(help="moert's budget in the parity run, without a limit, where hf gives no tokens.")
    ] = "100%",
    scratch: Annotated[Path | None, typer.Option(help="Where hf's copy of the checkpoint goes for the time.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The same model for llama.cpp.")] = None,
    llama_python: Annotated[str, typer.Option(help="An interpreter that has llama_cpp.")] = sys.executable,
    disk_seconds: Annotated[float, typer.Option(help="Length of each measurement of the disk.")] = 3.0,
    timeout: Annotated[float, typer.Option(help="The most seconds one run may take.")] = 3600.0,
) -> None:
    """Compare systems that run an MoE model under one memory limit."""
    console = Console()
    # Terminated like interrupted: the child, its group and hf's copy of the checkpoint go too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    limit_spinning()  # of the children too, whatever they run
    try:
        chosen = _systems(systems, gguf)
        facts = read_checkpoint(checkpoint)
        limit_bytes = None if memory_limit is None else _bytes(memory_limit, "memory-limit")
        refused = "" if limit_bytes is None else limit_refused(limit_bytes)
        if refused:
            console.print(f"[yellow]no memory limit:[/] {refused}; peaks are shown, and nothing enforces them")
            limit_bytes = None
        left_bytes = facts.total_bytes if limit_bytes is None else max(1, limit_bytes - INTERPRETER_BYTES)
        draw = random.Random(0)
        base = Spec(
            system="",
            checkpoint=str(checkpoint),
            prompt=[draw.randrange(facts.vocabulary) for _ in range(prompt_tokens)],
            tokens=tokens,
            host_memory=host_memory,
            hf_memory_bytes=left_bytes if hf_memory is None else _bytes(hf_memory, "hf-memory"),
            gguf=None if gguf is None else str(gguf),
        )
        files = [*facts.shards, *([gguf] if gguf else [])]
        with contextlib.ExitStack() as cleanup:
            status = cleanup.enter_context(console.status("hf: fusing the experts, once, outside the limit"))
            if "hf" in chosen:
                folder = cleanup.enter_context(prepared_for_hf(facts, scratch))
                base.hf_folder = str(folder)
                files += sorted(folder.glob("*.safetensors"))
            bench = Bench(
                files,
                facts.record_bytes,
                limit_bytes,
                timeout,
                disk_seconds,
                llama_python,
                status.update,
            )
            done = bench.rounds([replace(base, system=name) for name in chosen], rounds)
            outcomes = [outcome for one in done for outcome in one.outcomes]
            verdict = parity.Parity("not asked")
            if "moert" in chosen:
                status.update("parity")
                verdict = parity.check(outcomes, replace(base, system="moert"), reference_host_memory, bench.run)
    except MoertError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None

    of_system = {name: [one for one in outcomes if one.system == name] for name in chosen}
    hf_tokens = next((one.run.tokens for one in of_system.get("hf", []) if one.run), None)
    rows = [
        summarise(name, of_system[name], speed=verdict.green or not name.startswith("moert"), reference=hf_tokens)
        for name in chosen
    ]
    set_share_of_limit(rows)
    speeds = [disk.bytes_per_s for one in done for disk in (one.disk_before, one.disk_after)]
    direct = all(disk.direct for one in done for disk in (one.disk_before, one.disk_after))
    speed_text = f"{statistics.median(speeds) / 1e9:.2f} GB/s ({min(speeds) / 1e9:.2f} to {max(speeds) / 1e9:.2f})"
    way = "past the page cache" if direct else "through an emptied page cache, as O_DIRECT is refused"
    limit_text = "no memory limit" if limit_bytes is None else f"limit {format_bytes(limit_bytes)}"
    console.print(table(rows, f"{checkpoint.name}, {format_bytes(facts.total_bytes)} of weights, {limit_text}"))
    console.print(spinning_line(), highlight=False)
    console.print(f"disk: {speed_text} in random reads of {format_bytes(facts.record_bytes)}, 4 at once, {way}")
    colour = "green" if verdict.green else "red"
    console.print(f"parity: [{colour}]{verdict.verdict}[/] {verdict.reference} {verdict.why}", highlight=False)
    if json_path is not None:
        content = {
            "checkpoint": checkpoint.name,
            "weights_bytes": facts.total_bytes,
            "record_bytes": facts.record_bytes,
            "memory_limit_bytes": limit_bytes,
            "memory_limit_refused": refused,
            "host_memory": host_memory,
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "machine": machine(),
            "disk_bytes_per_s": statistics.median(speeds),
            "parity": asdict(verdict),
            "summary": rows,
            # Speeds of a run whose tokens are wrong mean nothing, in a file no more than on the screen.
            "rounds": [one.as_dict() for one in done] if verdict.green else [],
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    if not verdict.green or any(row["error"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
