"""Work of the GPU session in a process of its own: what fails, hangs or is killed there ends alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ending:
    """What became of some work."""

    ended: str
    """"well", or how else."""
    seconds: float
    rows: list[dict[str, Any]]
    """Those that it had written by then."""


def run_apart(work: Callable[[Any], None], limit_s: float, *, leads: bool = False) -> Ending:
    """Call `work` with `Rows` in a fork of this process, and end it after `limit_s` seconds.

    A fork need not import torch again; nothing of CUDA may be in use before it, nor may torch have used its threads.

    Args:
        leads: what the work starts ends with it; else it ends with whatever ends this process's group.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.json"
        child = get_context("fork").Process(target=_in_child, args=(work, path, leads))
        child.start()
        assert child.pid is not None
        child.join(max(1.0, limit_s))
        ended = "well"
        if child.is_alive():
            ended = f"not within {time.monotonic() - begin:.0f} s"
        elif child.exitcode:
            error = path.with_suffix(".error")
            ended = error.read_text() if error.exists() else f"with exit code {child.exitcode}"
        if leads:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
        rows = json.loads(path.read_text()) if path.exists() else []
    return Ending(ended, round(time.monotonic() - begin, 1), rows)


def _in_child(work: Callable[[Any], None], path: Path, leads: bool) -> None:
    if leads:
        os.setsid()
    from gpu_results import Rows

    code = 0
    try:
        work(Rows(path))
    except Exception as problem:
        traceback.print_exc()
        path.with_suffix(".error").write_text(f"{type(problem).__name__}: {str(problem).strip()[:500]}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
