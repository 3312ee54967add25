"""A fresh interpreter in which every word on stderr is a failure."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(code: str, *, timeout: float = 120, **env: str) -> str:
    """Standard output of a fresh interpreter; it must end well and say nothing on stderr."""
    inherited = {name: value for name, value in os.environ.items() if name != "MOERT_THREADS"}
    # Newer interpreters warn of every fork beside threads, which is what some of these are about.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    child = subprocess.run(command, env={**inherited, **env}, capture_output=True, text=True, timeout=timeout)
    assert (child.returncode, child.stderr) == (0, ""), child.stdout + child.stderr
    return child.stdout
