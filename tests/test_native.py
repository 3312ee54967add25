"""csrc/ as C++: its checks that need no Python, and what the compiler made of the code for each instruction set."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from built_support import OUTSIDE_MAKE, ROOT, build, in_one_process

pytestmark = [in_one_process, pytest.mark.timeout(900)]

# Objects whose code runs only where the processor was found to have the instructions.
OF_AN_INSTRUCTION_SET = re.compile(r"amx|(float|quantized|pointwise)_avx\w+")


def shipped_flags() -> list[str]:
    """What setup.py gives the compiler."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args":
            flags: list[str] = ast.literal_eval(node.value)
            return flags
    raise AssertionError("setup.py has no extra_compile_args")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checks, and in csrc/ the object of each source that setup.py made."""
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no make, or no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    shutil.copytree(build(tmp_path_factory.getbasetemp()).objects, folder / "csrc")
    sources = {path.stem for path in (ROOT / "csrc").glob("*.cpp")}
    assert {path.stem for path in (folder / "csrc").glob("*.o")} == sources
    settings = [f"BUILD={folder}", f"FLAGS={' '.join(shipped_flags())}", f"PYTHON={sys.executable}"]
    if "CXX" not in os.environ:
        settings.append("CXX=g++")
    command = [
        "make",
        "-j",
        str(os.cpu_count()),
        "-f",
        "tests/native/native.mk",
        *settings,
        f"{folder}/kernels_check",
        f"{folder}/foresight_check",
        f"{folder}/norm_check",
        f"{folder}/split_check",
    ]
    child = subprocess.run(command, cwd=ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True, timeout=280)
    assert child.returncode == 0, child.stderr
    return folder


def tool(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    return subprocess.run([name, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def test_kernels_compute_what_their_formats_mean(built: Path) -> None:
    from moert import _C

    child = subprocess.run([built / "kernels_check"], capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, f"exit status {child.returncode}\n{child.stdout}{child.stderr}"
    checked = {line.split(maxsplit=1)[0].removesuffix("_dotprod") for line in child.stdout.splitlines()}
    assert checked == set(_C.isa_names(True).split()), "not every usable instruction set was checked"


def test_what_is_read_next_is_foreseen(built: Path) -> None:
    child = subprocess.run([built / "foresight_check"], capture_output=True, text=True, timeout=240)
    assert (child.returncode, child.stdout) == (0, "all hold\n"), child.stderr


def test_rows_are_shared_out_so_that_a_slow_core_holds_up_little(built: Path) -> None:
    child = subprocess.run([built / "split_check"], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (0, "all hold\n"), child.stderr


def test_norms_are_the_same_in_every_instruction_set(built: Path) -> None:
    child = subprocess.run([built / "norm_check"], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, f"exit status {child.returncode}\n{child.stdout}{child.stderr}"


@pytest.mark.slow
def test_the_checks_hold_on_an_emulated_aarch64() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    child = subprocess.run(
        ["make", "aarch64-check"], cwd=ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True, timeout=290
    )
    if skipped := re.search(r"^SKIPPED: (.*)", child.stdout, re.MULTILINE):
        pytest.skip(skipped[1])
    assert child.returncode == 0, child.stdout + child.stderr
    for kernel in ("neon_dotprod", "neon"):
        assert re.search(rf"^{kernel} +int8 .* 0 wrong$", child.stdout, re.MULTILINE), child.stdout


def functions(disassembly: str) -> dict[str, list[str]]:
    """The mnemonics and operands of each function."""
    found: dict[str, list[str]] = {}
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            instructions = found.setdefault(header[1], [])
        elif "\t" in line:
            instructions.append(line.split("\t", 1)[1])
    return found


def is_avx(instruction: str) -> bool:
    """Or AVX-512 or AMX. Of all others only `verr` and `verw` begin with v, and none with k."""
    return bool(re.match(r"v(?!er[rw]\b)|k|tile|tdp|ldtile|sttile", instruction) or re.search(r"%[yz]mm", instruction))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for the instructions of AVX and AMX")
def test_no_instruction_set_leaks_out_of_its_files(built: Path) -> None:
    """A function that runs before dispatch, or on an older processor, must not have been compiled for a newer one."""
    with_avx = set()
    for path in sorted((built / "csrc").glob("*.o")):
        for function, instructions in functions(tool("objdump", "-dC", "--no-show-raw-insn", path)).items():
            bad = [instruction for instruction in instructions if is_avx(instruction)]
            if not bad:
                continue
            allowed = OF_AN_INSTRUCTION_SET.fullmatch(path.stem) or (path.stem == "memory" and "::sum_avx" in function)
            assert allowed, f"{function} in {path.name}: {bad[0]}"
            with_avx.add(path.stem)
    named = {path.stem for path in (ROOT / "csrc").glob("*.cpp") if OF_AN_INSTRUCTION_SET.fullmatch(path.stem)}
    assert with_avx == named | {"memory"}, "the disassembly was not understood"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for the objects of AVX and AMX")
def test_code_for_an_instruction_set_is_not_shared(built: Path) -> None:
    """Neither through functions that the linker merges with those of other files, nor by running at load."""
    for path in sorted((built / "csrc").glob("*.o")):
        if not OF_AN_INSTRUCTION_SET.fullmatch(path.stem):
            continue
        symbols = [line.split(maxsplit=2)[-2:] for line in tool("nm", "-C", "--defined-only", path).splitlines()]
        assert symbols
        shared = [name for kind, name in symbols if kind in "WVuwvi"]
        assert shared == [], path.name
        assert ".init_array" not in tool("objdump", "-h", path), f"{path.name} runs code when it is loaded"
