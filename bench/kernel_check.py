"""Compile the Triton kernels for GPUs that are not here, and check what the assembler says of them.

    python bench/kernel_check.py                         # all kernels, all architectures
    python bench/kernel_check.py --quick                 # on each architecture a fifth of every kernel's variants
    python bench/kernel_check.py --only decode --capabilities 86,120
    python bench/kernel_check.py --write-baseline        # after a change that was meant

No driver is needed: triton comes with the assemblers. Every module of `moert.kernels` with `compile_specs` takes part.
A kernel fails if it does not compile, spills registers, needs more shared memory or registers than a block may have,
lacks an instruction it should have, has one it should not have (to add to memory atomically, say), or grew by more than
a tenth over the committed baseline. Exit code 1 then. Sizes of another triton than the baseline's are not held against
it; the last line says how many were.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "bench" / "kernel_baseline.json"

GROWTH = 1.1

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Compute capability -> shared memory that one block may have."""

USUAL = (80, 86, 89, 90, 120)
"""Compute capabilities that are checked unless others are asked for."""

REGISTERS = 65_536
"""That the threads of one block may have together."""

INSTRUCTIONS = {
    "load128": r"ld\.global\S*\.v4\.[bf]32|ld\.global\S*\.v2\.b64|cp\.async\.cg",
    "load64": r"ld\.global\S*\.v2\.[bf]32",
    "mma": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "acquire": r"ld\.\S*acquire",
    "release": r"(?:st|atom|red)\.\S*sys\.\S*release|(?:st|atom|red)\.\S*release\.sys",
    "atomic": r"(?<!\w)(?:red|atom)\.\S*global",
}


class AbsentDriver:
    """Stands in for a GPU's driver, for as much as compiling needs: device number 90 is one of sm_90."""

    device = 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.device, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@cache
def specs(capability: int) -> dict[str, Any]:
    """Name -> `CompileSpec` of every kernel launched on that capability."""
    import moert.kernels

    found = {}
    for module in pkgutil.iter_modules(moert.kernels.__path__):
        make = getattr(importlib.import_module(f"moert.kernels.{module.name}"), "compile_specs", None)
        for spec in make(capability) if make is not None else ():
            assert spec.name not in found, f"two kernels are named {spec.name}"
            found[spec.name] = spec
    return found


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from the assembler that reads this version of PTX.

    Raises:
        ValueError: none does.
    """
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    said = ""
    names = ("ptxas", "ptxas-blackwell") if capability < 100 else ("ptxas-blackwell", "ptxas")
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "kernel.ptx").write_text(ptx)
        for name in names:
            if not (folder / name).exists():
                continue
            architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
            child = subprocess.run(
                [folder / name, "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.o"],
                cwd=scratch,
                capture_output=True,
                text=True,
                check=False,
            )
            said = child.stderr
            registers = re.search(r"Used (\d+) registers", said)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
            if registers and spills:
                return int(registers[1]), int(spills[1]) + int(spills[2])
    raise ValueError(f"no assembler reads it: {' '.join(said.split())[-200:]}")


def check(name: str, capability: int) -> dict[str, Any]:
    """Compile one kernel for one architecture: sizes, instructions, and all that is wrong with it."""
    from triton.runtime import driver

    spec = specs(capability)[name]
    launch = spec.launch
    result: dict[str, Any] = {"kernel": name, "capability": capability}
    begin = time.perf_counter()
    AbsentDriver.device = capability
    driver.set_active(AbsentDriver())
    try:
        # The launcher's own way as far as the launch, so that arguments are specialised as they will be.
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
        ptx = compiled.asm["ptx"]
        registers, spilled = assembled(ptx, capability)
    except Exception as error:  # whatever a compiler raises
        lines = str(error).strip().splitlines() or [""]
        return {**result, "wrong": [f"{type(error).__name__}: {lines[-1][:200]}"]}
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    has = {name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)}
    wrong = []
    if spilled:
        wrong.append(f"spills {spilled} bytes")
    if shared > SHARED_BYTES[capability]:
        wrong.append(f"{shared} bytes of shared memory, a block may have {SHARED_BYTES[capability]}")
    if registers * threads > REGISTERS:
        wrong.append(f"{registers} registers for each of {threads} threads, a block may have {REGISTERS}")
    wrong.extend(f"no {need}" for need in spec.needs if not has.intersection(need.split("|")))
    wrong.extend(f"{lack} in it" for lack in spec.lacks if lack in has)
    return {
        **result,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "threads": threads,
        "seconds": round(time.perf_counter() - begin, 2),
        "instructions": sorted(has),
        "wrong": wrong,
    }


def check_growth(result: dict[str, Any], baseline: dict[str, Any]) -> bool:
    """Add to what is wrong where it grew. Whether there was a size to hold it against."""
    before = baseline.get(f"{result['kernel']} {result['capability']}")
    if before is None or "registers" not in result:
        return False
    for what, now, then in (
        ("registers", result["registers"], before[0]),
        ("bytes of shared memory", result["shared"], before[1]),
    ):
        if now > GROWTH * then:
            result["wrong"].append(f"{then} {what} became {now}")
    return True


def quick(names: list[str], turn: int) -> list[str]:
    """Of each kernel's variants, named kernel[variant], every fifth from `turn` on; one at least."""
    kernels: dict[str, list[str]] = {}
    for name in names:
        kernels.setdefault(name.partition("[")[0], []).append(name)
    return [
        name
        for variants in kernels.values()
        for name in variants[turn :: len(USUAL)] or [variants[turn % len(variants)]]
    ]


