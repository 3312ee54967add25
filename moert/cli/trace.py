"""`moert trace`: what is in a trace of routing, and making one out of other programs' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.options import Json
from moert.cli.output import bar, facts, heat, percent, print_json, short_names, stdout
from moert.cli.trace_record import record
from moert.config import format_bytes
from moert.errors import ConfigError
from moert.plugins import available

FORMATS = "moert.trace.importers"
PHASES = ("decode", "prefill")
_HEAT_WIDTH = 24

app = typer.Typer(
    help="Traces of routing: which experts each token chose. Made by recording a model, or of other programs' files.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(record)


@app.command()
def info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Traces.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the experts: no reuse, nothing checked.")] = False,
    json: Json = False,
) -> int:
    """Show what is in traces, and how much of what a token chose the token before it had chosen (next-token reuse).

    Reading a trace checks every value in it.
    """
    found = [_describe(path, quick) for path in files]
    if json:
        print_json({"traces": found})
    else:
        console = stdout()
        for description in found:
            _print_info(description, console)
    return 0


@app.command("import")
def import_(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files, or folders of files.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="Trace to write, a .safetensors file.", show_default=False),
    ],
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"What the files are, if not to be recognised: {', '.join(available(FORMATS))}, or "
            "package.module:Class.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(metavar="N", help="Experts of each layer, where files do not say.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Experts of each token, where files do not say.", show_default=False),
    ] = None,
    native_top_k: Annotated[
        int | None, typer.Option(metavar="K", help="What the model was trained with.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="The model's id.", show_default=False)] = "",
    phase: Annotated[
        str,
        typer.Option(
            metavar="PHASE",
            help="What tokens are where files do not say: decode (a step each) or prefill (a sequence is one step).",
        ),
    ] = "decode",
    no_repetition: Annotated[
        bool, typer.Option("--no-repetition", help="Leave out sequences marked as a model repeating itself.")
    ] = False,
    without: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Leave out any of weights, scores, token_ids: NAME,...", show_default=False),
    ] = "",
    json: Json = False,
) -> int:
    """Write other programs' traces, or several of one layout, as one trace.

    What is malformed is refused, with the file and the line; nothing is written then.
    """
    from moert.trace import Phase
    from moert.trace.importers.base import ImportOptions
    from moert.trace.importing import import_traces

    if phase not in PHASES:
        raise ConfigError(f"--phase={phase!r} must be one of {', '.join(PHASES)}")
    for option, value in (("experts", experts), ("top-k", top_k), ("native-top-k", native_top_k)):
        if value is not None and value < 1:
            raise ConfigError(f"--{option}={value} must be at least 1")
    options = ImportOptions(
        model=model,
        experts=experts,
        top_k=top_k,
        native_top_k=native_top_k,
        phase=Phase[phase.upper()],
        keep_repetition=not no_repetition,
    )
    left_out = [name.strip() for name in without.split(",") if name.strip()]
    with bar("importing") as progress:
        done = import_traces(
            [path.expanduser() for path in files],
            out.expanduser(),
            options,
            format=format_name,
            without=left_out,
            progress=progress.update,
        )
    document = {
        "trace": str(done.path),
        "formats": list(done.formats),
        "model": done.header.model,
        "num_layers": len(done.header.layers),
        "top_k": done.header.top_k,
        "sequences": done.sequences,
        "tokens": done.tokens,
        "bytes": done.path.stat().st_size,
    }
    if json:
        print_json(document)
    else:
        _print_imported(document, stdout())
    return 0


def _describe(path: Path, quick: bool) -> dict[str, Any]:
    from moert.trace import Phase, TraceFile
    from moert.trace.file import merge_ranges
    from moert.trace.reuse import Reuse

    with TraceFile(path.expanduser()) as trace, bar(f"reading {path.name}", len(trace)) as progress:
        header = trace.header
        reuse = Reuse(len(header.layers))
        tokens = dict.fromkeys(Phase, 0)
        ranges: list[tuple[int, int]] = []
        most_ranges = 1000
        has = dict.fromkeys(("weights", "scores", "token_ids"), 0)
        for index in range(len(trace)):
            summary = trace.summary(index)
            for phase, count in summary.tokens_by_phase.items():
                tokens[phase] += count
            for name in has:
                has[name] += getattr(summary, f"has_{name}")
            ranges.extend(summary.step_ranges)
            if len(ranges) > most_ranges:
                ranges = list(merge_ranges(ranges))
                most_ranges = 1000 + 2 * len(ranges)
            if not quick:
                reuse.add(trace[index])
            progress.advance()
        return {
            "trace": str(path),
            "bytes": trace.nbytes,
            "model": header.model,
            "config_hash": header.config_hash,
            "source": header.source,
            "sampled": header.sampled,
            "num_layers": len(header.layers),
            "top_k": header.top_k,
            "reduced": _reduced([(layer.top_k, layer.native_top_k) for layer in header.layers]),
            "sequences": len(trace),
            "tokens": trace.n_tokens,
            "tokens_by_phase": {phase.name.lower(): count for phase, count in tokens.items()},
            "steps": sum(last - first + 1 for first, last in merge_ranges(ranges)),
            "sequences_with": has,
            "next_token_reuse": reuse.mean,
            "layers": [
                {
                    "name": layer.name,
                    "num_experts": layer.num_experts,
                    "top_k": layer.top_k,
                    "native_top_k": layer.native_top_k,
                    "expert_bytes": layer.expert_bytes,
                    "next_token_reuse": share,
                }
                for layer, share in zip(header.layers, reuse.per_layer, strict=True)
            ],
        }


def _reduced(pairs: list[tuple[int, int | None]]) -> bool | None:
    """Whether a layer has fewer picks than the model was trained with; None: unknown."""
    if any(native is not None and used < native for used, native in pairs):
        return True
    return None if any(native is None for _, native in pairs) else False


def _print_info(found: dict[str, Any], console: Console) -> None:
    layers = found["layers"]
    by_phase = ", ".join(f"{count:,} {phase}" for phase, count in found["tokens_by_phase"].items() if count)
    top_k = {True: "fewer than the model was trained with", False: "native", None: "native number unknown"}
    sampled = {
        True: "chosen by the model",
        False: "given (teacher-forced)",
        None: "unknown whether the model chose them",
    }
    expert_bytes = _span([layer["expert_bytes"] for layer in layers if layer["expert_bytes"]], format_bytes)
    has = [
        name.replace("_", " ") if count == found["sequences"] else f"{name.replace('_', ' ')} of {count:,}"
        for name, count in found["sequences_with"].items()
        if count
    ]
    rows: list[tuple[str, str | Text]] = [
        ("trace", f"{found['trace']}, {format_bytes(found['bytes'])}, from {found['source'] or 'an unknown source'}"),
        ("model", found["model"] or "unknown"),
        ("layers", f"{len(layers)}, {_span([layer['num_experts'] for layer in layers], str)} experts each"),
        ("top-k", f"{_span([layer['top_k'] for layer in layers], str)}, {top_k[found['reduced']]}"),
        ("an expert", expert_bytes or "of unknown size"),
        ("sequences", f"{found['sequences']:,}"),
        ("tokens", f"{found['tokens']:,}: {by_phase or 'none'}; {sampled[found['sampled']]}"),
        ("steps", f"{found['steps']:,}"),
        ("with", ", ".join(["experts", *has])),
    ]
    if found["next_token_reuse"] is not None:
        rows.append(("next-token reuse", percent(found["next_token_reuse"])))
    console.print()
    console.print(facts(rows))
    console.print()
    if any(layer["next_token_reuse"] is not None for layer in layers):
        console.print(_reuse_table(layers))
        console.print()


def _reuse_table(layers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    for name in ("experts", "top-k", "an expert", "reuse"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, layer in zip(short_names([layer["name"] for layer in layers]), layers, strict=True):
        share = layer["next_token_reuse"]
        table.add_row(
            name,
            str(layer["num_experts"]),
            str(layer["top_k"]),
            format_bytes(layer["expert_bytes"]) if layer["expert_bytes"] else "–",
            "–" if share is None else percent(share),
            "" if share is None else heat(share, _HEAT_WIDTH),
        )
    return table


def _span(values: list[int], write: Any) -> str:
    """The one value, or the lowest and highest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return str(write(low)) if low == high else f"{write(low)} to {write(high)}"


def _print_imported(made: dict[str, Any], console: Console) -> None:
    formats = ", ".join(sorted(set(made["formats"])))
    console.print()
    console.print(
        facts(
            [
                ("trace", f"{made['trace']}, {format_bytes(made['bytes'])}, from {formats}"),
                ("layers", f"{made['num_layers']}, top-k {made['top_k']}"),
                ("sequences", f"{made['sequences']:,}, {made['tokens']:,} tokens"),
            ]
        )
    )
    console.print()
    console.print(Text(f"moert trace info {made['trace']}", style="bright_black"))
