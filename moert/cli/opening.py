"""Opening a model for a command, with progress, and closing it however the command ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from moert.cli.options import LoadOptions
from moert.cli.output import Bar, bar, one_line, stderr
from moert.errors import MoertError, PolicyError


class InputError(Exception):
    """What transformers says of a model it cannot load; for the user it is bad input."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever transformers raises while it reads a user's files into `InputError`; moert's own errors pass."""
    try:
        yield
    except (MoertError, PolicyError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        taken = "" if os.path.isdir(name) else "there is no such folder here, and as a model id of the hub: "
        raise InputError(f"cannot load {name!r}: {taken}{kind}{one_line(error)}") from error


@dataclass(frozen=True)
class Opened:
    """A model whose experts moert keeps, and the seconds it took to load."""

    model: Any
    load_s: float


def open_tokenizer(name: str, options: LoadOptions) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    with bar("starting"):
        _import_quietly(name)
    from moert.hf.text import load_tokenizer, read_settings

    with reading(name):
        read_settings(name, options.revision)  # what cannot be found at all is said once, not for each file
        return load_tokenizer(name, options.revision)


@contextmanager
def opened(name: str, options: LoadOptions) -> Iterator[Opened]:
    """The model, until the end of the `with` statement.

    Raises:
        InputError: transformers cannot load it.
        MoertError: moert cannot.
    """
    import moert

    _import_quietly(name)
    began = perf_counter()
    with _loading_bar(name) as progress, reading(name):
        # Tokenizers and headers of the hub's models are read from HuggingFace's own folder, so the weights are too.
        model = moert.load(name, progress=progress.update, **{**options.kwargs, "cache_dir": None})
    try:
        yield Opened(model, perf_counter() - began)
    finally:
        moert.close(model)


@contextmanager
def opened_plain(name: str, options: LoadOptions, *, experts_implementation: str | None) -> Iterator[Opened]:
    """The model as transformers alone runs it, whole in memory; see `moert.hf.reference.load_plain`."""
    _import_quietly(name)
    from moert.hf.reference import load_plain

    began = perf_counter()
    with _loading_bar(name), reading(name):
        model = load_plain(name, experts_implementation=experts_implementation, **options.hf_kwargs)
    yield Opened(model, perf_counter() - began)


def _is_local(name: str) -> bool:
    return os.path.isdir(name)


@contextmanager
def _loading_bar(name: str) -> Iterator[Bar]:
    if not _is_local(name):  # a download shows its own progress
        yield Bar(None, 0)  # type: ignore[arg-type]
        return
    with bar(f"loading {os.path.basename(os.path.abspath(name))}") as progress:
        yield progress


def _import_quietly(name: str) -> None:
    """Import what takes seconds, and hide transformers' own bars where ours stand or nobody looks."""
    from moert.hf.text import hush

    hush(bars=_is_local(name) or not stderr().is_terminal)
