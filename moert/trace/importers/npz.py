"""numpy archives of `experts_N` [T, L, K], a sequence each, with `weights_N` and `meta_json` if at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.trace.importers._arrays import Archive, archive_names
from moert.trace.importers.base import (
    Importer,
    ImportOptions,
    as_ids,
    checked,
    malformed,
    tokens_of,
    uniform_layers,
)
from moert.trace.sequence import Sequence, TraceHeader

_NAME = re.compile(r"(experts|weights)_([0-9]{1,9})")


class Npz(Importer):
    """Arrays are read one by one. `meta_json` is a JSON list with one object a sequence.

    Of that object the texts `name` or `path` and the truth value `repetition` are used: the model repeated itself,
    which makes its routing look more alike than it is.
    """

    about = "numpy .npz of experts_N [tokens, layers, k]"

    def recognises(self, path: Path) -> bool:
        return any(_NAME.fullmatch(name) for name in archive_names(path))

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        archive = Archive(path)
        numbers = {name: int(match[2]) for name in archive.names if (match := _NAME.fullmatch(name))}
        experts = sorted((number, name) for name, number in numbers.items() if name.startswith("experts"))
        weights = {number: name for name, number in numbers.items() if name.startswith("weights")}
        strange = set(archive.names) - set(numbers) - {"meta_json"}
        if strange:
            raise malformed(path, f"array {min(strange)!r}", "is neither experts_N, weights_N nor meta_json")
        if not experts:
            raise malformed(path, "archive", "there is no array experts_N")
        if len({number for number, _ in experts}) != len(experts):
            raise malformed(path, "archive", "two arrays experts_N have the same number")
        alone = set(weights) - {number for number, _ in experts}
        if alone:
            raise malformed(path, f"array {weights[min(alone)]!r}", "there are no experts of that number")
        meta = _meta(path, archive, len(experts)) if "meta_json" in archive.names else [{} for _ in experts]
        entries = {number: entry for (number, _), entry in zip(experts, meta, strict=True)}
        kept = [
            (number, name)
            for number, name in experts
            if options.keep_repetition or not entries[number].get("repetition", False)
        ]
        if not kept:
            raise ConfigError(f"{path}: all {len(experts)} sequences are marked as repetition; nothing is left")
        shape = _ids(path, archive, kept[0][1]).shape
        header = TraceHeader(
            layers=uniform_layers(shape[1], options, path, shape[2]), model=options.model, source="npz"
        )
        return header, _sequences(path, archive, kept, weights, entries, header, options)


def _sequences(
    path: Path,
    archive: Archive,
    kept: list[tuple[int, str]],
    weight_names: Mapping[int, str],
    entries: Mapping[int, Mapping[str, Any]],
    header: TraceHeader,
    options: ImportOptions,
) -> Iterator[Sequence]:
    first_step = 0
    for place, (number, name) in enumerate(kept):
        where = f"array {name!r}"
        ids = _ids(path, archive, name)
        if ids.shape[1:] != (len(header.layers), header.top_k):
            raise malformed(path, where, f"{list(ids.shape)}, the first has [n, {len(header.layers)}, {header.top_k}]")
        weights = _weights(path, archive, weight_names[number], ids.shape) if number in weight_names else None
        phases, steps = tokens_of(options.phase, len(ids), first_step)
        label = entries[number].get("name") or entries[number].get("path") or number
        sequence = Sequence(ids, steps, phases, weights, name=f"{path.stem}/{label}")
        yield checked(sequence, header, path, where)
        first_step = int(steps[-1]) + 1
        options.report(place + 1, len(kept))


def _ids(path: Path, archive: Archive, name: str) -> npt.NDArray[np.int32]:
    where = f"array {name!r}"
    array = archive.read(name)
    if array.ndim != 3 or 0 in array.shape:
        raise malformed(path, where, f"{list(array.shape)} is not [tokens, layers, k]")
    return as_ids(array, path, where)


def _weights(path: Path, archive: Archive, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    array = archive.read(name)
    if array.dtype.kind != "f" or array.shape != shape:
        raise malformed(path, f"array {name!r}", f"{array.dtype} {list(array.shape)}, must be floats {list(shape)}")
    return array.astype(np.float32)


def _meta(path: Path, archive: Archive, num_sequences: int) -> list[dict[str, Any]]:
    where = "array 'meta_json'"
    try:
        meta = json.loads(str(archive.read("meta_json")))
    except (ValueError, RecursionError) as error:
        raise malformed(path, where, f"not JSON ({error})") from error
    if not isinstance(meta, list) or not all(isinstance(entry, dict) for entry in meta):
        raise malformed(path, where, "not a list of objects")
    if len(meta) != num_sequences:
        raise malformed(path, where, f"{len(meta)} entries for {num_sequences} sequences")
    return meta
