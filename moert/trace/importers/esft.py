"""Expert scores of deepseek-ai/ESFT: a folder of `expert_weights_N.txt`, a file for each layer from 1.

A line is a sequence: the ids of all its tokens, top-k each and separated by tabs, two tabs, and their weights likewise.
The same line of each file is the same sequence.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.trace.importers.base import (
    Importer,
    ImportOptions,
    cannot_read,
    checked,
    malformed,
    read_lines,
    tokens_of,
    uniform_layers,
)
from moert.trace.sequence import Sequence, TraceHeader

_FILE = re.compile(r"expert_weights_([1-9][0-9]{0,3})\.txt")


class Esft(Importer):
    """Texts that were given, run in one pass: teacher-forced. Routing is causal, so they replay as if decoded."""

    about = "folder of ESFT's expert_weights_N.txt, a layer each"

    def recognises(self, path: Path) -> bool:
        return (path / "expert_weights_1.txt").is_file()

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        files = _files(path)
        layers = uniform_layers(
            len(files), options, path, options.need("top_k", path), [f"layers.{number}" for number in files]
        )
        header = TraceHeader(layers=layers, model=options.model, sampled=False, source="esft")
        return header, _sequences(path, list(files.values()), header, options)


def _files(path: Path) -> dict[int, Path]:
    """The layers' files, by the number in their names."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        raise cannot_read(error, path) from error
    found = {int(match[1]): path / name for name in names if (match := _FILE.fullmatch(name))}
    if not found:
        raise malformed(path, "folder", "there is no file expert_weights_1.txt")
    missing = set(range(1, max(found) + 1)) - set(found)
    if missing:
        raise malformed(path, "folder", f"expert_weights_{min(missing)}.txt is missing, of {max(found)} layers")
    return dict(sorted(found.items()))


def _sequences(path: Path, files: list[Path], header: TraceHeader, options: ImportOptions) -> Iterator[Sequence]:
    quiet = replace(options, report=lambda done, total: None)
    readers = [read_lines(file, quiet if index else options) for index, file in enumerate(files)]
    first_step = 0
    for lines in itertools.zip_longest(*readers):
        number = next(line[0] for line in lines if line is not None)
        parsed = []
        for file, line in zip(files, lines, strict=True):
            if line is None:
                raise malformed(file, f"line {number}", "is missing; other layers have it")
            parsed.append(_line(file, number, line[1], header.top_k))
            if len(parsed[-1][0]) != len(parsed[0][0]):
                tokens = f"{len(parsed[-1][0])} tokens, the first layer has {len(parsed[0][0])}"
                raise malformed(file, f"line {number}", tokens)
        experts = np.stack([ids for ids, _ in parsed], axis=1)
        weights = np.stack([weights for _, weights in parsed], axis=1)
        phases, steps = tokens_of(options.phase, len(experts), first_step)
        first_step = int(steps[-1]) + 1
        sequence = Sequence(experts, steps, phases, weights, name=f"{path.name}/{number - 1}")
        yield checked(sequence, header, path, f"line {number}")


def _line(path: Path, number: int, text: str, top_k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and weights [T, K] of one sequence in one layer."""
    where = f"line {number}"
    halves = text.split("\t\t")
    if len(halves) != 2:
        raise malformed(path, where, f"{len(halves) - 1} times two tabs; they must stand once, between ids and weights")
    ids, weights = (_numbers(path, where, half, kind) for half, kind in zip(halves, (int, float), strict=True))
    if len(ids) != len(weights):
        raise malformed(path, where, f"{len(ids)} ids but {len(weights)} weights")
    if len(ids) % top_k or not ids:
        raise malformed(path, where, f"{len(ids)} ids are no multiple of the {top_k} of each token (--top-k)")
    if min(ids) < 0 or max(ids) >= 2**31:
        raise malformed(path, where, f"ids from {min(ids)} to {max(ids)}")
    shape = (-1, top_k)
    return np.array(ids, dtype=np.int32).reshape(shape), np.array(weights, dtype=np.float32).reshape(shape)


def _numbers(path: Path, where: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in text.split()]
    except ValueError as error:
        raise malformed(path, where, str(error)) from None
