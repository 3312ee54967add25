"""Trained predictors beside the set transition they have to beat: the table, in Markdown.

    python bench/train_predictors.py demo
    python bench/train_predictors.py gpt-oss-mmlu.npz:32+gpt-oss-gpqa.npz:32 deepseek-law.npz:64 --json trained.json

They are trained on one half of the sequences, a tenth of which ends the training, and tested on the other. `demo` is
the model that comes with moert: it is run over windows of the standard library's source, each of another file, and what
its blocks are given is recorded too. A trace is moert's own or any file that `moert trace import` reads, with a layer's
experts as `:N` where it does not say them; traces of one model joined by `+` are one training set. Of the predictors,
those are trained that the sequences have what it takes for.

`set_transition` is ridge regression of a layer's experts on those that the token chose in the layer before. It knows
nothing of the first layer, so recall is also given without it.
"""

from __future__ import annotations

import json
import platform
import random
import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from policies import open_trace
from rich.console import Console
from rich.progress import Progress
from start import start_with
from stdlib_text import load_split

import moert
from moert.errors import MoertError
from moert.hf.recorded_hidden import record_hidden
from moert.hf.recording import record
from moert.hf.text import hush, load_tokenizer
from moert.predictors.base import Need
from moert.torch_threads import wanted_settings
from moert.trace import TraceFile
from moert.training.examples import Shares, Source, trace_hash
from moert.training.hidden import HiddenFile, HiddenWriter
from moert.training.loop import Effort
from moert.training.recipes.base import make_recipe, recipe_names
from moert.training.run import describe, train

HEADS = ("trace", "predictor", "recall at k", "1.5k", "2k", "all right", "from layer 2 on", "MiB", "trained in")


def record_demo(folder: Path, n_texts: int, n_tokens: int, progress: Progress) -> Source:
    """The demo model's routing and hidden states over `n_texts` windows of `n_tokens` tokens, each of another file."""
    hush(bars=False)
    path = Path(moert.__file__).parent / "data" / "demo"
    tokenizer = load_tokenizer(str(path), None)
    files, _ = load_split()
    rng = random.Random(0)
    rng.shuffle(files)
    task = progress.add_task("recording", total=n_texts)
    done = 0
    with (
        moert.load(path, predictor="none") as model,
        record_hidden(model) as states,
        HiddenWriter(folder / "hidden.safetensors") as writer,
    ):
        with record(model, folder / "trace.safetensors", scores=False, weights=False), torch.no_grad():
            for file in files:
                begin = rng.randrange(max(1, len(file.text) - 8 * n_tokens))
                ids = tokenizer(file.text[begin : begin + 8 * n_tokens])["input_ids"][:n_tokens]
                if len(ids) < n_tokens:
                    continue
                model(input_ids=torch.tensor([ids]), use_cache=False)
                writer.add(states.take())
                done += 1
                progress.update(task, completed=done)
                if done == n_texts:
                    break
        with TraceFile(folder / "trace.safetensors") as trace:
            writer.close(trace_hash(trace))
    progress.remove_task(task)
    return Source(TraceFile(folder / "trace.safetensors"), "demo", HiddenFile(folder / "hidden.safetensors"))


def has_what_it_needs(name: str, sources: list[Source]) -> bool:
    """Whether the predictor `name` can be trained on them."""
    needs = make_recipe(name).needs
    hidden = all(source.hidden is not None for source in sources)
    ids = all(sequence.token_ids is not None for source in sources for sequence in source.trace)
    return (hidden or Need.HIDDEN not in needs) and (ids or Need.TOKEN_IDS not in needs)


def rows_of(name: str, documents: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows for one training set: the baselines, then each predictor with its distance to the transition."""
    first = documents[0]
    about = f"{name}: {first['num_layers']} x {first['num_experts']}, top-{first['top_k']}, "
    about += f"{first['tokens']['train'] + first['tokens']['validation']:,} + {first['tokens']['test']:,} tokens"
    transition = first["baselines"]["set_transition"]
    rows = [
        [about if not place else "", one, *_cells(found, None), "", ""]
        for place, (one, found) in enumerate(first["baselines"].items())
    ]
    for document in documents:
        cells = _cells(document["test"], transition)
        size = f"{document['bytes'] / 2**20:.1f}"
        rows.append(["", f"**{document['name']}**", *cells, size, f"{document['train_s']:.0f} s"])
    return rows


def _cells(found: dict[str, Any], beside: dict[str, Any] | None) -> list[str]:
    recall = [found["recall"][width] for width in ("1k", "1.5k", "2k")]
    cells = [f"{100 * value:.1f}" for value in (*recall, found["exact"], found["recall_after_first"])]
    if beside is not None:
        cells[0] += f" ({100 * (recall[0] - beside['recall']['1k']):+.1f})"
        cells[4] += f" ({100 * (found['recall_after_first'] - beside['recall_after_first']):+.1f})"
    return cells


def main(
    sets: Annotated[list[str], typer.Argument(metavar="demo|TRACE[+TRACE]...", show_default=False)],
    predictors: Annotated[
        str | None, typer.Option(metavar="NAME;NAME...", help="Default: all that can be trained.", show_default=False)
    ] = None,
    texts: Annotated[int, typer.Option(min=3, metavar="N", help="That `demo` is run over.")] = 600,
    tokens: Annotated[int, typer.Option(min=8, max=512, metavar="N", help="Of each of them.")] = 256,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S")] = 0,
    out: Annotated[Path | None, typer.Option("--json", metavar="OUT.json", show_default=False)] = None,
) -> None:
    names = recipe_names() if predictors is None else predictors.split(";")
    rows: list[list[str]] = []
    documents: list[dict[str, Any]] = []
    try:
        with ExitStack() as stack, Progress(console=Console(stderr=True), transient=True) as progress:
            for text in sets:
                if text == "demo":
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moert-")))
                    sources = [record_demo(folder, texts, tokens, progress)]
                else:
                    sources = [Source(one.trace, one.name) for one in map(open_trace, text.split("+"))]
                title = "+".join(source.name for source in sources)
                found = []
                for name in names:
                    if not has_what_it_needs(name, sources):
                        continue
                    task = progress.add_task(f"{title}: {name}")
                    own = epochs if make_recipe(name).epochs else None
                    effort = Effort(
                        own,
                        seed,
                        report=lambda done, total, _, task=task: progress.update(task, completed=done, total=total),
                    )
                    made = train(sources, name, effort=effort, shares=Shares(test=0.5))
                    found.append({"set": title, "name": name, **describe(made)})
                    progress.remove_task(task)
                documents += found
                rows += rows_of(title, found)
    except (MoertError, OSError) as error:
        raise SystemExit(f"train_predictors: {error}") from None
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"`{shlex.join(['python', *sys.argv])}`, {platform.machine()}, {threads}, seed {seed}\n")
    print("| " + " | ".join(HEADS) + " |\n|---|---|" + "---:|" * (len(HEADS) - 2))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if out is not None:
        out.write_text(json.dumps(documents, indent=1) + "\n")


if __name__ == "__main__":
    start_with(wanted_settings())
    typer.run(main)
