"""What the CPU expert benchmark says: a table a cell, a JSON file, and a plot."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from cpu_layers import Shape, Step
from cpu_measure import Cell, read_limit
from report import machine
from rich.table import Column, Table

PACKAGES = ("numpy", "kt-kernel", "llama-cpp-python")


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarise(
    cell: Cell, shape: Shape, step: Step, expert_bytes: dict[str, float], ours: str, threads: int
) -> list[dict[str, Any]]:
    """One row a contender that was timed, the fastest first."""
    rows = []
    read_bytes_per_s = statistics.median(cell.limits[read_limit(threads)])
    operations = 2.0 * shape.expert_numbers * step.ids.numel()
    medians = {name: statistics.median(one.seconds for one in taken) for name, taken in cell.samples.items()}
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        taken = cell.samples[name]
        touched_bytes = expert_bytes[name] * step.touched
        rows.append(
            {
                "system": name,
                "median_ms": 1e3 * seconds,
                "min_ms": 1e3 * min(one.seconds for one in taken),
                "p90_ms": 1e3 * percentile([one.seconds for one in taken], 0.9),
                "touched_bytes": touched_bytes,
                "bytes_per_s": touched_bytes / seconds,
                "share_of_read_limit": touched_bytes / seconds / read_bytes_per_s,
                "operations_per_s": operations / seconds,
                "times_ours": seconds / medians[ours] if ours in medians else None,
                "waited": statistics.median(one.waited for one in taken),
            }
        )
    return rows


def cell_table(title: str, rows: list[dict[str, Any]], contenders: dict[str, dict[str, Any]]) -> Table:
    """Times of one cell, with the error of each contender beside them."""
    result = Table(
        Column("", no_wrap=True),
        *("ms", "min", "p90", "GB/s", "of limit", "GFLOP/s", "x ours", "error", "waited"),
        title=title,
        title_justify="left",
    )
    for row in rows:
        about = contenders[row["system"]]
        result.add_row(
            row["system"],
            f"{row['median_ms']:.2f}",
            f"{row['min_ms']:.2f}",
            f"{row['p90_ms']:.2f}",
            f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{row['share_of_read_limit']:.0%}",
            f"{row['operations_per_s'] / 1e9:.0f}",
            "-" if row["times_ours"] is None else f"{row['times_ours']:.2f}",
            f"{about['error']:.2%}",
            f"{row['waited']:.0%}",
        )
    return result


def limits_line(cell: Cell) -> str:
    """The machine's limits in the rounds of one cell."""
    return "; ".join(
        f"{name.rpartition(',')[0]} {statistics.median(rates) / 1e9:.1f} G/s"
        for name, rates in sorted(cell.limits.items())
    )


def cell_as_dict(cell: Cell) -> dict[str, Any]:
    """Every sample, for JSON."""
    return {
        "samples": {name: [asdict(one) for one in taken] for name, taken in cell.samples.items()},
        "limits": cell.limits,
        "longest_rest_s": cell.rest_s,
    }


def about_machine() -> dict[str, Any]:
    """The machine and the versions of everything that computes."""
    found = machine()
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))), ""
    )
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16")
    found["instruction_sets"] = [name for name in wanted if name in flags.split()]
    return found


def plot(cells: list[dict[str, Any]], path: Path, title: str) -> None:
    """Grouped bars: share of the read limit for one token, GFLOP/s for batches."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def label(cell: dict[str, Any]) -> str:
        batch = "" if cell["batch"] == 1 else f"\n{cell['batch']} tokens"
        return f"{cell['shape']}\n{cell['format']}{batch}"

    single = [cell for cell in cells if cell["batch"] == 1]
    several = [cell for cell in cells if cell["batch"] > 1]
    panels = [
        (single, "share_of_read_limit", 100.0, "% of the read limit, one token"),
        (several, "operations_per_s", 1e-9, "GFLOP/s, batches"),
    ]
    panels = [panel for panel in panels if panel[0]]
    figure, axes = plt.subplots(len(panels), 1, figsize=(max(8.0, 1.5 * len(cells)), 4.5 * len(panels)), squeeze=False)
    colours = dict(
        zip(sorted({row["system"] for cell in cells for row in cell["rows"]}), mpl.colormaps["tab20"].colors * 2)  # noqa: B905
    )
    for axis, (shown, key, scale, heading) in zip(axes[:, 0], panels, strict=True):
        seen = set()
        for place, cell in enumerate(shown):
            rows = cell["rows"]
            width = 0.85 / max(1, len(rows))
            for number, row in enumerate(rows):
                name = row["system"]
                at = place + (number - (len(rows) - 1) / 2) * width
                axis.bar(at, row[key] * scale, width, color=colours[name], label=None if name in seen else name)
                seen.add(name)
        axis.set_xticks(range(len(shown)), [label(cell) for cell in shown])
        axis.set_ylabel(heading)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize="small", ncols=2)
    axes[0, 0].set_title(title, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
