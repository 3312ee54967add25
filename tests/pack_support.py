"""Packs of tiny models for the tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moert
from moert.formats import FormatChoice
from moert.hf.pack_check import PackCheck, check_pack
from moert.hf.packing import Packed, pack


def make_pack(source: Path, out: Path, stored_as: str = "plain", **options: Any) -> Packed:
    """`moert pack SOURCE OUT --format STORED_AS`, in this process."""
    return pack(str(source), out, stored_as=FormatChoice.parse(stored_as), moert_version=moert.__version__, **options)


def problems(folder: Path, **options: Any) -> tuple[str, ...]:
    """What `moert pack FOLDER --verify` finds."""
    found: PackCheck = check_pack(folder, **options)
    return found.problems


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits_of(folder: Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """One forward of the model in a folder, loaded by moert."""
    with moert.load(folder, **{"host_memory": "25%", **options}) as model, torch.no_grad():
        found: torch.Tensor = model(ids).logits
        return found


@contextlib.contextmanager
def mounted(folder: Path, options: str, kind: str = "tmpfs") -> Iterator[None]:
    """A file system of its own on a new folder, or the test is skipped."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", kind, "-o", options, kind, folder]).returncode:
        pytest.skip("mounting a file system takes privileges")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


IDS = torch.arange(3, 40).remainder(100)[None]
