"""`moert train-predictor`: from recorded routing, or a model that is run for it, to the file of a trained predictor."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.options import MODEL_HELP, Json, LoadOptions, with_load_options
from moert.cli.output import bar, facts, percent, print_json, seconds, stdout
from moert.cli.recorded_texts import HIDDEN_FILE, TRACE_FILE, record_texts
from moert.cli.traces import EXPERTS_HELP, TRACE_HELP, as_trace, check_output, names_of, open_trace, put_output
from moert.config import format_bytes
from moert.errors import ConfigError
from moert.plugins import available

if TYPE_CHECKING:
    from moert.training.examples import Source
    from moert.training.run import Training

SOURCE_HELP = f"Traces of one model, or a model, which then runs over --prompts. {TRACE_HELP} {MODEL_HELP}"
PREDICTOR_HELP = f"What to train: {', '.join(available('moert.training.recipes'))}. E.g. expertflow,depth=4."


@with_load_options(only=["host_memory", "device_memory"])
def train_predictor(
    sources: Annotated[list[str], typer.Argument(metavar="TRACE...|MODEL", help=SOURCE_HELP, show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where the predictor goes: a .safetensors file.", show_default=False
        ),
    ],
    predictor: Annotated[str, typer.Option(metavar="NAME", help=PREDICTOR_HELP, show_default=False)],
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most. Default: the predictor's own.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Of the split, and of the training.")] = 0,
    test: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the sequences, kept to judge the predictor by.")
    ] = 0.2,
    validation: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the others, kept to end the training by.")
    ] = 0.1,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order",
            help="Train on the first sequences and test on the last, not by chance. With --test .5 what is tested on "
            "is what `moert predict` tests on.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts that MODEL runs, as for `moert trace record`.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens that MODEL adds to each; 0: the texts as they are.")
    ] = 0,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of a text, its first ones; the others are not run.", show_default=False),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help=f"Keep what MODEL recorded there, as {TRACE_FILE} and, where it is needed, {HIDDEN_FILE}.",
            show_default=False,
        ),
    ] = None,
    hidden: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Hidden states recorded beside TRACE (--keep).", show_default=False),
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, metavar="N", help=EXPERTS_HELP, show_default=False)] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where to train: auto (a GPU if there is one), cpu, cuda.")
    ] = "auto",
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the learning curve.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE, once the new one is complete.")] = False,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Train a predictor of experts on recorded routing, split by sequence, and say how good it is on unseen sequences.

    Use it with `moert run --predictor NAME,file=FILE` and `moert predict --predictor NAME,file=FILE`. An interrupt
    leaves no file.
    """
    _check_out(out, overwrite)
    check_output(plot, "--plot", ".png")
    with bar("starting"):
        from moert.training.recipes.base import make_recipe

        recipe = make_recipe(predictor)
    model = _model_of(sources)
    if model is None:
        for option, value in (("--prompts", prompts), ("--keep", keep)):
            if value is not None:
                raise ConfigError(f"{option} is for a model, and {sources[0]!r} is a trace: leave it out")
    else:
        if prompts is None:
            raise ConfigError(f"{model!r} is a model: give it texts to run with --prompts FILE, or give a trace")
        for option, given in (("--hidden", hidden is not None), ("--experts", experts is not None)):
            if given:
                raise ConfigError(f"{option} is for a trace, and {model!r} is a model: leave it out")
    with ExitStack() as stack:
        if model is None:
            opened_sources = _open(stack, [Path(one) for one in sources], hidden, experts)
        else:
            assert prompts is not None
            folder = _folder(stack, keep, out)
            from moert.predictors.base import Need

            with_hidden = Need.HIDDEN in recipe.needs
            record_texts(folder, model, prompts, max_new_tokens, max_tokens, options, with_hidden=with_hidden)
            opened_sources = _open(
                stack, [folder / TRACE_FILE], folder / HIDDEN_FILE if with_hidden else None, None, names=[model]
            )
        from moert import __version__
        from moert.training.examples import Shares
        from moert.training.loop import Effort
        from moert.training.run import describe, train

        with bar(f"training {predictor.partition(',')[0]}") as progress:
            made = train(
                opened_sources,
                recipe,
                effort=Effort(epochs, seed, device, report=lambda done, total, _stand: progress.update(done, total)),
                shares=Shares(validation, test, in_order),
                moert_version=__version__,
            )
        made.save(out.expanduser())
    document = {"out": str(out), "sources": list(sources), **describe(made)}
    if plot is not None:
        with bar("drawing"):
            _draw(plot, made)
    if json:
        print_json(document)
    else:
        _print(document, stdout())
        if plot is not None:
            print(f"wrote {plot}")
    return 0


