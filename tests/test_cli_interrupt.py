"""Ctrl-C: exit code 130 within seconds, no traceback, nothing left in the temporary folder."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from cli_support import PROMPT, checkpoint

# Reports each expert that is preloaded, and takes its time over it.
SLOW_LOAD = """
import sys, time
import moert.runtime.building as building
preload = building.preload
def slow(layers, reads_in_flight, progress=None):
    def report(done, total):
        print("LOADING", flush=True)
        time.sleep(0.2)
    preload(layers, reads_in_flight, report)
building.preload = slow
from moert.cli import main
sys.exit(main(sys.argv[1:]))
"""
STARTS_WITHIN_S = 120
ENDS_WITHIN_S = 30


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.getbasetemp() / "cli")


def wait_for_output(stream: IO[bytes]) -> bytes:
    ready, _, _ = select.select([stream], [], [], STARTS_WITHIN_S)
    assert ready, "no output"
    return os.read(stream.fileno(), 1 << 16)


@pytest.mark.parametrize("phase", ["load", "generate"])
def test_interrupt(phase: str, folder: Path, tmp_path: Path) -> None:
    command = ["run", str(folder), PROMPT, "--max-new-tokens", "1000000", "--cache-dir", str(tmp_path)]
    how = ["-c", SLOW_LOAD] if phase == "load" else ["-m", "moert"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *how, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as child:
        try:
            assert child.stdout is not None
            first = wait_for_output(child.stdout)
            assert first.startswith(b"LOADING") is (phase == "load")
            child.send_signal(signal.SIGINT)
            sent = time.monotonic()
            _, err = child.communicate(timeout=ENDS_WITHIN_S)
        finally:
            child.kill()
    assert child.returncode == 130
    assert err == b""
    assert time.monotonic() - sent < ENDS_WITHIN_S
    assert not list(tmp_path.iterdir())
