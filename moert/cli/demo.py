"""`moert demo`: the small model that comes with moert, with few experts in memory, checked against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.opening import open_tokenizer, opened, opened_plain
from moert.cli.options import Json, LoadOptions, demo_folder, resolve_model, with_load_options
from moert.cli.output import bar, facts, heat, percent, print_json, rate, stdout
from moert.config import format_bytes

PROMPT = """class Cache:
    def __init__(self, maxsize):
        self.maxsize = maxsize
        self.data = {}

    def get(self, key"""
# A model this small repeats itself without one.
_REPETITION_PENALTY = 1.2
TRY_NEXT = (
    ('moert run demo "def main(" --host-memory 25% --temperature .8', "your prompt"),
    ("moert verify demo --host-memory 25%", "every logit"),
    ("moert doctor", "this machine"),
)
_MARGIN = "  "
_BAR_COLUMNS = 40


@with_load_options(only=["host_memory"], defaults={"host_memory": "25%"}, hf=False)
def demo(
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Python code to continue.", show_default=False)] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write.")] = 96,
    json: Json = False,
    model: Annotated[str | None, typer.Option(hidden=True)] = None,
    *,
    options: LoadOptions,
) -> int:
    """Write some Python with a quarter of the experts in memory, and check it against plain transformers.

    Exit code 1 if the tokens differ.
    """
    began = perf_counter()
    name = resolve_model(model) if model else str(demo_folder())
    # In float32 rounding decides no token, on any processor.
    options = replace(options, dtype="float32")
    console = stdout()
    tokenizer = open_tokenizer(name, options)
    from moert.hf.text import encode, generate

    inputs = encode(tokenizer, prompt, chat=False)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": _REPETITION_PENALTY}
    with _one_thread():
        with opened(name, options) as loaded:
            document = _describe(loaded.model, prompt)
            show = None if json else _show_beginning(document, console)
            mine = generate(loaded.model, tokenizer, inputs, on_text=show, **how)
            document.update(_counts(loaded.model))
        if not json:
            console.print("\n")
        del loaded
        with (
            opened_plain(name, options, experts_implementation=None) as plain,
            bar("the same with plain transformers", max_new_tokens) as progress,
        ):
            theirs = generate(plain.model, tokenizer, inputs, on_token=progress.advance, **how)
    identical = mine.token_ids == theirs.token_ids
    document.update(
        text=mine.text,
        tokens=len(mine.token_ids),
        token_ids=mine.token_ids,
        tokens_per_s=mine.tokens_per_s,
        identical_tokens=identical,
        transformers_text=theirs.text,
        transformers_token_ids=theirs.token_ids,
        transformers_tokens_per_s=theirs.tokens_per_s,
        total_s=perf_counter() - began,
    )
    if json:
        print_json(document)
    else:
        _show_result(document, console)
    return 0 if identical else 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute on one core: matrices this small are slower on several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _describe(model: Any, prompt: str) -> dict[str, Any]:
    from moert.hf.model import runtime_of

    layers = runtime_of(model).layers
    specs = [layer.spec for layer in layers]
    return {
        "prompt": prompt,
        "num_layers": len(specs),
        "num_experts": max(spec.num_experts for spec in specs),
        "top_k": max(spec.top_k for spec in specs),
        "slot_share": sum(layer.residency.capacity for layer in layers) / sum(spec.num_experts for spec in specs),
        "dtype": str(model.dtype).removeprefix("torch."),
        "dense_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    }


def _counts(model: Any) -> dict[str, Any]:
    import moert

    return moert.stats(model).as_dict()


def _show_beginning(document: dict[str, Any], console: Console) -> Callable[[str], None]:
    """Print the title and the prompt; returns what prints each piece of the continuation."""
    shape = (
        f"{document['num_layers']} layers of {document['num_experts']} experts, {document['top_k']} for each token, "
        f"{percent(document['slot_share'])} in memory"
    )
    console.print()
    console.print(f"[bold]moert demo[/]  [bright_black]{shape}[/]", soft_wrap=True)
    console.print()
    console.print(Text(_indented(_MARGIN + document["prompt"]), style="bright_black"), end="", soft_wrap=True)

    def show(piece: str) -> None:
        console.print(Text(_indented(piece)), end="", soft_wrap=True)

    return show


def _indented(text: str) -> str:
    return text.replace("\n", f"\n{_MARGIN}")


def _show_result(document: dict[str, Any], console: Console) -> None:
    resident, experts, dense = (document[key] for key in ("resident_bytes", "expert_bytes", "dense_bytes"))
    if document["identical_tokens"]:
        verdict = Text.assemble(("✓ ", "green"), f"all {document['tokens']} identical to plain transformers")
    else:
        verdict = Text("✗ DIFFERENT from plain transformers", style="bold red")
    share = percent(resident / experts)
    counts = f"{document['hits']:,} hits, {document['misses']:,} misses, {format_bytes(document['bytes_read'])} read"
    mine, theirs = rate(document["tokens_per_s"]), rate(document["transformers_tokens_per_s"])
    held, whole = format_bytes(resident + dense), format_bytes(experts + dense)
    rows: list[tuple[str, str | Text]] = [
        ("tokens", verdict),
        ("experts", f"{format_bytes(resident)} of {format_bytes(experts)} in memory ({share}), the rest on disk"),
        ("weights", f"{held} in memory, plain transformers holds {whole}"),
        ("speed", f"{mine}, plain transformers {theirs}"),
        ("hit rate", f"{percent(document['hit_rate'])}: {counts}"),
    ]
    console.print(facts(rows))
    console.print()
    console.print(_heat_table(document["layers"]))
    console.print()
    if not document["identical_tokens"]:
        _show_difference(document, console)
        return
    console.print("[bold]Try next[/]")
    console.print()
    table = Table.grid(padding=(0, 3, 0, 0))
    for command, what in TRY_NEXT:
        table.add_row(Text(_MARGIN + command, style="cyan"), Text(what, style="bright_black"))
    console.print(table)


def _heat_table(layers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black", padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("found in memory", width=_BAR_COLUMNS, no_wrap=True)
    table.add_column("hits", justify="right")
    table.add_column("misses", justify="right")
    for number, layer in enumerate(layers):
        table.add_row(
            str(number), heat(layer["hit_rate"], _BAR_COLUMNS), percent(layer["hit_rate"]), f"{layer['misses']:,}"
        )
    return table


def _show_difference(document: dict[str, Any], console: Console) -> None:
    ids, expected = document["token_ids"], document["transformers_token_ids"]
    step = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected))
    )
    console.print(f"[bold red]The tokens differ from number {step + 1} on.[/] Plain transformers wrote:")
    console.print()
    console.print(Text(_MARGIN + _indented(document["transformers_text"])), soft_wrap=True)
    console.print()
    console.print("This must not happen: please report it with the output of `moert doctor`.", soft_wrap=True)
