"""Reads that go wrong beneath the reader of csrc/, from outside the process: short, interrupted, late and failing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One process runs a model with all faults, one kind after the other.
pytestmark = pytest.mark.xdist_group("faulty reads")

SHIM = Path(__file__).parent / "native" / "faulty_pread.c"

SOUND = "none"
HARMLESS = (
    "seed=1,short=40,eintr=0,eio=0,delay_us=0",
    "seed=2,short=10,eintr=40,eio=0,delay_us=300",
    "seed=3,short=25,eintr=25,eio=0,delay_us=3000",
)
FAILING = "seed=5,short=5,eintr=5,eio=25,delay_us=100"

CODE = """
import json, os, sys, torch, moert
from moert.errors import MoertError
from moert.hf.model import runtime_of

def generate(faults):
    os.environ["FAULTY_PREAD"] = ""
    model = moert.load(sys.argv[1], host_memory="50%")
    os.environ["FAULTY_PREAD"] = faults
    tokens, failed = [], 0
    while len(tokens) < 30:
        try:
            with torch.inference_mode():
                out = model(torch.tensor([[3, 1, 4, *tokens]]), use_cache=False)
        except MoertError as error:
            failed += 1
            assert "Input/output error" in str(error), error
            assert failed < 500
            continue
        tokens.append(int(out.logits[0, -1].argmax()))
    for layer in runtime_of(model).layers:
        layer.residency.check_integrity()
    stats = moert.stats(model)
    moert.close(model)
    return {"tokens": tokens, "failed": failed, "reads": stats.bytes_read, "misses": stats.misses}

print(json.dumps({faults: generate(faults) for faults in sys.argv[2:]}))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("shim") / "faulty_pread.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def found(shim: Path, tiny_olmoe: Path) -> dict[str, Any]:
    """What a process finds with each kind of faults."""
    run = subprocess.run(
        [sys.executable, "-c", CODE, tiny_olmoe, SOUND, *HARMLESS, FAILING],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    of_each: dict[str, Any] = json.loads(run.stdout)
    assert of_each[SOUND]["failed"] == 0
    return of_each


@pytest.mark.parametrize("faults", HARMLESS)
def test_short_late_and_interrupted_reads_change_nothing(faults: str, found: dict[str, Any]) -> None:
    assert found[faults]["tokens"] == found[SOUND]["tokens"]
    assert found[faults]["failed"] == 0
    assert found[faults]["misses"] > 0


def test_failed_reads_raise_and_the_step_can_be_run_again(found: dict[str, Any]) -> None:
    assert found[FAILING]["tokens"] == found[SOUND]["tokens"]
    assert found[FAILING]["failed"] > 0, "no read failed, so nothing has been shown"
