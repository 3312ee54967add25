"""`moert run`: continue a prompt."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from moert.cli.opening import Opened, open_tokenizer, opened
from moert.cli.options import Json, LoadOptions, Model, resolve_model, with_load_options
from moert.cli.output import facts, percent, print_json, rate, seconds, stats_table, stderr
from moert.config import format_bytes
from moert.errors import ConfigError, MoertError
from moert.tiers.memory import peak_rss_bytes

_WITH_STATS = ("layers", "limit", "limit_problem")


@with_load_options()
def run(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help='The text; "-" reads it from standard input.', show_default=False)
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="X", help="Draw tokens at this temperature. Default: the likeliest.", show_default=False
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Draw from the likeliest tokens that make up this probability.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="S", help="Makes drawing repeatable.", show_default=False)
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the chat template. Default: if the tokenizer has one.", show_default=False
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print what each layer's cache did.")] = False,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Continue PROMPT, printing the text as it comes."""
    name = resolve_model(model)
    sampling = _sampling_options(temperature, top_p, seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    tokenizer = open_tokenizer(name, options)
    from moert.hf.text import Sampling, encode, generate

    inputs = encode(tokenizer, text, chat=chat)
    with opened(name, options) as loaded:
        with _recorded(loaded.model, stats) as (trace, problem):
            made = generate(
                loaded.model,
                tokenizer,
                inputs,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(**sampling) if sampling else None,
                on_text=None if json else _print_piece,
            )
        document = {**_document(model, made, loaded, options, sampling, trace), "limit_problem": problem}
    if json:
        print_json(document if stats else {key: value for key, value in document.items() if key not in _WITH_STATS})
        return 0
    if not made.text.endswith("\n"):
        print(flush=True)
    if stats:
        _print_stats(document, stderr())
    return 0


@contextmanager
def _recorded(model: Any, asked: bool) -> Iterator[tuple[Any, str | None]]:
    """(the routing of what runs within, if the limit of this machine is known and was asked for; else why it is not)"""
    if not asked:
        yield None, None
        return
    import moert
    from moert.hf.limits import calibration_of

    problem = None
    try:
        if calibration_of(model) is None:
            problem = "not measured here yet: moert doctor MODEL --calibrate"
    except MoertError as error:
        problem = str(error)
    if problem is not None:
        yield None, problem
        return
    with moert.record(model, weights=False) as trace:
        yield trace, None


def _sampling_options(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any] | None:
    """The arguments of `Sampling`; None means the likeliest token each time."""
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p={top_p} must be above 0 and at most 1")
    if temperature == 0 or (temperature is None and top_p is None):
        return None
    return {"seed": random.getrandbits(32) if seed is None else seed, "temperature": temperature, "top_p": top_p}


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _document(
    model: str, made: Any, loaded: Opened, options: LoadOptions, sampling: dict[str, Any] | None, trace: Any
) -> dict[str, Any]:
    import moert

    decoded = moert.stats(loaded.model).decoding.tokens > 0
    stats = moert.stats(loaded.model, trace if decoded else None).as_dict()
    return {
        "model": model,
        "policy": options.offload.policy,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "text": made.text,
        "tokens": len(made.token_ids),
        "token_ids": made.token_ids,
        "prompt_tokens": made.prompt_tokens,
        "sampling": sampling,
        "tokens_per_s": made.tokens_per_s,
        "time_to_first_token_s": made.time_to_first_token_s,
        "load_s": loaded.load_s,
        **stats,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _limit_text(document: dict[str, Any]) -> str:
    limit = document["limit"]
    if limit is None:
        return f"unknown: {document['limit_problem'] or 'too few tokens'}"
    lost = {
        "policy": limit["lost_to_policy_s"],
        "waiting": limit["lost_to_waiting_s"],
        "overhead": limit["lost_to_overhead_s"],
    }
    parts = ", ".join(f"{seconds(value)} to {name}" for name, value in lost.items())
    return (
        f"{percent(limit['share'])} of the {rate(limit['bound_tokens_per_s'])} that nothing can pass on this machine, "
        f"reads ahead of time included; a token loses {parts}"
    )


def _print_stats(document: dict[str, Any], console: Console) -> None:
    console.print()
    console.print(stats_table(document))
    console.print()
    resident, total = document["resident_bytes"], document["expert_bytes"]
    console.print(
        facts(
            [
                (
                    "speed",
                    f"{rate(document['tokens_per_s'])}, the first after {seconds(document['time_to_first_token_s'])}",
                ),
                ("limit", _limit_text(document)),
                ("loading", seconds(document["load_s"])),
                (
                    "experts",
                    f"{format_bytes(resident)} of {format_bytes(total)} resident ({percent(resident / total)})",
                ),
                ("memory", f"{format_bytes(document['peak_rss_bytes'])} at most, the whole process"),
            ]
        )
    )
