"""What the offload benchmark says at the end: one row a system, from the medians of its rounds."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from limited import Outcome
from rich.table import Table
from systems import RESIDENT, Run

from moert.config import format_bytes
from moert.torch_threads import settings


def _median(runs: list[Run], value: Callable[[Run], float]) -> float:
    return statistics.median(value(run) for run in runs)


def agreement(tokens: list[int], reference: list[int]) -> str:
    """How many tokens two runs have in common before they part."""
    common = next((n for n, pair in enumerate(zip(tokens, reference, strict=False)) if pair[0] != pair[1]), len(tokens))
    return f"{common} of {len(tokens)}"


def summarise(
    system: str, outcomes: list[Outcome], *, speed: bool, reference: list[int] | None = None
) -> dict[str, Any]:
    """Medians over the rounds of one system; no speeds where `speed` is false (its parity check failed).

    `reference` are the tokens of hf, where it ran.
    """
    runs = [outcome.run for outcome in outcomes if outcome.run is not None]
    peaks = [outcome.group_peak_bytes for outcome in outcomes if outcome.group_peak_bytes is not None]
    row: dict[str, Any] = {
        "system": system,
        "rounds": len(runs),
        "oom_kills": sum(outcome.oom_kills for outcome in outcomes),
        "group_peak_bytes": max(peaks, default=None),
        "error": next((outcome.error for outcome in outcomes if outcome.error), ""),
    }
    if not runs:
        return row
    steps = max(1, len(runs[0].tokens) - 1)
    row |= {
        "detail": runs[-1].detail,
        "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
        "disk_bytes_per_token": _median(runs, lambda run: run.decode_read_bytes / steps),
        "cpu_s_per_token": _median(runs, lambda run: run.decode_cpu_s / steps),
        "cpu_s": _median(runs, lambda run: run.cpu_s),
        "tokens_as_hf": None if reference is None else agreement(runs[0].tokens, reference),
    }
    if runs[0].stats:
        row["moert_bytes_per_token"] = _median(runs, lambda run: run.stats["bytes_read"] / steps)
        row["hit_rate"] = _median(
            runs, lambda run: run.stats["hits"] / max(1.0, run.stats["hits"] + run.stats["misses"])
        )
        row["stall_s_per_token"] = _median(runs, lambda run: run.stats["stall_s"] / steps)
    if speed:
        speeds = [outcome.tokens_per_s for outcome in outcomes if outcome.tokens_per_s is not None]
        shares = [outcome.share_of_disk_limit for outcome in outcomes if outcome.share_of_disk_limit is not None]
        row |= {
            "tokens_per_s": statistics.median(speeds) if speeds else None,
            "tokens_per_s_range": [min(speeds), max(speeds)] if speeds else None,
            "first_token_s": _median(runs, lambda run: run.first_token_s),
            "load_s": _median(runs, lambda run: run.load_s),
            "share_of_disk_limit": statistics.median(shares) if shares else None,
        }
    return row


def set_share_of_limit(rows: list[dict[str, Any]]) -> None:
    """Give moert's row its share of the slower limit, the disk's or that of its own computing with nothing to read."""
    row = next((row for row in rows if row["system"] == "moert"), {})
    resident = next((row for row in rows if row["system"] == RESIDENT), {}).get("tokens_per_s")
    if resident and row.get("tokens_per_s") and row.get("share_of_disk_limit") is not None:
        row["share_of_limit"] = max(row["share_of_disk_limit"], row["tokens_per_s"] / resident)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """One column a system; a dash where nothing was measured."""
    result = Table("", *(row["system"] for row in rows), title=title, title_justify="left")

    def add(label: str, key: str, form: Callable[[Any], str]) -> None:
        if any(row.get(key) is not None for row in rows):
            result.add_row(label, *("-" if row.get(key) is None else form(row[key]) for row in rows))

    add("tokens/s", "tokens_per_s", "{:.2f}".format)
    add("  over the rounds", "tokens_per_s_range", lambda ends: f"{ends[0]:.2f} to {ends[1]:.2f}")
    add("first token after", "first_token_s", "{:.2f} s".format)
    add("loaded in", "load_s", "{:.1f} s".format)
    add("read a token", "disk_bytes_per_token", format_bytes)
    add("of the disk's limit", "share_of_disk_limit", "{:.0%}".format)
    add("of the slower limit", "share_of_limit", "{:.0%}".format)
    add("hits", "hit_rate", "{:.1%}".format)
    add("stall a token", "stall_s_per_token", "{:.3f} s".format)
    add("CPU a token", "cpu_s_per_token", "{:.3f} s".format)
    add("peak RSS", "peak_rss_bytes", format_bytes)
    add("with page cache", "group_peak_bytes", format_bytes)
    add("first tokens as hf's", "tokens_as_hf", str)
    add("killed for memory", "oom_kills", str)
    result.add_row("remarks", *(row["error"] or row.get("detail", "") for row in rows))
    return result


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    packages = ("moert", "torch", "transformers", "accelerate")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch_threads": settings(),
        **{package: metadata.version(package) for package in packages},
    }
