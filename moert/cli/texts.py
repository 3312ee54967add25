"""Texts that a model continues where a command takes a model in place of a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moert.cli.opening import open_tokenizer, opened
from moert.cli.options import LoadOptions, resolve_model
from moert.cli.output import bar
from moert.cli.trace_record import read_prompts
from moert.errors import ConfigError

Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What MODEL continues, as for `moert trace record`. Default: eight lines of English and Python.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that MODEL adds to each prompt.")]


def read_texts(path: Path | None, command: str) -> Sequence[str]:
    """The texts of a file of prompts; without one, those that come with moert.

    Args:
        command: that asks, for the message: it takes a trace where prompts are conversations.

    Raises:
        ConfigError: the file cannot be read, has no prompt, or has one that is a conversation.
    """
    from moert.suit.prompts import PROMPTS

    if path is None:
        return PROMPTS
    found = []
    for prompt in read_prompts(path):
        if prompt.text is None:
            raise ConfigError(
                f"--prompts: prompt {prompt.name} of {str(path)!r} is a conversation; `moert trace record` runs those, "
                f"and `{command}` takes the trace"
            )
        found.append(prompt.text)
    return found


@contextmanager
def continuing(
    source: str, texts: Sequence[str], max_new_tokens: int, options: LoadOptions
) -> Iterator[tuple[Any, list[Callable[[], None]]]]:
    """The model, and for each text what has it continued, with progress; the model is closed at the end.

    Raises:
        InputError: transformers cannot load it.
        MoertError: moert cannot.
    """
    name = resolve_model(source)
    tokenizer = open_tokenizer(name, options)
    from moert.hf.text import encode, generate

    inputs = [encode(tokenizer, text, chat=False) for text in texts]
    with opened(name, options) as loaded, bar("running the model", len(inputs) * max_new_tokens) as progress:

        def run(one: Any) -> None:
            generate(loaded.model, tokenizer, one, max_new_tokens=max_new_tokens, on_token=progress.advance)

        yield loaded.model, [functools.partial(run, one) for one in inputs]
