"""How the commands talk: one JSON document or readable text on standard output, all else on standard error."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moert.config import format_bytes

Report = Callable[[int, int], None]
"""Called with (done, in all)."""

HEAT = ("red3", "dark_orange", "yellow3", "chartreuse3", "green3")


def stdout() -> Console:
    """A console for the result."""
    return Console(highlight=False)


def stderr() -> Console:
    """A console for progress and remarks."""
    return Console(stderr=True, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """Print the one document of a `--json` run; numbers that JSON does not have become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_error(message: object) -> None:
    """Print an error as the one line it must be."""
    print(f"moert: error: {one_line(message)}", file=sys.stderr)


def print_warning(message: object) -> None:
    """Print a remark that does not end the run."""
    print(f"moert: warning: {one_line(message)}", file=sys.stderr)


def one_line(message: object) -> str:
    """A message without line breaks and runs of spaces."""
    return " ".join(str(message).split())


class Bar:
    """A bar of one phase of the work; nothing where standard error is no terminal."""

    def __init__(self, progress: Progress | None, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int, total: int) -> None:
        """`done` of `total`, in any unit."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def advance(self) -> None:
        """One more."""
        if self._progress is not None:
            self._progress.advance(self._task)


class _BarOfKnownLength(BarColumn):
    """Nothing, rather than a bar that runs to and fro, while the length is unknown."""

    def render(self, task: Task) -> ProgressBar:
        return super().render(task) if task.total is not None else ProgressBar(total=1, width=0)


@contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar on standard error that vanishes at the end. Without `total` it spins until it is told one."""
    console = stderr()
    if not console.is_terminal:
        yield Bar(None, TaskID(0))
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        _BarOfKnownLength(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total))


def percent(share: float) -> str:
    """`93.4 %`."""
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """`1.23 s`, or milliseconds below one tenth of a second."""
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def rate(value: float | None, unit: str = "tokens/s") -> str:
    """`61.3 tokens/s`; a dash without a value."""
    return "–" if value is None else f"{value:.1f} {unit}"


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that they all begin and end with."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    front = _common(parts)
    back = _common([part[: front - 1 : -1] if front else part[::-1] for part in parts])
    short = [".".join(part[front : len(part) - back]) for part in parts]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many first items all lists share."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def heat(share: float, width: int) -> Text:
    """A bar of `width` columns of which `share` is filled; its length tells the share, and so does its colour."""
    filled = round(share * width)
    colour = HEAT[min(len(HEAT) - 1, int(share * len(HEAT)))]
    return Text.assemble(("█" * filled, colour), ("░" * (width - filled), "bright_black"))


def stats_table(stats: dict[str, Any]) -> Table:
    """What each layer's cache has done, from `Stats.as_dict`, and the sums."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    for name in ("hits", "misses", "hit rate", "read", "stall", "compute"):
        table.add_column(name, justify="right", no_wrap=True)
    layers = stats["layers"]
    for name, layer in zip(short_names([layer["name"] for layer in layers]), layers, strict=True):
        table.add_row(name, *_counts(layer))
    table.add_section()
    table.add_row("all", *_counts(stats), style="bold")
    return table


def _counts(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['hits']:,}",
        f"{row['misses']:,}",
        percent(row["hit_rate"]),
        format_bytes(row["bytes_read"]),
        seconds(row["stall_s"]),
        seconds(row["compute_s"]),
    )


def facts(rows: Sequence[tuple[str, str | Text]]) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table
