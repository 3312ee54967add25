"""When each expert is needed next, for whole traces: backwards through the chunks, on disk where they are many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.machine_code import compiled
from moert.simulate._rankings import NEVER
from moert.simulate.events import Events, Ints

HELD_IDS = 1 << 26
"""Chunks with more experts than this together are kept in a temporary folder instead of memory."""


class Future:
    """The next uses of a trace's experts, chunk by chunk. Close it."""

    def __init__(self, chunks: Iterable[Events], n_experts: int, *, counted_only: bool = False) -> None:
        """Reads all of `chunks`.

        `counted_only` takes an expert whose next use does not count as one that is never needed again: to have it then
        gains nothing.
        """
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: list[tuple[npt.NDArray[np.int32], Ints, npt.NDArray[np.bool_]]] = []
        self._uses: list[Ints | None] = []
        sizes: list[int] = []
        held = 0
        for chunk in chunks:
            part = (chunk.ids, chunk.offsets, chunk.counted)
            held += len(chunk.ids)
            if held <= HELD_IDS:
                self._held.append(part)
            else:
                arrays: tuple[npt.NDArray[Any], ...] = part
                for kind, array in zip("iod", arrays, strict=True):
                    np.save(self._path(kind, len(sizes)), array)
            sizes.append(len(chunk))
        firsts = np.cumsum([0, *sizes])
        last = np.full(n_experts, NEVER, np.int64)
        self._uses = [None] * len(sizes)
        for number in reversed(range(len(sizes))):
            ids, offsets, counted = self._part(number)
            uses = next_uses(offsets, ids, counted if counted_only else np.zeros(0, np.bool_), firsts[number], last)
            if number < len(self._held):
                self._uses[number] = uses
            else:
                np.save(self._path("u", number), uses)

    def __iter__(self) -> Iterator[Ints]:
        for number, uses in enumerate(self._uses):
            yield np.load(self._path("u", number)) if uses is None else uses

    def close(self) -> None:
        """Free what is held. Idempotent."""
        self._held, self._uses = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _path(self, kind: str, number: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moert-simulate-")
        return Path(self._folder.name) / f"{kind}{number}.npy"

    def _part(self, number: int) -> tuple[Any, Any, Any]:
        if number < len(self._held):
            return self._held[number]
        ids, offsets, counted = (np.load(self._path(kind, number)) for kind in "iod")
        return ids, offsets, counted


@compiled
def next_uses(offsets, ids, counted, first, last):  # type: ignore[no-untyped-def]
    """[ids] the number of the next event that has each one, counted from `first`, `NEVER` if there is none.

    `last` [N] has the next uses after these events, and then those after `first`. If `counted` [N events] is not empty,
    a use in an event that is not counted is none.
    """
    uses = np.empty(len(ids), np.int64)
    for event in range(len(offsets) - 2, -1, -1):
        number = first + event
        if len(counted) > 0 and not counted[event]:
            number = NEVER
        for i in range(offsets[event], offsets[event + 1]):
            uses[i] = last[ids[i]]
            last[ids[i]] = number
    return uses
