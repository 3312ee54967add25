"""JSON lines of sqliteai/waste: one token a line, `{"tok": N, "layers": [[ids of a layer], ...]}`, decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moert.trace.check import find_expert_problem
from moert.trace.importers.base import (
    Importer,
    ImportOptions,
    beginning,
    checked,
    malformed,
    read_lines,
    refuse_text_after,
    tokens_of,
    uniform_layers,
)
from moert.trace.sequence import Phase, Sequence, TraceHeader


class Waste(Importer):
    """A file is one sequence of decoded tokens; their numbers follow one another. Ids are sorted, not ranked."""

    about = "JSON lines, a token each: {tok, layers}"

    def recognises(self, path: Path) -> bool:
        start = beginning(path, 4096).lstrip()
        return start.startswith(b"{") and b'"tok"' in start and b'"layers"' in start

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        lines = read_lines(path, options)
        number, text = next(lines, (1, ""))
        tok, first = _token(path, number, text)
        top_k = max((len(ids) for ids in first), default=0)
        if top_k == 0:
            raise malformed(path, "line 1", "no experts")
        header = TraceHeader(
            layers=uniform_layers(len(first), options, path, top_k), model=options.model, source="waste"
        )
        return header, self._sequences(path, lines, header, tok, first)

    def _sequences(
        self, path: Path, lines: Iterator[tuple[int, str]], header: TraceHeader, tok: int, first: list[list[int]]
    ) -> Iterator[Sequence]:
        rows = [_row(path, 1, first, header)]
        for number, text in lines:
            if not text.strip():
                refuse_text_after(path, lines, number)
                break
            following, layers = _token(path, number, text)
            if following != tok + 1:
                raise malformed(path, f"line {number}", f'"tok" is {following} after {tok}: tokens are missing')
            tok = following
            rows.append(_row(path, number, layers, header))
        phases, steps = tokens_of(Phase.DECODE, len(rows), 0)
        sequence = Sequence(np.stack(rows), steps, phases, name=path.stem)
        yield checked(sequence, header, path, f"lines 1 to {len(rows)}")


def _token(path: Path, number: int, text: str) -> tuple[int, list[list[int]]]:
    where = f"line {number}"
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise malformed(path, where, f"not JSON ({error})") from error
    if not isinstance(document, dict) or type(document.get("tok")) is not int:
        raise malformed(path, where, 'not an object with a whole number "tok"')
    layers = document.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(ids, list) for ids in layers):
        raise malformed(path, where, '"layers" is not a list of lists')
    if not all(type(expert) is int for ids in layers for expert in ids):
        raise malformed(path, where, "an expert's id is not a whole number")
    return document["tok"], layers


def _row(path: Path, number: int, layers: list[list[int]], header: TraceHeader) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The ids of one token [L, K]."""
    where = f"line {number}"
    if len(layers) != len(header.layers):
        raise malformed(path, where, f"{len(layers)} layers, line 1 has {len(header.layers)}")
    for index, ids in enumerate(layers):
        if len(ids) != header.top_k:
            raise malformed(path, where, f"layer {index} has {len(ids)} experts, others {header.top_k}")
    if min(map(min, layers)) < 0 or max(map(max, layers)) >= 2**31:
        raise malformed(path, where, "an expert's id is negative or beyond 32 bits")
    row = np.array(layers, dtype=np.int32)
    problem = find_expert_problem(row[None], header)
    if problem is not None:
        raise malformed(path, where, problem.text.removeprefix("token 0, "))
    return row
