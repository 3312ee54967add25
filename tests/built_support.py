"""The package as setup.py builds it from a fresh checkout: once for all tests that look at what came out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGIN_FOLDERS = ("kernels", "predictors")

# `make test` hands its own state down; a make that inherits it talks about directories and may take other variables.
OUTSIDE_MAKE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

# For tests that ask for the build, which takes a minute or two.
in_one_process = pytest.mark.xdist_group("built")

BLOCK_TORCH = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "numpy", "pybind11", "nanobind"):
            raise ImportError(f"the build imports {name}")
sys.meta_path.insert(0, Blocker())
"""


class Built(NamedTuple):
    """What a build leaves; read only."""

    wheel: Path
    objects: Path
    """Of csrc/, one for each source."""


def run_python(code: str, cwd: Path, **env: str) -> str:
    """What a fresh interpreter prints; it must end well."""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def copy_sources(tree: Path) -> Path:
    """What packaging looks at, as a fresh checkout has it: nothing compiled."""
    for folder in ("moert", "csrc", *PLUGIN_FOLDERS):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    return tree


@cache
def build(base: Path) -> Built:
    """A wheel, made below `base` through setup.py in a process that cannot import torch."""
    tree = copy_sources(base / "built")
    run_python(
        f"{BLOCK_TORCH}\nsys.argv[1:] = ['-q', 'bdist_wheel']\nrunpy.run_path('setup.py', run_name='__main__')", tree
    )
    (wheel,) = (tree / "dist").glob("*.whl")
    (objects,) = (tree / "build").glob("temp.*/csrc")
    return Built(wheel, objects)
