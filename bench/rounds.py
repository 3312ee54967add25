"""The rounds of the offload benchmark: systems take turns, the disk is measured before and after each round."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diskspeed import DiskSpeed, drop_page_cache, measure
from limited import Outcome, run_child
from systems import RESIDENT, Spec

SMALLEST_HF_BYTES = 1 << 20


@dataclass
class Round:
    """One turn of every system between two measurements of the disk."""

    disk_before: DiskSpeed
    disk_after: DiskSpeed
    outcomes: list[Outcome]

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON."""
        return asdict(self)


@dataclass
class Bench:
    """What stays the same over all runs."""

    files: list[Path]
    """All that the systems read weights from: out of the page cache before each run."""
    record_bytes: int
    limit_bytes: int | None
    timeout_s: float
    disk_seconds: float
    llama_python: str = sys.executable
    say: Callable[[str], None] = field(default=lambda text: None)

    def run(self, spec: Spec, limited: bool = True) -> Outcome:
        """One run from a cold page cache; hf gets less memory for weights until the limit lets it live."""
        drop_page_cache(self.files)
        limit_bytes = self.limit_bytes if limited and spec.system != RESIDENT else None
        if spec.system != "hf":
            python = self.llama_python if spec.system == "llama.cpp" else sys.executable
            return run_child(spec, limit_bytes, timeout_s=self.timeout_s, python=python)
        kills = 0
        while True:
            with tempfile.TemporaryDirectory(prefix="moert-bench-") as folder:
                outcome = run_child(replace(spec, offload_folder=folder), limit_bytes, timeout_s=self.timeout_s)
            kills += outcome.oom_kills
            if not outcome.oom_kills or spec.hf_memory_bytes <= SMALLEST_HF_BYTES:
                outcome.oom_kills = kills
                return outcome
            # Kept in the caller's spec: later rounds need not die as often.
            spec.hf_memory_bytes = max(SMALLEST_HF_BYTES, spec.hf_memory_bytes // 2)
            drop_page_cache(self.files)

    def disk(self) -> DiskSpeed:
        return measure(self.files, self.record_bytes, seconds=self.disk_seconds)

    def rounds(self, specs: list[Spec], count: int) -> list[Round]:
        """`count` rounds, each starting with another system."""
        done = []
        after = self.disk()
        for number in range(count):
            before, outcomes = after, []
            for place in range(len(specs)):
                spec = specs[(number + place) % len(specs)]
                self.say(f"round {number + 1} of {count}: {spec.system}")
                outcomes.append(self.run(spec))
            after = self.disk()
            disk_bytes_per_s = statistics.mean((before.bytes_per_s, after.bytes_per_s))
            for outcome in outcomes:
                outcome.judge(disk_bytes_per_s)
            done.append(Round(before, after, outcomes))
        return done
