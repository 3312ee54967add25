"""Plots of what the GPU session found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(steps: dict[str, dict[str, Any]], stem: Path) -> list[Path]:
    """One PNG for each step that has something to show, at `stem`-STEP.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for name, plot in _PLOTS.items():
        rows = [row for row in steps.get(name, {}).get("rows", []) if row["value"] is not None]
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        if plot(axes, rows, steps):
            axes.legend(fontsize=8)
            axes.grid(alpha=0.3)
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=130)
            made.append(path)
        plt.close(figure)
    return made


def _lines(axes: Any, rows: list[Row], name: Callable[[Row], str], x: str) -> bool:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) is not None:
            series.setdefault(name(row), []).append((row[x], row["value"]))
    for label, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    return bool(series)


def _peak(steps: dict[str, dict[str, Any]], key: str) -> float | None:
    rows = steps.get("peaks", {}).get("rows", [])
    return next((row["value"] for row in rows if row.get("key") == key), None)


def _decode(axes: Any, rows: list[Row], steps: dict[str, dict[str, Any]]) -> bool:
    axes.set(xlabel="tokens", ylabel="µs a layer", yscale="log", title="A layer's experts, few tokens")
    found = _lines(axes, rows, lambda row: f"{row['contender']}, {row['format']}", "tokens")
    peak = _peak(steps, "device_copy")
    floor = sorted({(row["tokens"], row["bytes"] / peak / 1e3) for row in rows if peak and row.get("format") == "bf16"})
    if floor:
        axes.plot(*zip(*floor, strict=True), "k--", label="bf16 weights at the speed of a copy")
    return found


def _grouped(axes: Any, rows: list[Row], steps: dict[str, dict[str, Any]]) -> bool:
    axes.set(xlabel="tokens", ylabel="TFLOP/s", xscale="log", title="A layer's experts, many tokens")
    found = _lines(axes, rows, lambda row: f"{row['contender']}, {row['format']}", "tokens")
    dense = _peak(steps, "dense")
    if dense is not None:
        axes.axhline(dense, color="k", linestyle="--", label="a dense product")
    return found


def _copies(axes: Any, rows: list[Row], steps: dict[str, dict[str, Any]]) -> bool:
    axes.set(xlabel="programs", ylabel="GB/s", xscale="log", title="Rows from pinned memory by a kernel")
    found = _lines(axes, rows, lambda row: f"rows of {row['row']}", "programs")
    peak = _peak(steps, "host_to_device")
    if peak is not None:
        axes.axhline(peak, color="k", linestyle="--", label="the copy engine")
    return found


_PLOTS: dict[str, Callable[[Any, list[Row], dict[str, dict[str, Any]]], bool]] = {
    "decode": _decode,
    "grouped": _grouped,
    "copies": _copies,
}
