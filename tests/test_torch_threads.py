"""How long torch's threads spin: limited by the command line before torch is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
COMMAND = """
import runpy, sys
sys.argv = ["moert", "--version"]
try:
    runpy.run_module("moert", run_name="__main__")
except SystemExit:
    pass
import torch
"""
MEASURED = "from moert.torch_threads import spinning_s\nprint(spinning_s())"

needs_gomp = pytest.mark.skipif(
    "libgomp" not in Path("/proc/self/maps").read_text(), reason=f"torch {torch.__version__} has another OpenMP"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    child = subprocess.run(
        [sys.executable, "-c", code], env={**unset, **environment}, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    return child


@needs_gomp
@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "777"}, "777"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_the_library_of_torchs_threads_has_read_the_commands_setting(environment: dict[str, str], count: str) -> None:
    # It says what it has read when torch is imported, so a torch that comes too early shows.
    child = python(COMMAND, OMP_DISPLAY_ENV="VERBOSE", **environment)
    assert child.stdout.startswith("moert ")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", child.stderr) == [count]


@needs_gomp
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="threads that share one core do not spin")
def test_what_spins_is_measured() -> None:
    spinning, resting = (
        float(python(MEASURED, OMP_NUM_THREADS="2", GOMP_SPINCOUNT=count).stdout) for count in ("1000000000", "1000")
    )
    assert resting < 0.001 < spinning <= 0.03
    assert float(python(MEASURED, OMP_NUM_THREADS="1").stdout) == 0
