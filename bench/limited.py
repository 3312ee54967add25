"""One benchmark run: a child process under a memory limit, and what became of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cgroup import MemoryGroup, memory_group
from systems import Run, Spec

from moert.config import format_bytes
from moert.errors import CapacityError

SYSTEMS = Path(__file__).with_name("systems.py")


@dataclass
class Outcome:
    """A run's measurements, or why there are none."""

    system: str
    run: Run | None = None
    error: str = ""
    group_peak_bytes: int | None = None
    oom_kills: int = 0
    hf_memory_bytes: int | None = None
    share_of_disk_limit: float | None = None
    """Time the disk at its best would have taken for what was read while decoding, over the time decoding took."""

    def judge(self, disk_bytes_per_s: float) -> None:
        """Set `share_of_disk_limit`, given what the disk can do."""
        if self.run is not None and self.run.decode_s > 0:
            read_bytes = self.run.decode_read_bytes or self.run.stats.get("bytes_read", 0)
            self.share_of_disk_limit = read_bytes / disk_bytes_per_s / self.run.decode_s

    @property
    def tokens_per_s(self) -> float | None:
        """Of decoding alone."""
        return (len(self.run.tokens) - 1) / self.run.decode_s if self.run and self.run.decode_s > 0 else None


@contextlib.contextmanager
def _group(limit_bytes: int | None) -> Iterator[MemoryGroup | None]:
    if limit_bytes is None:
        yield None
    else:
        with memory_group(limit_bytes) as group:
            yield group


def limit_refused(limit_bytes: int) -> str:
    """Why no limit can be set here; empty when one can."""
    try:
        with memory_group(limit_bytes):
            return ""
    except CapacityError as error:
        return str(error)


def run_child(spec: Spec, limit_bytes: int | None, *, timeout_s: float, python: str = sys.executable) -> Outcome:
    """Run `spec` in a child of its own, limited to `limit_bytes` (None: no limit), and wait for it.

    A child that fails, is killed for memory or takes longer than `timeout_s` gives an outcome with an error.
    """
    outcome = Outcome(spec.system, hf_memory_bytes=spec.hf_memory_bytes if spec.system == "hf" else None)
    with tempfile.TemporaryDirectory(prefix="moert-bench-") as folder, _group(limit_bytes) as group:
        spec_path, result_path, log_path = (Path(folder) / name for name in ("spec.json", "result.json", "log"))
        spec_path.write_text(json.dumps(asdict(spec)))
        arguments = [python, str(SYSTEMS), str(spec_path), str(result_path)]
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                group.command(arguments) if group else arguments, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                code = child.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                outcome.error = f"not done after {timeout_s:.0f} s"
                code = None
            finally:
                child.kill()
                child.wait()
        if group is not None:
            outcome.group_peak_bytes, outcome.oom_kills = group.peak_bytes, group.oom_kills
        if outcome.oom_kills and limit_bytes is not None:
            outcome.error = f"killed: needs more than {format_bytes(limit_bytes)}"
        elif code:
            last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
            outcome.error = f"exit {code}: {last[0] if last else 'no output'}"
        elif code == 0:
            outcome.run = Run(**json.loads(result_path.read_text()))
    return outcome
