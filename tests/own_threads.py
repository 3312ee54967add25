"""Threads that Python knows nothing of."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def disk_threads() -> int:
    """How many threads of the extension there are that read records, by the names the kernel has."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            count += Path(f"/proc/self/task/{task}/comm").read_text().startswith("moert-disk")
    return count


def check_no_disk_threads() -> None:
    """They are gone, or about to be: the kernel forgets a thread a moment after whoever waited for its end."""
    patience = time.monotonic() + 20
    while disk_threads() > 0:
        assert time.monotonic() < patience
        time.sleep(0.001)
