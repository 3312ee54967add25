"""`moert pack`: a checkpoint with its experts quantised, or only laid out anew; and looking at what was made."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moert.cli.opening import reading
from moert.cli.options import DTYPES, MODEL_HELP, Json, resolve_model
from moert.cli.output import bar, facts, percent, print_json, seconds, stdout
from moert.config import format_bytes
from moert.errors import ConfigError
from moert.plugins import available

FORMAT_HELP = (
    f"How experts are stored: {', '.join(available('moert.formats'))}, or package.module:Class. Parameters follow: "
    "int4,group=128,symmetric=false."
)


def pack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to make: a model like any other.", show_default=False)
    ] = None,
    weight_format: Annotated[str, typer.Option("--format", metavar="NAME", help=FORMAT_HELP)] = "plain",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help=f"What to compute in: {', '.join(DTYPES)} (auto: as the checkpoint).")
    ] = "auto",
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the pack OUT, once the new one is complete.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Do not go on with what an interrupted run has left.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Pack nothing: read all of a pack again and check it. `moert pack OUT --verify`, or "
            "`moert pack MODEL OUT --verify` to check also that OUT was made from MODEL.",
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Write MODEL anew as the folder OUT, its experts quantised or laid out for direct reading.

    An interrupted run is gone on with by the same command. With --verify, exit code 1 if something is wrong.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if verify:
        return _verify(model if out is None else str(out), None if out is None else model, revision, json)
    if out is None:
        raise ConfigError("OUT is missing: moert pack MODEL OUT, or moert pack OUT --verify to check a pack")
    name = resolve_model(model)
    began = perf_counter()
    with bar("starting"):
        from moert import __version__
        from moert.formats import FormatChoice
        from moert.hf.packing import pack as make_pack
        from moert.hf.text import hush

        choice = FormatChoice.parse(weight_format)
        hush(bars=False)
    with bar(f"packing as {choice.name}") as progress, reading(name):
        made = make_pack(
            name,
            out.expanduser(),
            stored_as=choice,
            moert_version=__version__,
            dtype=dtype,
            revision=revision,
            overwrite=overwrite,
            restart=restart,
            progress=progress.update,
        )
    document = {
        "model": model,
        "pack": str(made.folder),
        "format": made.stored_as,
        "dtype": made.dtype,
        "num_layers": made.num_layers,
        "expert_bytes": made.expert_bytes,
        "packed_bytes": made.packed_bytes,
        "dense_bytes": made.dense_bytes,
        "files": made.files,
        "files_kept": made.files_kept,
        "total_s": perf_counter() - began,
    }
    if json:
        print_json(document)
    else:
        _print(document, stdout())
    return 0


def _verify(name: str, source: str | None, revision: str | None, json: bool) -> int:
    folder = Path(resolve_model(name)).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{name!r} is not a folder; give the folder of a pack")
    with bar("starting"):
        from moert.hf.pack_check import check_pack
    with bar(f"checking {folder.name}") as progress, reading(name):
        found = check_pack(folder, None if source is None else resolve_model(source), revision, progress.update)
    document = {
        "pack": str(folder),
        "format": found.stored_as,
        "files": found.files,
        "records": found.records,
        "bytes_read": found.bytes_read,
        "source": found.source,
        "source_is_the_same": found.source_is_the_same,
        "problems": list(found.problems),
        "passed": not found.problems,
    }
    if json:
        print_json(document)
    else:
        _print_check(document, stdout())
    return 1 if found.problems else 0


def _print(made: dict[str, Any], console: Console) -> None:
    share = made["packed_bytes"] / made["expert_bytes"]
    rows: list[tuple[str, str | Text]] = [
        ("pack", made["pack"]),
        ("format", f"{made['format']}, computed in {made['dtype']}"),
        (
            "experts",
            f"{format_bytes(made['packed_bytes'])}, {percent(share)} of {format_bytes(made['expert_bytes'])}",
        ),
        ("all else", format_bytes(made["dense_bytes"])),
        ("took", seconds(made["total_s"])),
    ]
    if made["files_kept"]:
        rows.append(("resumed", f"{made['files_kept']} of {made['files']} files were there already"))
    console.print()
    console.print(facts(rows))
    console.print()
    console.print(Text(f'moert run {made["pack"]} "Once upon a time"', style="bright_black"))


def _print_check(found: dict[str, Any], console: Console) -> None:
    same = {True: "is the model it was made from", False: "is another model", None: "not looked at: not here"}
    console.print()
    console.print(
        facts(
            [
                ("pack", f"{found['pack']}, {found['format']}"),
                (
                    "read",
                    f"{found['records']:,} records in {found['files']} files, {format_bytes(found['bytes_read'])}",
                ),
                ("source", f"{found['source']}: {same[found['source_is_the_same']]}"),
            ]
        )
    )
    console.print()
    for problem in found["problems"]:
        console.print(Text.assemble(("✗ ", "bold red"), problem), soft_wrap=True)
    if not found["problems"]:
        console.print("[bold green]sound[/] – every weight is as it was written")
