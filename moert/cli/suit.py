"""`moert suit`: whether a model suits offloading, and what memory will buy."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.options import Json, LoadOptions, with_load_options
from moert.cli.output import bar, facts, percent, print_json, stdout
from moert.cli.texts import MaxNewTokens, Prompts, continuing, read_texts
from moert.cli.traces import EXPERTS_HELP, as_trace, check_output, open_trace, put_output
from moert.config import format_bytes, parse_budget
from moert.errors import ConfigError

if TYPE_CHECKING:
    from moert.trace import TraceLike


@with_load_options(only=["host_memory"])
def suit(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TRACE|MODEL",
            help="A trace, or a file that `moert trace import` reads; or a model (folder, hub id, "
            '"demo"), which then runs over a text.',
            show_default=False,
        ),
    ],
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = 64,
    policy: Annotated[str, typer.Option(metavar="NAME", help="Of the cache; `moert policies` lists them.")] = "ema",
    experts: Annotated[int | None, typer.Option(min=1, metavar="N", help=EXPERTS_HELP, show_default=False)] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of one expert, for traces that do not say it.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Of the bootstrap.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw hit rate by cache size.", show_default=False)
    ] = None,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Say whether a model suits expert offloading: what a cache of each size will hit, and how consistent routing is.

    The measures are those of "Not All Models Suit Expert Offloading" (arXiv 2505.16056).
    """
    check_output(plot, "--plot", ".png")
    nbytes = None if expert_bytes is None else parse_budget(expert_bytes, "--expert-bytes").nbytes
    if expert_bytes is not None and nbytes is None:
        raise ConfigError(f"--expert-bytes={expert_bytes!r} must be a size such as 12MiB")
    with bar("starting"):
        from moert.policies import make_policy
        from moert.suit import ConsistencyMeter, describe, forecast

        make_policy(policy, 1)
    with ExitStack() as stack:
        trace = _open(stack, source, prompts, max_new_tokens, experts, options)
        meter = ConsistencyMeter(trace.header)
        with bar("reading", len(trace)) as progress:
            for sequence in trace:
                meter.add(sequence)
                progress.advance()
            found = meter.result(seed=seed)
        count: Literal["decode", "all"] = "decode" if found.decoded_tokens else "all"
        with bar("replaying") as progress:
            sizes = forecast(trace, policy, count=count, expert_bytes=nbytes, progress=progress.update)
        document = {"source": source, **describe(trace.header, found, sizes, policy, count)}
    if plot is not None:
        with bar("drawing"):
            _draw(plot, document)
    if json:
        print_json(document)
    else:
        _print(document, stdout())
        if plot is not None:
            print(f"wrote {plot}")
    return 0


def _draw(path: Path, document: dict[str, Any]) -> None:
    from moert.report.figures import png
    from moert.report.study import CurveLine, TraceStudy

    sizes = document["forecasts"]
    lines = {document["policy"]: "hit_rate", "lru": "lru_hit_rate", "belady": "best_hit_rate"}
    study = TraceStudy(
        name=document["model"] or Path(document["source"]).name,
        facts=(),
        rows=(),
        curves=[
            CurveLine(policy, [one["share"] for one in sizes], [1 - one[key] for one in sizes], policy == "belady")
            for policy, key in lines.items()
        ],
        compulsory=None,
        marks=[document["at_two"]["share"]],
        heat_policy=document["policy"],
        heat_capacities=(),
        layers=(),
    )
    put_output(path, png([study]))


def _open(
    stack: ExitStack,
    source: str,
    prompts: Path | None,
    max_new_tokens: int,
    experts: int | None,
    options: LoadOptions,
) -> TraceLike:
    path = as_trace(source)
    if path is not None:
        if prompts is not None:
            raise ConfigError(f"--prompts is for a model, and {source!r} is a trace: leave it out")
        return open_trace(stack, path, experts)
    if experts is not None:
        raise ConfigError(f"--experts is for files that do not say it, and {source!r} is a model: leave it out")
    texts = read_texts(prompts, "moert suit")
    import moert

    with (
        continuing(source, texts, max_new_tokens, options) as (model, runs),
        moert.record(model, weights=False) as trace,
    ):
        for run in runs:
            run()
    return trace


def _print(document: dict[str, Any], console: Console) -> None:
    shape = f"{document['num_layers']} layers of {document['num_experts']} experts, {document['top_k']} for each token"
    text = f"{document['tokens']:,} tokens; sequences: {document['sequences']:,}"
    name = document["model"] or Path(document["source"]).name
    reuse = document["reuse"]
    shared = "–" if reuse is None else f"{percent(reuse)} of a token's experts were also those of the token before"
    console.print()
    console.print(facts([("model", Text(f"{name}: {shape}")), ("text", text), ("reuse", shared)]))
    console.print()
    console.print(_segments_table(document))
    console.print()
    console.print(_forecasts_table(document))
    console.print()
    word, style = {
        "well": ("suits offloading", "bold green"),
        "partly": ("suits offloading partly", "bold yellow"),
        "hardly": ("hardly suits offloading", "bold red"),
    }[document["suits"]]
    console.print(Text.assemble((word, style)), soft_wrap=True)
    for sentence in document["verdict"]:
        console.print(Text(sentence), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    return table


def _segments_table(document: dict[str, Any]) -> Table:
    ratios = sorted({ratio for one in document["segments"] for ratio in one["sch"]}, key=int)
    table = _table("window", "SRP", "95 %", "best size", *(f"SCH at {ratio}x" for ratio in ratios))
    for one in document["segments"]:
        low, high = one["srp_low"], one["srp_high"]
        table.add_row(
            f"{one['tokens']} tokens",
            percent(one["srp"]),
            "–" if low is None else f"{100 * low:.1f}–{100 * high:.1f}",
            f"{one['size_ratio']:.2f}x",
            *(percent(one["sch"][ratio]["value"]) if ratio in one["sch"] else "–" for ratio in ratios),
        )
    return table


def _forecasts_table(document: dict[str, Any]) -> Table:
    with_lru = document["policy"] != "lru"
    policies = [document["policy"], *(["lru"] if with_lru else []), "MIN"]
    table = _table("cache", "a layer", "size", *policies, "misses\na token", "")
    for one in document["forecasts"]:
        table.add_row(
            f"{one['ratio']:.3g}x",
            str(one["slots"]),
            "–" if one["nbytes"] is None else format_bytes(one["nbytes"]),
            percent(one["hit_rate"]),
            *([percent(one["lru_hit_rate"])] if with_lru else []),
            percent(one["best_hit_rate"]),
            f"{one['misses_per_token']:.2f}",
            "sweet spot" if one["slots"] == document["sweet_spot"]["slots"] else "",
        )
    return table
