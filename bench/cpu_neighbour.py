"""Decode beside a busy neighbour: how much of its quiet speed each contender keeps when one core has other work."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from cpu_measure import Job, settle
from rich.table import Table

# Long against the slices of a few ms in which the kernel shares out a core.
SAMPLE_S = 0.25
SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


class Neighbour:
    """A process that keeps one core busy while it is not stopped."""

    def __init__(self, core: int) -> None:
        self.core = core
        self._child = subprocess.Popen([sys.executable, "-c", SPIN, str(core)])
        time.sleep(0.2)
        self._child.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """The core is busy within."""
        self._child.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._child.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()


def measure_neighbour(
    jobs: dict[str, list[Job]],
    begin: dict[str, Callable[[], None]],
    count: int,
    draw: random.Random,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Each contender quiet and beside the neighbour, in turns, in another order each round."""
    neighbour = Neighbour(max(os.sched_getaffinity(0)))
    samples: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in jobs}
    turns = [(name, state) for name in jobs for state in ("quiet", "busy")]
    try:
        for number in range(count):
            for name, state in draw.sample(turns, len(turns)):
                say(f"round {number + 1} of {count}: {name}, {state}")
                settle()
                begin[name]()
                with neighbour.busy() if state == "busy" else contextlib.nullcontext():
                    samples[name][state].append(_step_s(jobs[name]))
    finally:
        neighbour.close()
    rows = []
    for name, of_state in samples.items():
        quiet, busy = (statistics.median(of_state[state]) for state in ("quiet", "busy"))
        rows.append({"system": name, "quiet_ms": 1e3 * quiet, "busy_ms": 1e3 * busy, "kept": quiet / busy})
    return {"core": neighbour.core, "rows": rows, "samples": samples}


def _step_s(jobs: list[Job]) -> float:
    steps = 0
    jobs[-1]()
    start = time.perf_counter()
    while time.perf_counter() - start < SAMPLE_S:
        jobs[steps % len(jobs)]()
        steps += 1
    return (time.perf_counter() - start) / steps


def neighbour_table(title: str, result: dict[str, Any]) -> Table:
    """Quiet and busy times, and the share of quiet speed that is left."""
    table = Table("", "quiet ms", "busy ms", "speed kept", title=f"{title}, core {result['core']} busy")
    for row in result["rows"]:
        table.add_row(row["system"], f"{row['quiet_ms']:.2f}", f"{row['busy_ms']:.2f}", f"{row['kept']:.0%}")
    return table
