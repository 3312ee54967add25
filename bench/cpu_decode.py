"""Decoding on the CPU with all weights in memory, end to end: moert, plain transformers and llama.cpp on one model.

    python bench/cpu_decode.py --rounds 5 --tokens 64 --json decode.json
    python bench/cpu_decode.py --checkpoint /data/olmoe-bench --gguf /data/olmoe-bench.gguf

All models are loaded once, in one process, and take turns, in another order each round, with the same number of
threads, torch's limited in how long they spin as in cpu_experts.py. The limit is memory: what one token makes the CPU
read, over what it can read in a second, measured in each round. No speed is given unless moert's greedy tokens are
those of transformers. llama.cpp takes part when llama_cpp and gguf are installed in the environment. A model that is
small against the last cache can be faster than the limit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import parity
import torch
import typer
from architectures import configuration
from checkpoint import read_checkpoint
from cpu_contest import default_threads
from cpu_layers import Pages
from cpu_measure import Limits, read_limit, settle
from cpu_report import about_machine
from limited import Outcome
from make_checkpoint import write_checkpoint
from report import agreement
from rich.console import Console
from rich.table import Table
from start import spinning_line, start_with
from systems import Run, Spec, generate, load_moert

from moert.errors import ConfigError, MoertError
from moert.kernels import cpu
from moert.torch_threads import wanted_settings

SYSTEMS = ("moert", "transformers grouped_mm", "transformers eager", "llama.cpp")
LIMIT_BYTES = 1 << 30


def touched_bytes(folder: Path) -> int:
    """Bytes of weights that decoding one token reads: all that is dense but the embedding, and the picked experts."""
    facts = read_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    layers, experts, picks = (config[key] for key in ("num_hidden_layers", "num_experts", "num_experts_per_tok"))
    embedding_bytes = 0 if config["tie_word_embeddings"] else 2 * config["vocab_size"] * config["hidden_size"]
    return facts.total_bytes - embedding_bytes - layers * (experts - picks) * facts.record_bytes


def load_all(
    chosen: list[str], spec: Spec, threads: int, say: Callable[[str], None]
) -> dict[str, Callable[[Spec], Run]]:
    """Every system with its model in memory, ready to run a spec."""
    ready: dict[str, Callable[[Spec], Run]] = {}
    if "moert" in chosen:
        say("loading moert")
        ours = load_moert(spec)
        ready["moert"] = lambda spec: generate(spec, lambda _: ours)
    ways = [name.split()[1] for name in chosen if name.startswith("transformers")]
    if ways:
        from transformers import AutoModelForCausalLM

        say("loading transformers")
        theirs = AutoModelForCausalLM.from_pretrained(spec.checkpoint, dtype="auto").eval()
        for way in ways:
            ready[f"transformers {way}"] = lambda spec, way=way: _generate_plain(spec, theirs, way)
    if "llama.cpp" in chosen:
        say("loading llama.cpp")
        from llama_cpp import Llama  # type: ignore[import-not-found,unused-ignore]

        context = len(spec.prompt) + spec.tokens + 8
        options = {"n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": 0, "verbose": False}
        # Without mmap its weights are in memory from the start, as everyone else's are.
        model = Llama(model_path=spec.gguf, n_ctx=context, use_mmap=False, **options)
        ready["llama.cpp"] = lambda spec: _generate_llama_cpp(spec, model)
    return ready


def _generate_plain(spec: Spec, model: Any, way: str) -> Run:
    model.set_experts_implementation(way)
    return generate(replace(spec, system="hf"), lambda _: model)


def _generate_llama_cpp(spec: Spec, model: Any) -> Run:
    run = Run()
    started = first = time.perf_counter()
    model.reset()
    for token in model.generate(spec.prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
        run.tokens.append(token)
        if len(run.tokens) == 1:
            first = time.perf_counter()
        if len(run.tokens) == spec.tokens:
            break
    run.first_token_s, run.decode_s = first - started, time.perf_counter() - first
    return run


def check(ready: dict[str, Callable[[Spec], Run]], spec: Spec, runs: dict[str, Run]) -> parity.Parity:
    """Whether moert's tokens are those of transformers; see parity.py."""
    if "moert" not in ready:
        return parity.Parity("not asked")
    outcomes = [Outcome("moert", runs["moert"])]
    outcomes += [Outcome("hf", run) for name, run in runs.items() if name.startswith("transformers")]

    def again(wanted: Spec, limited: bool) -> Outcome:
        run = ready["moert"](wanted) if wanted.host_memory == spec.host_memory else generate(wanted, load_moert)
        return Outcome("moert", run)

    return parity.check(outcomes, replace(spec, system="moert"), "50%", again)


