"""`moert simulate`: cache policies replayed over recorded traces, with the bound beside them."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.options import Json, flag_of
from moert.cli.output import bar, one_line, percent, print_json, short_names, stdout
from moert.cli.replay import CAPACITIES, COUNTS, POLICIES, RESETS, SCOPES, Asked, Replayed, read_asked, replay
from moert.cli.timing import SCHEDULER, TOKENS, Timing, add_times, read_timing, timing_notes
from moert.cli.traces import EXPERTS_HELP, TRACE_HELP, check_output, names_of, open_trace, put_output
from moert.config import format_bytes
from moert.errors import PolicyError

_COLUMNS = (
    "policy",
    "hit rate",
    "95 %",
    "misses\na token",
    "fetched\na token",
    "LRU to\nbound",
    "ms\nalone",
    "ms a\ntoken",
    "of the\nbound",
)

_TIMES = "Times"


def simulate(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help=TRACE_HELP, show_default=False)],
    policy: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Policies, as `moert policies` lists them. MIN is always added."),
    ] = POLICIES,
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="C,...",
            help="Cache sizes: shares of all experts, or experts of each layer (of the one cache with --scope global). "
            f"Default: {CAPACITIES}.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE,...", help="Cache sizes in bytes for the whole model: 4GiB.", show_default=False),
    ] = None,
    scope: Annotated[
        str, typer.Option(metavar="|".join(SCOPES), help="A cache for each layer, or one for all of them.")
    ] = "layer",
    reset: Annotated[
        str, typer.Option(metavar="|".join(RESETS), help="Whether each sequence begins with an empty cache.")
    ] = "never",
    count: Annotated[
        str,
        typer.Option(metavar="|".join(COUNTS), help="The tokens whose hits count; all of them warm the cache."),
    ] = "decode",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that run together, step by step.")] = 1,
    bypass: Annotated[
        bool,
        typer.Option("--bypass", help="A policy may leave a missing expert out, which is then used without a slot."),
    ] = False,
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What tells a policy that looks ahead, such as ema_ahead, of the tokens to come, and with --machine "
            "what is read ahead from the disk; `oracle` knows them.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, metavar="N", help=EXPERTS_HELP, show_default=False)] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of one expert, for traces that do not say it.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Processes to use; at most one for each core.")] = 1,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="this|NAME|FILE",
            help="Also the time of a token: on this machine, on one that comes with moert or is described in a file.",
            rich_help_panel=_TIMES,
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Where an event's experts run. Default: {SCHEDULER}.",
            rich_help_panel=_TIMES,
            show_default=False,
        ),
    ] = None,
    promote: Annotated[
        bool | None,
        typer.Option(
            "--promote/--no-promote",
            help="Bring experts over the idle link. Default: --promote.",
            rich_help_panel=_TIMES,
            show_default=False,
        ),
    ] = None,
    dense_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of the weights besides experts; their time is a token's too.",
            rich_help_panel=_TIMES,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Decoded tokens that are timed. Default: {TOKENS}.",
            rich_help_panel=_TIMES,
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the miss-ratio curves.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="OUT.html", help="Write a report as one HTML file.", show_default=False),
    ] = None,
    json: Json = False,
) -> int:
    """Replay traces of expert routing against cache policies: how often each hits, and how far it is to the optimum.

    The policy objects are those that run live.
    """
    check_output(plot, "--plot", ".png")
    check_output(html, "--html", ".html")
    how: dict[str, Any] = {
        "policy": policy,
        "capacity": capacity,
        "budget": budget,
        "scope": scope,
        "reset": reset,
        "count": count,
        "batch": batch,
        "bypass": bypass,
        "predictor": predictor,
        "expert_bytes": expert_bytes,
        "jobs": jobs,
    }
    timed: dict[str, Any] = {"scheduler": scheduler, "promote": promote, "dense_bytes": dense_bytes, "tokens": tokens}
    command = _command(traces, {**how, "experts": experts, "machine": machine, **timed, "plot": plot, "html": html})
    with bar("starting"):
        asked = read_asked(**how, is_timed=machine is not None)
        timing = read_timing(machine, **timed, asked=asked)
    with ExitStack() as stack:
        opened = [open_trace(stack, path, experts) for path in traces]
        draw = plot is not None or html is not None
        with bar("replaying") as progress:
            replayed = replay(opened, names_of(traces), asked, draw=draw, progress=progress.update)
        failed = replayed[-1].error
        try:
            if timing is not None and failed is None:
                for one in replayed:
                    with bar(f"timing {one.name}") as progress:
                        add_times(one, timing, asked, progress.update)
        except PolicyError as error:
            failed = error
        if failed is None:
            _draw(replayed, asked, command, plot, html)
    _print_all(replayed, asked, timing if failed is None else None, command, failed, json=json)
    if failed is not None:
        raise failed
    for path in (plot, html):
        if path is not None and not json:
            stdout().print(Text(f"wrote {path}"), soft_wrap=True)
    return 0


def _print_all(
    replayed: Sequence[Replayed],
    asked: Asked,
    timing: Timing | None,
    command: str,
    failed: Exception | None,
    *,
    json: bool,
) -> None:
    """What was finished, though something `failed` after it; nothing at all if it was the first."""
    shown = [one for one in replayed if one.rows]
    if not shown:
        return
    if json:
        document = {"command": command, "results": [row for one in shown for row in one.rows]}
        print_json(document if failed is None else {**document, "error": one_line(failed)})
        return
    console = stdout()
    for one in shown:
        _print(one, console)
    _print_notes(shown, asked, timing, console)


def _draw(replayed: Sequence[Replayed], asked: Asked, command: str, plot: Path | None, html: Path | None) -> None:
    if plot is None and html is None:
        return
    from moert import __version__
    from moert.cli.method import notes, settings
    from moert.report.collect import collect
    from moert.report.figures import png
    from moert.report.page import html as page
    from moert.report.study import Study

    with bar("drawing"):
        studies = [
            collect(
                one.trace,
                name=one.name,
                layer_names=short_names([layer.name for layer in one.trace.header.layers]),
                rows=one.rows,
                results=one.results,
                curves=one.curves,
                bounds=asked.bounds,
            )
            for one in replayed
        ]
        if plot is not None:
            put_output(plot, png(studies))
        if html is not None:
            study = Study(
                command=command,
                version=__version__,
                made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                settings=settings(asked),
                notes=notes(asked),
                traces=studies,
            )
            put_output(html, page(study).encode())


def _command(traces: Sequence[Path], how: dict[str, Any]) -> str:
    """The line that does it again."""
    words = ["moert", "simulate", *map(str, traces)]
    parameters = inspect.signature(simulate).parameters
    for name, value in how.items():
        if value != parameters[name].default:
            if isinstance(value, bool):
                words.append(flag_of(name) if value else f"--no-{flag_of(name)[2:]}")
            else:
                words += [flag_of(name), str(value)]
    return shlex.join(words)


def _print(one: Replayed, console: Console) -> None:
    from moert.report.collect import facts
    from moert.report.page import capacity_note, policy_label

    console.print()
    shape = dict(facts(one.trace))["experts"]
    console.print(Text.assemble((one.name, "bold"), f"  {shape}"), soft_wrap=True)
    texts = [(policy_label(row), *_cells(row)) for row in one.rows]
    # A table for each capacity, all of the same widths, so that what it holds may stand above it at full length.
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    shown = [place for place, column in enumerate(zip(*texts, strict=True)) if set(column) != {"–"}]
    least = {column: max(widths[column], *(len(line) for line in _COLUMNS[column].split("\n"))) for column in shown}
    padding = 2 if sum(least.values()) + 2 * len(shown) <= console.width else 1
    # rich would leave out the last columns where they do not fit.
    console.width = max(console.width, sum(least.values()) + padding * len(shown))
    rows = iter(zip(one.rows, texts, strict=True))
    for place, (capacity, same) in enumerate(groupby(rows, key=lambda row: str(row[0]["capacity"]))):
        of_capacity = list(same)
        table = Table(
            box=None, pad_edge=False, header_style="bright_black", padding=(0, padding, 0, 0), show_header=not place
        )
        for column in shown:
            table.add_column(
                _COLUMNS[column],
                justify="right" if column else "left",
                min_width=least[column],
                no_wrap=column > 0,
                overflow="fold",
                vertical="bottom",
            )
        if place == 0:
            console.print()
        for row, cells in of_capacity:
            style = "bright_black" if row["bound"] else ""
            table.add_row(*(Text(cells[column]) for column in shown), style=style)
        heading = Text.assemble((capacity, "bold"), (f"  {capacity_note(of_capacity[0][0])}", "bright_black"))
        console.print(heading, soft_wrap=True)
        console.print(table)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["hit_rate_low"], row["hit_rate_high"]
    moved, tokens = row["bytes_moved"], max(1, row["tokens"])
    return (
        percent(row["hit_rate"]),
        "–" if low is None else f"{100 * low:.1f}–{100 * high:.1f}",
        f"{row['misses_per_token']:.2f}",
        "–" if moved is None else format_bytes(moved / tokens),
        "–" if row["gap_closed"] is None or row["bound"] else percent(row["gap_closed"]),
        f"{row['unpredicted_ms_per_token']:.1f}" if "unpredicted_ms_per_token" in row else "–",
        f"{row['ms_per_token']:.1f}" if "ms_per_token" in row else "–",
        percent(row["share_of_bound"]) if "share_of_bound" in row else "–",
    )


def _print_notes(replayed: Sequence[Replayed], asked: Asked, timing: Timing | None, console: Console) -> None:
    rows = [row for one in replayed for row in one.rows]
    notes = []
    forced = {row["capacity"] for row in rows if row["forced_misses"]}
    if forced:
        small = ", ".join(text for text in asked.capacities if text in forced)
        notes.append(f"At {small} some steps need more experts than the cache holds; these misses are counted.")
    if any(row["policy"] == "belady" and row["gap_misses"] for row in rows):
        notes.append(
            "MIN admits every miss, and serves steps that are too large or do not count too; no policy at all "
            "hits more than “at most”."
        )
    if timing is not None:
        notes += timing_notes(timing, rows)
    console.print()
    for note in notes:
        console.print(Text(note, style="bright_black"), soft_wrap=True)
