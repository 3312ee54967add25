"""All that is to be found out on a machine with a GPU, in one call of a few minutes: see gpu_session.sh.

    python bench/gpu_session.py results/           # every step, one after the other, each in a process of its own
    python bench/gpu_session.py results/ --only decode,sweep
    python bench/gpu_session.py results/ --dry-run # every step on tiny sizes under the interpreter; times mean nothing

A step that fails, or takes longer than it may, ends alone. What was found is written as it comes. Nothing is timed
whose result is wrong. Exit code 1 if a step did not end well or something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_process import run_apart

ROOT = Path(__file__).parents[1]
GRACE_S = 5.0
MACHINE_S = 90.0
SANITIZERS = ("memcheck", "racecheck")
TESTS = ("test_device_experts*.py", "test_triton_*.py")


@dataclass(frozen=True)
class Context:
    """What a step is told."""

    setting: Any
    rows: Any
    peaks: dict[str, float]
    until: float
    """Of `time.monotonic`: the step is ended then."""
    scratch: Path
    """A folder that is gone after the step."""


@dataclass(frozen=True)
class Step:
    """A part of the session."""

    name: str
    limit_s: float
    work: Callable[[Context], None]


def _tests(context: Context) -> None:
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    if context.setting.is_dry:
        command += ["--collect-only", str(ROOT / "tests" / "test_triton_shim.py")]
    else:
        command += ["-n", str(min(8, len(os.sched_getaffinity(0)))), *files]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    context.rows.add("tests of the kernels and of patched models", float(not code), "passed", exit_code=code)
    assert code == 0, f"pytest ended with {code}"


def _parity(context: Context) -> None:
    import gpu_parity

    gpu_parity.run(context.setting, context.rows)


def _peaks(context: Context) -> None:
    import gpu_peaks

    gpu_peaks.run(context.setting, context.rows)


def _decode(context: Context) -> None:
    import gpu_decode

    gpu_decode.run(context.setting, context.rows, context.peaks)


def _offload(context: Context) -> None:
    import gpu_offload

    gpu_offload.run(context.setting, context.rows, context.peaks, context.until - GRACE_S, context.scratch)


def _grouped(context: Context) -> None:
    import gpu_grouped

    gpu_grouped.run(context.setting, context.rows, context.peaks)


def _copies(context: Context) -> None:
    import gpu_copies

    gpu_copies.run(context.setting, context.rows, context.peaks)


def _overlap(context: Context) -> None:
    import gpu_overlap

    gpu_overlap.run(context.setting, context.rows)


def _model(context: Context) -> None:
    import gpu_model

    gpu_model.run(context.setting, context.rows)


def _sanitizer(context: Context) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None or context.setting.is_dry:
        why = "there is no GPU" if context.setting.is_dry else "compute-sanitizer is not installed"
        context.rows.add("compute-sanitizer", None, "clean", goal="sanitizer", why=why)
        return
    failed = []
    for tool in SANITIZERS:
        with tempfile.TemporaryDirectory() as scratch:
            session = [sys.executable, __file__, scratch, "--only", "parity", "--tiny"]
            child = subprocess.run(
                [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *session],
                # Tensors side by side in one block of the allocator would hide what goes past their ends.
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
        said = [line for line in (child.stdout + child.stderr).splitlines() if line.startswith("=========")]
        print("\n".join(said[-12:]), flush=True)
        clean = child.returncode == 0
        last = said[-1].lstrip("= ") if said else f"it ended with {child.returncode}"
        context.rows.add(f"compute-sanitizer, {tool}", float(clean), "clean", goal="sanitizer", said=last)
        if not clean:
            failed.append(f"{tool}: {last}")
    assert not failed, "; ".join(failed)


def _sweep(context: Context) -> None:
    import gpu_sweep

    gpu_sweep.run(context.setting, context.rows, context.until - 2 * GRACE_S)


STEPS = (
    Step("tests", 150, _tests),
    Step("parity", 60, _parity),
    Step("peaks", 40, _peaks),
    Step("decode", 90, _decode),
    Step("offload", 220, _offload),
    Step("grouped", 70, _grouped),
    Step("copies", 50, _copies),
    Step("overlap", 60, _overlap),
    Step("model", 70, _model),
    Step("sanitizer", 120, _sanitizer),
    Step("sweep", 150, _sweep),
)


def run_step(
    step: Step, peaks: dict[str, float], until: float, dry: bool, tiny: bool, trace: Path | None = None
) -> dict[str, Any]:
    """The step in a process of its own: how it ended, after how long, and its rows."""
    until = min(until, time.monotonic() + step.limit_s)
    with tempfile.TemporaryDirectory() as scratch:

        def work(rows: Any) -> None:
            import torch
            from gpu_layers import QWEN3_30B, TINY, Setting

            if dry:
                torch.set_num_threads(1)
            device = torch.device("cpu" if dry else "cuda", None if dry else 0)
            setting = Setting(device, TINY if dry or tiny else QWEN3_30B, trace)
            torch.manual_seed(0)
            step.work(Context(setting, rows, peaks, until, Path(scratch)))

        ending = run_apart(work, until - time.monotonic(), leads=True)
    wrong = sum(bool(row.get("wrong")) for row in ending.rows)
    ended = f"{wrong} wrong" if wrong and ending.ended == "well" else ending.ended
    return {"ended": ended, "seconds": ending.seconds, "rows": ending.rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default=str(ROOT / "bench" / "results"), help="folder for what is found")
    parser.add_argument("--only", default="", help=f"of {', '.join(step.name for step in STEPS)}, separated by commas")
    parser.add_argument("--seconds", type=float, default=560, help="for all steps together")
    parser.add_argument("--dry-run", "--interpret", action="store_true", help="tiny, on the CPU, under the interpreter")
    parser.add_argument("--trace", type=Path, help="recorded routing for the offload step (docs/trace-format.md)")
    parser.add_argument("--tiny", action="store_true", help="tiny, on the GPU")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [step.name for step in STEPS]
    unknown = sorted(set(wanted) - {step.name for step in STEPS})
    if unknown:
        parser.error(f"there is no step {unknown[0]!r}; there are {', '.join(step.name for step in STEPS)}")
    if options.trace is not None and not options.trace.is_file():
        parser.error(f"there is no file {options.trace}")
    deadline = time.monotonic() + options.seconds
    # Before triton is imported: its kernels are made for the interpreter or for a GPU then.
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(ROOT / "tests"))
        import triton_shim

        triton_shim.install()
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    machine = _machine()
    if not options.dry_run and "gpu" not in machine:
        parser.error(f"there is no CUDA device; --dry-run needs none {machine.get('error', '')}")
    import gpu_results
    from rich.console import Console

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "dry_run": options.dry_run, "steps": {}}
    slug = "dry-run" if options.dry_run else re.sub(r"[^a-z0-9]+", "-", machine["gpu"]["name"].lower())
    stem = out / f"gpu-session-{slug}"
    steps: dict[str, Any] = found["steps"]
    for step in STEPS:
        if step.name not in wanted:
            continue
        print(f"\n== {step.name}", flush=True)
        if time.monotonic() > deadline - GRACE_S:
            steps[step.name] = {"ended": "not begun: no time was left", "seconds": 0.0, "rows": []}
        else:
            peaks = {row["key"]: row["value"] for row in steps.get("peaks", {}).get("rows", []) if row.get("key")}
            steps[step.name] = run_step(step, peaks, deadline, options.dry_run, options.tiny, options.trace)
        print(f"== {step.name} ended {steps[step.name]['ended']}, {steps[step.name]['seconds']:.0f} s", flush=True)
        part = stem.with_suffix(".json.part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(part, stem.with_suffix(".json"))
    try:
        import gpu_plots

        gpu_plots.draw(steps, stem)
    except Exception:  # numbers without plots are better than none
        traceback.print_exc()
    console = Console(width=150 if not sys.stdout.isatty() else None)
    for table in gpu_results.summary(steps, options.dry_run):
        console.print(table)
    return 0 if all(step["ended"] == "well" for step in steps.values()) else 1


def _machine() -> dict[str, Any]:
    """In a process of its own: what has asked for a GPU may not fork any more."""
    command = [sys.executable, "-c", "import json, gpu_results; print(json.dumps(gpu_results.machine()))"]
    try:
        child = subprocess.run(
            command, cwd=ROOT / "bench", capture_output=True, text=True, check=False, timeout=MACHINE_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"(asking for one took more than {MACHINE_S:.0f} s)"}
    found: dict[str, Any] = {"error": child.stderr[-300:]} if child.returncode else json.loads(child.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
