"""Making a trace file out of other programs' files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moert.errors import ConfigError
from moert.plugins import available, load_plugin
from moert.trace.importers.base import Importer, ImportOptions, beginning
from moert.trace.layout import OPTIONAL_KINDS, VERSION_KEY
from moert.trace.sequence import TraceHeader
from moert.trace.writer import TraceWriter

PACKAGE = "moert.trace.importers"
_PARTS = 1000


@dataclass(frozen=True)
class Imported:
    """What has been written."""

    path: Path
    formats: tuple[str, ...]
    """Of each file read."""
    header: TraceHeader
    sequences: int
    tokens: int


def load_importer(name: str) -> Importer:
    """The importer of a format, or of `"package.module:Class"`.

    Raises:
        ConfigError: there is none of that name.
    """
    return load_plugin(PACKAGE, name, Importer)()  # type: ignore[type-abstract]


def is_trace(path: Path) -> bool:
    """Whether a file begins as `TraceWriter` writes it. False for what cannot be read."""
    start = beginning(path)
    return start[8:9] == b"{" and VERSION_KEY.encode() in start


def recognise(path: Path) -> str:
    """The name of the format that a file or folder seems to have.

    Raises:
        ConfigError: none or several, with what was tried; or there is no such file.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    names = available(PACKAGE)
    found = [name for name in names if load_importer(name).recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{path} may be of any of these formats: {', '.join(found)}; choose one with --format")
    if is_trace(path):
        raise ConfigError(f"{path} is a trace of moert's already; use it as it is")
    tried = "; ".join(f"{name} ({load_importer(name).about})" for name in names)
    raise ConfigError(
        f"{path} is of no format that is known; tried: {tried}. Name it with --format if it is one of them"
    )


def import_traces(
    paths: Items[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: ImportOptions,
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    without: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the sequences of one or several files, in that order, into one trace file. Blocks.

    Steps go on from one file to the next.

    Args:
        format: name of the importer; None: recognised, file by file.
        without: of `weights`, `scores` and `token_ids`, what to leave out.
        progress: called with how much is done, and how much there is.

    Raises:
        ConfigError: an option is missing or wrong, a format is not recognised, or the files do not agree in what a
            header says.
        CorruptFileError: a file is malformed; nothing is written then, nor with any other error.
        TransferError: a file cannot be read or written.
    """
    left_out: dict[str, Any] = dict.fromkeys(without)
    for kind in left_out:
        if kind not in OPTIONAL_KINDS:
            raise ConfigError(f"{kind!r} is none of {', '.join(OPTIONAL_KINDS)}")
    if not paths:
        raise ConfigError("there is no file to import")
    files = [Path(path) for path in paths]
    names = tuple(recognise(path) if format is None else format for path in files)
    writer: TraceWriter | None = None
    sequences = tokens = next_step = 0
    try:
        for index, (path, name) in enumerate(zip(files, names, strict=True)):
            reporting = replace(options, report=_share(progress, index, len(files))) if progress else options
            header, found = load_importer(name).read(path, reporting)
            if writer is None:
                writer = TraceWriter(out, header)
            _check_agree(files[0], writer.header, path, header)
            first_step = next_step
            for sequence in found:
                shifted = replace(sequence, steps=sequence.steps + first_step, **left_out)
                writer.add(shifted)
                sequences, tokens = sequences + 1, tokens + len(shifted.steps)
                next_step = max(next_step, int(shifted.steps[-1]) + 1)
        assert writer is not None
        writer.close()
    finally:
        if writer is not None:
            writer.discard()
    return Imported(Path(out), names, writer.header, sequences, tokens)


def _share(progress: Callable[[int, int], None], index: int, count: int) -> Callable[[int, int], None]:
    """Reports of one file of several as reports of them all."""

    def report(done: int, total: int) -> None:
        progress(index * _PARTS + _PARTS * done // max(total, 1), count * _PARTS)

    return report


def _check_agree(first: Path, header: TraceHeader, path: Path, other: TraceHeader) -> None:
    if header == other:
        return
    if len(header.layers) != len(other.layers):
        own, theirs = str(len(header.layers)), f"{len(other.layers)} layers"
    elif header.layers != other.layers:
        own, theirs = next((str(a), str(b)) for a, b in zip(header.layers, other.layers, strict=True) if a != b)
    else:
        name = next(field.name for field in fields(header) if getattr(header, field.name) != getattr(other, field.name))
        own, theirs = repr(getattr(header, name)), f"{name} {getattr(other, name)!r}"
    raise ConfigError(f"{path} does not belong into one trace with {first}: {theirs}, not {own}; import it apart")
