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

SHIM = Path(__file__).parent / "native" / "faulty_pread.c"

CODE = """
import json, os, sys, torch, moert
from moert.errors import MoertError
from moert.hf.model import runtime_of
model = moert.load(sys.argv[1], host_memory="50%")
os.environ["FAULTY_PREAD"] = sys.argv[2]
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
print(json.dumps({"tokens": tokens, "failed": failed, "reads": stats.bytes_read, "misses": stats.misses}))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("shim") / "faulty_pread.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


def generate(checkpoint: Path, shim: Path | None, faults: str = "") -> dict[str, Any]:
    env = dict(os.environ)
    if shim is not None:
        env["LD_PRELOAD"] = str(shim)
    run = subprocess.run(
        [sys.executable, "-c", CODE, checkpoint, faults], env=env, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def sound(tiny_olmoe: Path) -> dict[str, Any]:
    return generate(tiny_olmoe, None)


@pytest.mark.parametrize(
    "faults",
    [
        "seed=1,short=40,eintr=0,eio=0,delay_us=0",
        "seed=2,short=10,eintr=40,eio=0,delay_us=300",
        "seed=3,short=25,eintr=25,eio=0,delay_us=3000",
    ],
)
def test_short_late_and_interrupted_reads_change_nothing(
    faults: str, shim: Path, tiny_olmoe: Path, sound: dict[str, Any]
) -> None:
    found = generate(tiny_olmoe, shim, faults)
    assert found["tokens"] == sound["tokens"]
    assert found["failed"] == 0
    assert found["misses"] > 0


def test_failed_reads_raise_and_the_step_can_be_run_again(shim: Path, tiny_olmoe: Path, sound: dict[str, Any]) -> None:
    found = generate(tiny_olmoe, shim, "seed=5,short=5,eintr=5,eio=25,delay_us=100")
    assert found["tokens"] == sound["tokens"]
    assert found["failed"] > 0, "no read failed, so nothing has been shown"
