"""What the GPU benchmark writes down: rows as they come, one file of all steps, and the table at the end."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

END_TO_END = {"G7": "time over max(copies, compute)", "G9": "decoding with offloading, share of the bound"}
"""Goals that the table names even if no step came to them."""

PACKAGES = ("torch", "triton", "transformers", "moert")


@dataclass(frozen=True)
class Target:
    """A number to reach: at most, or at least."""

    bound: float
    at_most: bool = True

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


class Rows:
    """The rows of one step; the file is whole after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self._write()

    def add(
        self, what: str, value: float | None, unit: str, *, goal: str = "", target: Target | None = None, **more: Any
    ) -> None:
        """One number, printed and kept. A `value` of None: it was not measured, and `more` says why."""
        met = None if target is None or value is None else target.is_met(value)
        row = {"goal": goal, "what": what, "value": value, "unit": unit, "target": target and str(target), "met": met}
        self.rows.append({**row, **more})
        self._write()
        number = "not measured" if value is None else f"{value:.4g} {unit}"
        notes = "  ".join(
            f"{key}={_short(item)}" for key, item in more.items() if not isinstance(item, dict | list | None)
        )
        print(f"{goal:4} {what:<58} {number:<18} {notes}", flush=True)

    def extend(self, rows: list[dict[str, Any]]) -> None:
        """Those of another process, which has printed them."""
        self.rows += rows
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.rows))
        os.replace(temporary, self._path)


def _short(item: Any) -> str:
    return f"{item:.4g}" if isinstance(item, float) else str(item)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def summary(steps: dict[str, dict[str, Any]], dry: bool) -> list[Table]:
    """How each step ended, and every row that has a goal."""
    first = Table(Column("step"), Column("ended"), Column("s", justify="right"), title="Steps", title_justify="left")
    for name, step in steps.items():
        first.add_row(name, step["ended"], f"{step['seconds']:.0f}")
    title = "Goals" + (" (a dry run under the interpreter: the times mean nothing)" if dry else "")
    second = Table("", "", Column(justify="right"), "", "target", "met", title=title, title_justify="left")
    for step in steps.values():
        for row in step["rows"]:
            if not row["goal"]:
                continue
            value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
            met = "" if row["met"] is None or dry else "yes" if row["met"] else "NO"
            second.add_row(row["goal"], row["what"], value, row["unit"], row["target"] or "", met)
    reached = {row["goal"] for step in steps.values() for row in step["rows"]}
    for goal, what in END_TO_END.items():
        if goal not in reached:
            second.add_row(goal, what, "not measured", "", "", "")
    return [first, second]
