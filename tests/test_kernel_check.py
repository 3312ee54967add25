"""The check that compiles kernels for GPUs that are not here: what it says of bad ones, and of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

BAD_KERNELS = """
import json, sys
import kernel_check
import torch
import triton
import triton.language as tl
from moert.kernels._launch import CompileSpec, Launch

@triton.jit
def products(a_ptr, b_ptr, out_ptr, stride, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, 4096, SIZE):
        total = tl.dot(tl.load(a_ptr + places + k), tl.load(b_ptr + places + k), total)
    tl.store(out_ptr + places, total)

@triton.jit
def wrong(a_ptr, b_ptr, out_ptr, stride, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.load(a_ptr) + undefined)

@triton.jit
def adding(a_ptr, b_ptr, out_ptr, stride, SIZE: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, SIZE), tl.load(a_ptr + tl.arange(0, SIZE)).to(tl.float32))

half = torch.empty(1, dtype=torch.float16, device="meta")
out = torch.empty(1, device="meta")

def spec(name, kernel=products, size=32, needs=(), stride=4096, **options):
    arguments = {"a_ptr": half, "b_ptr": half, "out_ptr": out, "stride": stride, "SIZE": size}
    return CompileSpec(name, Launch(kernel, (1,), arguments, {"num_warps": 4, **options}), needs)

bad = [
    spec("good", needs=("mma", "load128|wgmma")),
    spec("spills", size=128, num_warps=8, maxnreg=64),
    spec("shared", size=128, num_stages=5, num_warps=8),
    spec("instruction", needs=("wgmma|tcgen05",)),
    spec("unaligned", stride=4095, needs=("load128",)),
    spec("wrong", kernel=wrong),
    spec("atomics", kernel=adding),
]
kernel_check.specs = lambda capability: {spec.name: spec for spec in bad}
print(json.dumps({spec.name: kernel_check.check(spec.name, 86) for spec in bad}))
"""


def compiled(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "bench")
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=3500)


def test_what_is_wrong_with_a_kernel_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD_KERNELS)
    child = compiled(str(tmp_path / "bad.py"), cache=tmp_path / "cache")
    assert child.returncode == 0, child.stderr
    wrong = {name: "; ".join(result["wrong"]) for name, result in json.loads(child.stdout).items()}
    assert wrong["good"] == ""
    assert "spills" in wrong["spills"]
    assert "bytes of shared memory, a block may have 101376" in wrong["shared"]
    assert "no wgmma|tcgen05" in wrong["instruction"]
    assert "no load128" in wrong["unaligned"]
    assert "undefined" in wrong["wrong"]
    assert wrong["atomics"] == "atomic in it"


@pytest.mark.usefixtures("bench_on_path")
def test_growth_over_the_baseline_is_said() -> None:
    import kernel_check

    def grown(registers: int, shared: int) -> list[str]:
        result = {"kernel": "k", "capability": 90, "registers": registers, "shared": shared, "wrong": []}
        assert kernel_check.check_growth(result, {"k 90": [100, 1000]})
        return result["wrong"]

    assert grown(110, 1100) == []
    assert grown(111, 1000) == ["100 registers became 111"]
    assert grown(100, 1101) == ["1000 bytes of shared memory became 1101"]


@pytest.mark.usefixtures("bench_on_path")
def test_nothing_is_held_against_a_baseline_of_another_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_check
    import triton

    def sizes(jobs: list[tuple[str, int]], processes: int) -> list[dict[str, Any]]:
        return [{"kernel": name, "capability": at, "registers": 200, "shared": 0, "wrong": []} for name, at in jobs]

    def ran(version: str, *options: str) -> tuple[int, str, dict[str, Any]]:
        kept = {"triton": version, "sizes": {"one 90": [100, 0], "another 90": [7, 7]}}
        kernel_check.BASELINE.write_text(json.dumps(kept))
        monkeypatch.setattr(sys, "argv", ["kernel_check.py", "--only", "one", "--capabilities", "90", *options])
        code = kernel_check.main()
        return code, capsys.readouterr().out.splitlines()[-1], json.loads(kernel_check.BASELINE.read_text())["sizes"]

    monkeypatch.setattr(kernel_check, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(kernel_check, "results", sizes)
    monkeypatch.setattr(kernel_check, "specs", lambda capability: ("one", "two"))
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR"):  # which it changes
        monkeypatch.setenv(name, os.environ.get(name, ""))
    ours, other = triton.__version__, "3.0.1"
    code, said, _ = ran(ours)
    assert code == 1 and said.startswith("1 compiled, 1 wrong, ") and said.endswith("; 1 held against the baseline")
    code, said, _ = ran(other)
    assert code == 0 and said.startswith("1 compiled, 0 wrong, ")
    assert said.endswith(f"; 0 held against the baseline, which is of triton 3.0.1 and not {ours}")
    assert ran(ours, "--write-baseline")[2] == {"one 90": [200, 0], "another 90": [7, 7]}
    with pytest.raises(SystemExit):
        ran(other, "--write-baseline")
    assert "can only be written whole" in capsys.readouterr().err


@pytest.mark.usefixtures("bench_on_path")
def test_the_baseline_has_every_kernel_on_every_architecture() -> None:
    import kernel_check

    kept = json.loads(kernel_check.BASELINE.read_text())["sizes"]
    wanted = {f"{name} {capability}" for capability in kernel_check.USUAL for name in kernel_check.specs(capability)}
    assert kept.keys() == wanted, "run bench/kernel_check.py --write-baseline"


def test_a_name_without_kernels_and_an_unknown_architecture_are_refused() -> None:
    for options in (["--only", "nothing"], ["--capabilities", "75"]):
        child = compiled(str(ROOT / "bench" / "kernel_check.py"), *options)
        assert child.returncode == 2
        assert ("no kernel has 'nothing'" if "--only" in options else "[75] are unknown") in child.stderr


@pytest.mark.usefixtures("bench_on_path")
def test_the_quick_check_leaves_out_no_kernel_and_no_variant() -> None:
    import kernel_check

    names = [*(f"many[{variant}]" for variant in range(13)), "few[a]", "few[b]", "one"]
    chosen = [kernel_check.quick(names, turn) for turn in range(len(kernel_check.USUAL))]
    assert {name for some in chosen for name in some} == set(names)
    for some in chosen:
        assert {name.partition("[")[0] for name in some} == {"many", "few", "one"}
        assert len(some) == len(set(some)) <= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_for_every_architecture() -> None:
    child = compiled(str(ROOT / "bench" / "kernel_check.py"))
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
