"""Predictors that go by picks, on public traces: in domain, across domains, and from a cold start, in Markdown.

    python bench/predictors.py FOLDER --json predictors.json

`FOLDER` holds what docs/predictors.md names: routing of gpt-oss-20b and DeepSeek-V2-Lite, none of which is part of the
project. Of each trace, the first half of the sequences is for training and the second for the test; sequences that a
file marks as a model repeating itself are left out. Across domains, all sequences of other files train, and the test is
the same second half. Exits with 1 where the joint model is below what its page promises.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from moert.predict import Horizons, Recording, Result, Study, evaluate, halves
from moert.predict.run import as_document
from moert.trace import Trace
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer, recognise

PREDICTORS = ("frequency", "previous_token", "activation_matrix", "set_transition", "expert_map", "joint")


@dataclass(frozen=True)
class Source:
    """One file, and the recall that the joint model must reach on it in domain."""

    name: str
    files: tuple[str, ...]
    experts: int
    goal: float | None = None


SOURCES = (
    Source("gpt-oss-20b, MMLU-Pro", ("gpt-oss-20b/gpt-oss-20b_mmlu_pro_test.npz",), 32, 0.64),
    Source("gpt-oss-20b, GPQA", ("gpt-oss-20b/gpt-oss-20b_gpqa_main.npz",), 32, 0.71),
    Source("DeepSeek-V2-Lite, summary", ("deepseek-v2-lite/deepseek_v2_lite_summary.npz",), 64, 0.64),
    Source("DeepSeek-V2-Lite, law", ("deepseek-v2-lite/deepseek_v2_lite_law.npz",), 64),
    Source("DeepSeek-V2-Lite, intent", ("deepseek-v2-lite/deepseek_v2_lite_intent.npz",), 64),
)
TRAINED_ACROSS = "DeepSeek-V2-Lite, intent and law"
TESTED_ACROSS = "DeepSeek-V2-Lite, summary"
COLD_GOAL = 0.50
"""Recall from a cold start after a hundred tokens and before the 500th."""


def read(folder: Path, source: Source) -> Recording:
    """The trace in memory. Blocks."""
    sequences: list[Any] = []
    header = None
    for file in source.files:
        path = folder / file
        options = ImportOptions(experts=source.experts, keep_repetition=False)
        header, found = load_importer(recognise(path)).read(path, options)
        sequences += found
    assert header is not None
    return Recording.of_trace(Trace(header, sequences), source.name)


def horizons_table(results: list[Result]) -> list[str]:
    """Recall of k at each horizon, calibration error and time one layer ahead."""
    keys = [(row.ahead_layers, row.ahead_tokens) for row in results[0].rows]
    heads = [f"{layers} layers" if layers else f"{tokens} tokens" for layers, tokens in keys]
    lines = [
        "| trace | trained on | predictor | " + " | ".join(heads) + " | 2k | exact | calibration | µs a layer |",
        "|---|---|---|" + "---:|" * (len(heads) + 4),
    ]
    for result in results:
        first = result.rows[0]
        cells = [f"{100 * row.recall['k']:.1f}" if row.answered else "–" for row in result.rows]
        error = "–" if first.calibration_error is None else f"{100 * first.calibration_error:.1f}"
        cells += [f"{100 * first.recall['2k']:.1f}", f"{100 * first.exact:.1f}", error]
        cells.append(f"{result.observe_us + first.ask_us:.0f}")
        lines.append(f"| {result.trace} | {result.trained_on} | {result.predictor} | " + " | ".join(cells) + " |")
    return lines


def cold_table(results: list[Result]) -> list[str]:
    """Recall of k one layer ahead, by how many tokens of the test have gone by."""
    firsts = [first for first, _, _ in results[0].by_tokens]
    lines = [
        "| trained on | predictor | " + " | ".join(f"from token {first}" for first in firsts) + " |",
        "|---|---|" + "---:|" * len(firsts),
    ]
    for result in results:
        cells = " | ".join(f"{100 * recall:.1f}" for _, _, recall in result.by_tokens)
        lines.append(f"| {result.trained_on} | {result.predictor} | {cells} |")
    return lines


def main(
    folder: Annotated[Path, typer.Argument(help="Where the traces are.")],
    json_path: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write all rows.")] = None,
    predictors: Annotated[str, typer.Option(metavar="NAME,...", help="Instead of the usual ones.")] = ",".join(
        PREDICTORS
    ),
    asked: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each test that are asked about.")] = 2000,
) -> None:
    """Print the tables of docs/predictors.md."""
    from moert.predictors._choice import split_predictors

    names = split_predictors(predictors)
    recordings = {source.name: read(folder, source) for source in SOURCES}
    across = read(folder, Source(TRAINED_ACROSS, SOURCES[4].files + SOURCES[3].files, 64))
    tested = recordings[TESTED_ACROSS]
    whole = range(len(across.sequences))
    _, second = halves(tested)
    studies = [Study(one, halves(one)[1], one, halves(one)[0], "first half") for one in recordings.values()]
    cold = [
        Study(tested, second),
        Study(tested, second, across, whole, across.name),
        Study(tested, second, tested, halves(tested)[0], "first half"),
    ]
    in_domain: list[Result] = []
    from_cold: list[Result] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=(len(studies) + len(cold)) * len(names))
        for results, some, horizons in (
            (in_domain, studies, Horizons()),
            (from_cold, cold, Horizons((1,), ())),
        ):
            for study in some:
                for name in names:
                    progress.update(task, description=f"{study.tested.name}: {name}")
                    results.append(evaluate(name, study, horizons, asked_tokens=asked))
                    progress.advance(task)
    print("\n".join(horizons_table(in_domain)), end="\n\n")
    print(f"Tested on {TESTED_ACROSS}, one layer ahead:\n")
    print("\n".join(cold_table(from_cold)), end="\n\n")
    if json_path is not None:
        rows = [row for result in [*in_domain, *from_cold] for row in as_document(result)]
        json_path.write_text(json.dumps({"results": rows}, indent=1) + "\n")
    raise typer.Exit(0 if all(check(in_domain, from_cold)) else 1)


def check(in_domain: list[Result], from_cold: list[Result]) -> list[bool]:
    """Whether the joint model keeps each promise; prints each."""
    found = []
    goals = {source.name: source.goal for source in SOURCES if source.goal is not None}
    for result in in_domain:
        if result.predictor == "joint" and result.trace in goals:
            recall = result.row(1).recall["k"]
            found.append(recall >= goals[result.trace])
            print(f"- {result.trace}: joint {recall:.3f}, at least {goals[result.trace]:.2f}: {_word(found[-1])}")
    for result in from_cold:
        if result.predictor == "joint" and result.trained_on == "nothing":
            windows = {first: recall for first, _, recall in result.by_tokens}
            found.append(windows[100] >= COLD_GOAL)
            print(
                f"- from nothing: {windows[0]:.3f} in the first 20 tokens, {windows[100]:.3f} from the 100th to the "
                f"500th, at least {COLD_GOAL:.2f}: {_word(found[-1])}"
            )
    return found


def _word(kept: bool) -> str:
    return "kept" if kept else "NOT KEPT"


if __name__ == "__main__":
    typer.run(main)