def _check_out(out: Path, overwrite: bool) -> None:
    check_output(out.expanduser(), "--out", ".safetensors")
    if out.expanduser().exists() and not overwrite:
        raise ConfigError(f"--out={str(out)!r} is there already; give another name, or --overwrite")


def _model_of(sources: Sequence[str]) -> str | None:
    """The model, if the sources are one and not traces.

    Raises:
        ConfigError: a model beside others, or a file that is not there.
    """
    models = [source for source in sources if as_trace(source) is None]
    if models and len(sources) > 1:
        raise ConfigError(f"{models[0]!r} is a model: give one model alone, or traces of one model")
    return models[0] if models else None


def _open(
    stack: ExitStack,
    paths: Sequence[Path],
    hidden: Path | None,
    experts: int | None,
    names: Sequence[str] | None = None,
) -> list[Source]:
    from moert.training.examples import Source
    from moert.training.hidden import HiddenFile

    if hidden is not None and len(paths) > 1:
        raise ConfigError(f"--hidden goes with one trace, and there are {len(paths)}; train on one")
    states = None if hidden is None else HiddenFile(hidden.expanduser())
    return [
        Source(open_trace(stack, path, experts), name, states)
        for path, name in zip(paths, names or names_of(paths), strict=True)
    ]


def _folder(stack: ExitStack, keep: Path | None, out: Path) -> Path:
    """Where to record to: beside the output if it is not to be kept, as hidden states are large."""
    if keep is None:
        parent = out.expanduser().absolute().parent
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".moert-", dir=parent)))
    keep = keep.expanduser()
    for name in (TRACE_FILE, HIDDEN_FILE):
        if (keep / name).exists():
            raise ConfigError(f"--keep={str(keep)!r} has a {name} already; give another folder")
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--keep={str(keep)!r}: cannot make this folder: {error.strerror}") from None
    check_output(keep / TRACE_FILE, "--keep", ".safetensors")
    return keep


def _draw(path: Path, made: Training) -> None:
    from moert.training.figure import learning_curve

    references = {name: measures.recall[1.0] for name, measures in made.baselines.items()}
    title = f"{made.about.predictor}, {made.about.model or 'unnamed'}"
    put_output(path, learning_curve(title, made.points, made.test.recall[1.0], references))


def _print(document: dict[str, Any], console: Console) -> None:
    tokens, sequences = document["tokens"], document["sequences"]
    shape = f"{document['num_layers']} layers of {document['num_experts']} experts, {document['top_k']} for each token"
    rows: list[tuple[str, str | Text]] = [
        ("predictor", f"{document['predictor']}, {format_bytes(document['bytes'])} in {document['out']}"),
        ("model", f"{document['model'] or 'unnamed'}: {shape}"),
        ("trained on", f"{tokens['train']:,} tokens; sequences: {sequences['train']:,}"),
        ("tested on", f"{tokens['test']:,} tokens; sequences: {sequences['test']:,}"),
        ("took", f"{seconds(document['train_s'])}{_epochs(document)}"),
    ]
    console.print()
    console.print(facts(rows))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bright_black", padding=(0, 2, 0, 0))
    table.add_column("on unseen sequences", no_wrap=True)
    for name in ("recall at k", "1.5k", "2k", "all right", "from layer 2 on"):
        table.add_column(name, justify="right", no_wrap=True)
    named = {document["predictor"]: document["test"], **document["baselines"]}
    for name, found in named.items():
        style = "bold" if name == document["predictor"] else ""
        recall = found["recall"]
        table.add_row(
            name,
            *(percent(recall[width]) for width in ("1k", "1.5k", "2k")),
            percent(found["exact"]),
            percent(found["recall_after_first"]),
            style=style,
        )
    console.print(table)
    console.print()
    console.print(
        Text(f"moert predict TRACE --predictor {document['predictor']},file={document['out']}", style="bright_black"),
        soft_wrap=True,
    )


def _epochs(document: dict[str, Any]) -> str:
    ran = document["curve"][-1]["epoch"]
    return f"; best after {document['best_epoch']} of {ran} epochs" if ran else ""