def _gguf(checkpoint: Path, given: Path | None, folder: Path) -> Path:
    if given is not None:
        return given
    made = folder / "model.gguf"
    script = Path(__file__).with_name("make_gguf.py")
    command = [sys.executable, str(script), str(checkpoint), str(made)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"make_gguf.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return made


def main(
    arch: Annotated[
        str, typer.Option(help="OLMoE architecture of architectures.py to make a model of.")
    ] = "olmoe-bench",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers instead of its own number.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Take this OLMoE checkpoint instead.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The same model for llama.cpp; else it is converted.")] = None,
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(SYSTEMS)}.")] = ",".join(SYSTEMS),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=2)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="For everyone; else one a core.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where the model goes for the time.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all that was measured there.")] = None,
) -> None:
    """Compare decoding with all weights in memory."""
    console = Console()
    console.width = max(console.width, 110)
    try:
        chosen = [name.strip() for name in systems.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in SYSTEMS]
        if unknown or not chosen:
            raise ConfigError(f"--systems {systems!r}: choose from {', '.join(SYSTEMS)}")
        absent = {}
        for package in ("llama_cpp", "gguf"):
            if "llama.cpp" in chosen and importlib.util.find_spec(package) is None:
                absent["llama.cpp"] = f"{package} is not installed"
        chosen = [name for name in chosen if name not in absent]
        threads = threads or default_threads()
        torch.set_num_threads(threads)
        if "moert" in chosen:
            cpu.set_threads(threads)
        with contextlib.ExitStack() as cleanup:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="moert-decode-", dir=scratch)))
            if checkpoint is None:
                checkpoint = folder / arch
                write_checkpoint(configuration(arch, layers=layers), checkpoint)
            status = cleanup.enter_context(console.status("converting for llama.cpp"))
            facts = read_checkpoint(checkpoint)
            draw = random.Random(0)
            spec = Spec(
                system="moert",
                checkpoint=str(checkpoint),
                prompt=[draw.randrange(facts.vocabulary) for _ in range(prompt_tokens)],
                tokens=tokens,
                host_memory="100%",
                gguf=str(_gguf(checkpoint, gguf, folder)) if "llama.cpp" in chosen else None,
            )
            ready = load_all(chosen, spec, threads, status.update)
            status.update("parity")
            first = {name: run(spec) for name, run in ready.items()}
            verdict = check(ready, spec, first)
            token_bytes = touched_bytes(checkpoint)
            probe = Limits(Pages(LIMIT_BYTES), threads).probes()[read_limit(threads)]
            speeds: dict[str, list[float]] = {name: [] for name in ready}
            reads: list[float] = []
            for number in range(rounds if verdict.green else 0):
                for name in draw.sample([*ready, ""], len(ready) + 1):
                    status.update(f"round {number + 1} of {rounds}: {name or 'memory'}")
                    settle()
                    if not name:
                        reads.append(probe())
                        continue
                    run = ready[name](spec)
                    speeds[name].append((len(run.tokens) - 1) / run.decode_s)
                    if run.tokens != first[name].tokens and name == "moert":
                        verdict = parity.Parity("red", "moert, another round", "moert's tokens differ between rounds")
    except MoertError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None

    console.print(spinning_line(), highlight=False)
    for name, why in absent.items():
        console.print(f"{name} did not run: {why}", highlight=False)
    colour = "green" if verdict.green else "red"
    console.print(f"parity: [{colour}]{verdict.verdict}[/] {verdict.reference} {verdict.why}", highlight=False)
    summary = _summary(speeds, reads, token_bytes, first) if verdict.green else []
    if summary:
        title = f"{checkpoint.name}, {token_bytes / 1e6:.0f} MB a token, {threads} threads, {rounds} rounds"
        console.print(_table(summary, title, statistics.median(reads)))
    if json_path is not None:
        content = {
            "command": shlex.join(sys.argv),
            "machine": about_machine(),
            "checkpoint": checkpoint.name,
            "weights_bytes": facts.total_bytes,
            "touched_bytes_per_token": token_bytes,
            "threads": threads,
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "absent": absent,
            "parity": asdict(verdict),
            "read_bytes_per_s": reads,
            "summary": summary,
            "tokens_per_s": speeds if verdict.green else {},
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if not verdict.green:
        raise typer.Exit(1)


def _summary(
    speeds: dict[str, list[float]], reads: list[float], token_bytes: int, first: dict[str, Run]
) -> list[dict[str, Any]]:
    limit = statistics.median(reads) / token_bytes
    reference = next((run.tokens for name, run in first.items() if name.startswith("transformers")), None)
    rows = []
    for name, of_round in speeds.items():
        median = statistics.median(of_round)
        rows.append(
            {
                "system": name,
                "tokens_per_s": median,
                "tokens_per_s_range": [min(of_round), max(of_round)],
                "share_of_memory_limit": median / limit,
                "tokens_as_transformers": agreement(first[name].tokens, reference) if reference else None,
            }
        )
    return sorted(rows, key=lambda row: -row["tokens_per_s"])


def _table(rows: list[dict[str, Any]], title: str, read_bytes_per_s: float) -> Table:
    table = Table("", "tokens/s", "over the rounds", "of the limit", "tokens as transformers", title=title)
    for row in rows:
        low, high = row["tokens_per_s_range"]
        table.add_row(
            row["system"],
            f"{row['tokens_per_s']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['share_of_memory_limit']:.0%}",
            row["tokens_as_transformers"] or "-",
        )
    table.caption = f"memory gives {read_bytes_per_s / 1e9:.1f} GB/s"
    return table


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
