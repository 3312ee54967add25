"""Compiled functions where their machine code can and cannot be kept on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODULE = """
from moert.machine_code import compiled

@compiled
def twice(x):
    return 2 * x

@compiled
def thrice(x):
    return 3 * x

print(twice(4), thrice(4))
"""


def run(folder: Path, home: str) -> subprocess.CompletedProcess[str]:
    (folder / "functions.py").write_text(MODULE)
    unset = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", "import functions"],
        cwd=folder,
        env={**environment, "HOME": home},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_is_kept_beside_the_source(tmp_path: Path) -> None:
    child = run(tmp_path, "/dev/null")
    assert (child.returncode, child.stdout, child.stderr) == (0, "8 12\n", "")
    assert len(list((tmp_path / "__pycache__").glob("functions.*.nbc"))) == 2


def test_without_a_place_on_disk_it_is_compiled_each_time(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").write_text("")  # no folder can be made there, not even by root
    child = run(tmp_path, "/dev/null")
    assert (child.returncode, child.stdout) == (0, "8 12\n"), child.stderr
    assert child.stderr.count("RuntimeWarning") == 1
    assert "NUMBA_CACHE_DIR" in child.stderr


EVERYTHING = """
from numba.core import caching
(getattr(caching, "CacheImpl", None) or caching._CacheImpl)._locator_classes = []
import moert.predictors._joint, moert.suit._scans
from simulate_support import trace_of
from moert.simulate import simulate
trace = trace_of([4], [[[0, 1]], [[0, 2]], [[0, 1]]])
print([simulate(trace, policy, 2).hits for policy in ("lru", "belady")])
"""


def test_all_that_is_compiled_runs_without_a_place_on_disk() -> None:
    child = subprocess.run(
        [sys.executable, "-c", EVERYTHING], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert (child.returncode, child.stdout) == (0, "[2, 2]\n"), child.stderr
    assert child.stderr.count("compiled code cannot be kept") == 1
