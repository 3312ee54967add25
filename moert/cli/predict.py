"""`moert predict`: how good predictors are, on traces or on a model that runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from moert.cli.options import Json, LoadOptions, with_load_options
from moert.cli.output import bar, print_json, stdout
from moert.cli.prediction_tables import print_results
from moert.cli.texts import MaxNewTokens, Prompts, continuing, read_texts
from moert.cli.traces import EXPERTS_HELP, as_trace, check_output, names_of, open_trace, put_output
from moert.errors import ConfigError

if TYPE_CHECKING:
    from moert.predict import Horizons, Recording, Result, Study

TRAINS = ("same", "other", "nothing")


@with_load_options(only=["host_memory"])
def predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE|MODEL...",
            help="Traces, or files that `moert trace import` reads; or models (folder, hub id, "
            '"demo"), which then run over a text: only there hidden states are at hand.',
            show_default=False,
        ),
    ],
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Predictors, with parameters as NAME,PARAMETER=VALUE. Default: all that need no more than is at hand.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(TRAINS),
            help="On what they learn before: the first half of the same trace's sequences, another trace of the same "
            "model, or nothing; several with commas between. The test is always the second half. Default: same, "
            "and other where there are several.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[str, typer.Option(metavar="N,...", help="Layers ahead, 1 to 3; none: an empty text.")] = "1,2,3",
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens ahead, 1 to 8.")] = "1,2,4,8",
    asked: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of each test that are asked about, evenly spread.")
    ] = 2000,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = 64,
    experts: Annotated[int | None, typer.Option(min=1, metavar="N", help=EXPERTS_HELP, show_default=False)] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw recall by horizon, and reliability.", show_default=False),
    ] = None,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Hold predictors against what was chosen: which experts will be needed one to three layers and one to eight tokens
    ahead?

    The predictor objects are those that run live.
    """
    check_output(plot, "--plot", ".png")
    with bar("starting"):
        from moert.predict import Horizons
        from moert.predictors._choice import read_predictor, split_predictors

        horizons = Horizons(_numbers(layers, "--layers"), _numbers(tokens, "--tokens"))
        names = None if predictor is None else split_predictors(predictor)
        for name in names or ():
            read_predictor(name)
        trains = _read_trains(train, len(sources))
    with ExitStack() as stack:
        recordings = _open(stack, sources, prompts, max_new_tokens, experts, options)
        found: list[list[Result]] = []
        for study in _studies(recordings, trains):
            found.append([])
            for name in names or _all_names(study.tested):
                found[-1].append(_evaluate(name, study, horizons, asked))
    if plot is not None:
        with bar("drawing"):
            from moert.predict.figures import png

            put_output(plot, png(found))
    if json:
        from moert.predict.run import as_document

        print_json({"results": [row for results in found for result in results for row in as_document(result)]})
        return 0
    console = stdout()
    for results in found:
        print_results(results, console)
    if plot is not None:
        console.print(Text(f"wrote {plot}"), soft_wrap=True)
    return 0


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ConfigError(f"{option}={text!r} must be whole numbers with commas between") from None


def _read_trains(text: str | None, sources: int) -> list[str]:
    if text is None:
        return ["same", "other"] if sources > 1 else ["same"]
    found = [part.strip() for part in text.split(",")]
    for part in found:
        if part not in TRAINS:
            raise ConfigError(f"--train={text!r}: {part!r} is none of {', '.join(TRAINS)}")
    if "other" in found and sources < 2:
        raise ConfigError("--train other takes two traces of the same model, and there is one")
    return found


def _all_names(recording: Recording) -> list[str]:
    from moert.predictors._choice import predictor_names
    from moert.predictors.base import Need

    return predictor_names(recording.at_hand - {Need.FUTURE})


def _open(
    stack: ExitStack,
    sources: Sequence[str],
    prompts: Path | None,
    max_new_tokens: int,
    experts: int | None,
    options: LoadOptions,
) -> list[Recording]:
    from moert.predict import Recording

    traces = [as_trace(source) for source in sources]
    if prompts is not None and None not in traces:
        raise ConfigError("--prompts is for a model, and these are traces: leave it out")
    texts = read_texts(prompts, "moert predict")
    names = names_of([Path(source).expanduser() for source in sources])
    found = []
    for source, path, name in zip(sources, traces, names, strict=True):
        if path is not None:
            found.append(Recording.of_trace(open_trace(stack, path, experts), name))
        else:
            found.append(_run(source, texts, max_new_tokens, options))
    return found


def _run(source: str, texts: Sequence[str], max_new_tokens: int, options: LoadOptions) -> Recording:
    """What a model's layers were given and chose while it continued the texts."""
    quiet = replace(options, offload=replace(options.offload, predictor="none"))
    with continuing(source, texts, max_new_tokens, quiet) as (model, runs):
        from moert.hf.watched_run import watched_run

        return watched_run(model, source, runs)


def _studies(recordings: Sequence[Recording], trains: Sequence[str]) -> list[Study]:
    from moert.predict import Study, halves
    from moert.predict.recorded import same_model

    found = []
    for tested in recordings:
        whole = list(range(len(tested.sequences)))
        alone = list(trains) == ["nothing"] and len(whole) < 2
        first, second = ([], whole) if alone else halves(tested)
        for train in trains:
            if train == "same":
                found.append(Study(tested, second, tested, first, "its first half"))
            elif train == "nothing":
                found.append(Study(tested, second))
            else:
                others = [one for one in recordings if one is not tested and same_model(one, tested)]
                found += [Study(tested, second, one, range(len(one.sequences)), one.name) for one in others]
    if "other" in trains and all(study.trained in (None, study.tested) for study in found):
        names = ", ".join(one.name for one in recordings)
        raise ConfigError(f"no two of {names} are of the same model, so none can train for another: --train same")
    return found


def _evaluate(name: str, study: Study, horizons: Horizons, asked: int) -> Result:
    from moert.predict import evaluate

    with bar(f"{study.tested.name}: {name}") as progress:
        return evaluate(name, study, horizons, asked_tokens=asked, progress=progress.update)
