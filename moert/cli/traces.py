"""Traces that a command is pointed at: moert's own, and other programs' files, imported on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from moert.cli.output import bar
from moert.errors import ConfigError, TransferError
from moert.tiers.durable import release, write_whole

if TYPE_CHECKING:
    from moert.trace import TraceLike

TRACE_HELP = "A trace that `moert trace record` made, or any file that `moert trace import` reads."
TRACE_SUFFIXES = (".safetensors", ".npz", ".npy", ".pt", ".csv", ".json", ".jsonl")
"""What a path that is not there must end with to have been meant as a trace, and not as a model."""

EXPERTS_HELP = "Experts of each layer, for files that do not say it."


def as_trace(source: str) -> Path | None:
    """Where a trace is; None: `source` is a model.

    Raises:
        ConfigError: it ends as traces do, and is not there.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return path
    if path.suffix in TRACE_SUFFIXES:
        raise ConfigError(f"{source!r} does not exist; give a trace, or a model")
    return None


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, no two alike."""
    names = [path.name for path in paths]
    parts = 1
    while len(set(names)) < len(names) and parts < max(len(path.parts) for path in paths):
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return names if len(set(names)) == len(names) else [f"{name} ({place})" for place, name in enumerate(names, 1)]


def open_trace(stack: ExitStack, path: Path, experts: int | None) -> TraceLike:
    """The trace in a file, open as long as `stack` is. A file of another program is imported first.

    Raises:
        ConfigError: no format that is known, or nothing in it.
        MoertError: what opening or importing raises.
    """
    from moert.trace import TraceFile
    from moert.trace.importers.base import ImportOptions
    from moert.trace.importing import import_traces, is_trace

    path = path.expanduser()
    if is_trace(path):
        trace = stack.enter_context(TraceFile(path))
    else:
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moert-"))) / "trace"
        with bar(f"importing {path.name}") as progress:
            import_traces([path], copy, ImportOptions(experts=experts), progress=progress.update)
        trace = stack.enter_context(TraceFile(copy))
    if not len(trace):
        raise ConfigError(f"{str(path)!r} has no sequences")
    return trace


def check_output(path: Path | None, option: str, suffix: str) -> None:
    """See to it before the work that a file can be written.

    Raises:
        ConfigError: it has another suffix, is a folder, or is in one that is not there or not writable.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{option}={str(path)!r} must end in {suffix}")
    if path.is_dir():
        raise ConfigError(f"{option}={str(path)!r} is a folder; give the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise ConfigError(f"{option}={str(path)!r}: cannot write there: {error.strerror}") from None


def put_output(path: Path, data: bytes) -> None:
    """Write a file whole; what had its name is replaced only then.

    Raises:
        TransferError: it cannot be written, and nothing is left.
    """
    try:
        write_whole(path, data)
    except TransferError:
        release(path.parent, [path.name])
        raise