def line(result: dict[str, Any]) -> str:
    sizes = "".join(f"{result.get(key, '-'):>8}" for key in ("registers", "spilled", "shared", "threads", "seconds"))
    instructions = " ".join(result.get("instructions", ()))
    wrong = f"  ** {'; '.join(result['wrong'])}" if result["wrong"] else ""
    return f"{result['kernel']:<40} sm_{result['capability']:<4}{sizes}  {instructions}{wrong}"


def results(jobs: list[tuple[str, int]], processes: int) -> Iterator[dict[str, Any]]:
    names, capabilities = [name for name, _ in jobs], [capability for _, capability in jobs]
    # Not by fork: torch's threads are there already.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(check, names, capabilities)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--capabilities", default=",".join(map(str, USUAL)), help="compute capabilities, as 86,90")
    parser.add_argument("--quick", action="store_true", help="on each architecture a fifth of every kernel's variants")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--write-baseline", action="store_true", help="take the sizes as they are now")
    options = parser.parse_args()
    # Before triton is imported, here and in the processes: interpreted kernels have nothing to compile.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    wanted = [int(capability) for capability in options.capabilities.split(",")]
    unknown = sorted(set(wanted) - SHARED_BYTES.keys())
    if unknown:
        parser.error(f"compute capabilities {unknown} are unknown; there are {sorted(SHARED_BYTES)}")
    jobs = [
        (name, capability)
        for turn, capability in enumerate(wanted)
        for name in (quick(list(specs(capability)), turn) if options.quick else specs(capability))
        if options.only in name
    ]
    if not jobs:
        parser.error(f"no kernel has {options.only!r} in its name")

    import triton

    kept = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"triton": triton.__version__, "sizes": {}}
    is_ours = kept["triton"] == triton.__version__
    everything = not options.only and not options.quick and set(wanted) >= set(USUAL)
    if options.write_baseline and not everything and not is_ours:
        parser.error(
            f"the baseline is of triton {kept['triton']}: of {triton.__version__} it can only be written whole"
        )
    baseline = kept["sizes"] if is_ours else {}
    begin = time.perf_counter()
    columns = "".join(f"{name:>8}" for name in ("regs", "spilled", "shared", "threads", "seconds"))
    print(f"{'kernel':<40} {'target':<7}{columns}  instructions")
    failed = held = 0
    sizes = {} if everything else dict(baseline)
    for result in results(jobs, options.processes):
        if options.write_baseline and "registers" in result:
            sizes[f"{result['kernel']} {result['capability']}"] = [result["registers"], result["shared"]]
        elif not options.write_baseline:
            held += check_growth(result, baseline)
        failed += bool(result["wrong"])
        print(line(result), flush=True)
    last = f"{len(jobs)} compiled, {failed} wrong, {time.perf_counter() - begin:.0f} s"
    if not options.write_baseline:
        other = "" if is_ours else f", which is of triton {kept['triton']} and not {triton.__version__}"
        print(f"{last}; {held} held against the baseline{other}")
    else:
        print(last)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(sizes[name])}" for name in sorted(sizes))
        BASELINE.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "sizes": {{\n{rows}\n}}}}\n')
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
