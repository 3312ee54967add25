"""Settings that libraries read when they are loaded, which is before a program knows its options."""

from __future__ import annotations

import os
import sys

from moert.torch_threads import settings


def start_with(wanted: dict[str, str]) -> None:
    """Start this program anew with these variables; returns where they are set already."""
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def spinning_line() -> str:
    """How long torch's threads spin here, for people. It is the same for all that one process times."""
    found = " ".join(f"{name}={value}" for name, value in settings().items())
    return f"torch's threads, for everybody: {found or 'as long as their library has it'}"
