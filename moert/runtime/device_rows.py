"""The slots of one format in device memory: equal rows, and who may touch which of them after what."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from moert.device.base import Device, Event, Lease, Stream
from moert.formats import RecordLayout, TensorSpec

ROW_ALIGNMENT = 256

_POISON = 0xFF


def row_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes of one slot for an expert of these tensors."""
    return -(-RecordLayout.packed(specs).nbytes // ROW_ALIGNMENT) * ROW_ALIGNMENT


class RowBank:
    """`n_rows` slots for experts of the same stored tensors, of whichever layers; owns their memory until `close`.

    Nothing here blocks. Order between streams is by two events a row: what fills it waits for its last reader, and what
    reads it waits for the end of its filling. A free row may still be read or filled by what was started before.
    """

    def __init__(
        self, device: Device, number: int, specs: Sequence[TensorSpec], n_rows: int, *, poison: bool = False
    ) -> None:
        """
        Args:
            number: which of the device's banks this is.
            poison: fill rows that are given back with NaN.

        Raises:
            OutOfDeviceMemoryError: the device has no room for them.
        """
        self.device, self.number, self.specs = device, number, tuple(specs)
        self.row_bytes = row_bytes(specs)
        self._poison = poison
        self._layout = RecordLayout.packed(specs)
        self._fillings = [0] * n_rows
        self.open(n_rows)

    def open(self, n_rows: int) -> None:
        """Take memory for so many rows, after `close`; they are free, and of any contents.

        Raises:
            OutOfDeviceMemoryError: the device has no room for them.
        """
        self.memory: torch.Tensor | None = self.device.allocate(n_rows * self.row_bytes)
        self._table = self.memory.view(n_rows, self.row_bytes)
        self._views = [self._layout.views(self._table[row]) for row in range(n_rows)]
        # How often a row was filled counts on: a lease of before is none of now.
        self._fillings = (self._fillings + [0] * n_rows)[: max(n_rows, len(self._fillings))]
        self._filled: list[Event | None] = [None] * n_rows
        self._read: list[Event | None] = [None] * n_rows
        # First come, first served: whoever takes a row waits for its last reader, and the first one is done first.
        self._free = deque(range(n_rows))
        self.n_rows = n_rows

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor over all rows, [n_rows, ...]: views of the memory."""
        found = {}
        for spec, begin in zip(self._layout.specs, self._layout.offsets, strict=True):
            columns = self._table[:, begin : begin + spec.nbytes].view(spec.dtype)
            found[spec.name] = columns.unflatten(1, spec.shape) if spec.shape else columns.squeeze(1)
        return found

    def views(self, row: int) -> Mapping[str, torch.Tensor]:
        """The tensors of one row."""
        return self._views[row]

    def take(self) -> int | None:
        """The row that has been free for longest, which is the caller's until `give_back`; None: there is none."""
        return self._free.popleft() if self._free else None

    def give_back(self, row: int) -> None:
        """Nobody is going to read what is in the row."""
        assert row not in self._free, f"row {row} was given back twice"
        if self._poison:
            stream = self.device.compute
            self._begin_fill(row, stream)
            stream.fill(self._table[row], _POISON, writes=self.lease(row))
            self._filled[row] = stream.record()
        self._free.append(row)

    def lease(self, row: int) -> Lease:
        """What the row holds now, or will hold when its filling ends."""
        return Lease(self.number, row, self._fillings[row])

    def fill(
        self,
        row: int,
        stream: Stream,
        weights: Mapping[str, torch.Tensor],
        part: int = 0,
        parts: int = 1,
        *,
        pageable: bool = False,
    ) -> Event:
        """Start copying an expert's tensors into a row that the caller has taken, or one of `parts` of them.

        Parts come in their order, each after the one before even in another stream.

        Returns:
            An event after it.
        """
        if part == 0:
            self._begin_fill(row, stream)
        else:
            before = self._filled[row]
            assert before is not None
            stream.wait(before)
        pieces = list(self._pieces(row, weights, part, parts))
        for place, (destination, source) in enumerate(pieces, start=1):
            is_last = part == parts - 1 and place == len(pieces)
            stream.copy(destination, source, writes=self.lease(row), is_last=is_last, pageable=pageable)
        event = self._filled[row] = stream.record()
        return event

    def _begin_fill(self, row: int, stream: Stream) -> None:
        for event in (self._read[row], self._filled[row]):
            if event is not None:
                stream.wait(event)
        self._read[row] = None
        self._fillings[row] += 1

    def _pieces(
        self, row: int, weights: Mapping[str, torch.Tensor], part: int, parts: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(destination, source) in bytes, of what lies in one part of the packed tensors."""
        total = sum(spec.nbytes for spec in self.specs)
        begin, end = total * part // parts, total * (part + 1) // parts
        at = 0
        for spec in self.specs:
            low, high = max(begin - at, 0), min(end - at, spec.nbytes)
            if low < high:
                destination = self._views[row][spec.name].view(-1).view(torch.uint8)
                source = weights[spec.name].reshape(-1).view(torch.uint8)
                yield destination[low:high], source[low:high]
            at += spec.nbytes

    def take_over(self, row: int) -> None:
        """The row is whole, by what the compute stream has been told so far: something else than `fill` wrote it."""
        stream = self.device.compute
        nothing = self._table[row][:0]
        self._fillings[row] += 1
        stream.copy(nothing, nothing, writes=self.lease(row))
        self._filled[row] = self._read[row] = stream.record()

    def read(self, rows: Sequence[int], stream: Stream, work: Callable[[], object]) -> None:
        """Launch what reads these rows, after they have been filled."""
        for row in rows:
            filled = self._filled[row]
            if filled is not None:
                stream.wait(filled)
        stream.launch(work, [self.lease(row) for row in rows])
        event = stream.record()
        for row in rows:
            self._read[row] = event

    def forget_events(self) -> None:
        """The device has done everything."""
        self._filled = [None] * self.n_rows
        self._read = [None] * self.n_rows

    def reset(self, owned: Sequence[int]) -> None:
        """All rows are free but those that somebody still has; the device has done everything."""
        self.forget_events()
        held = set(owned)
        self._free = deque(row for row in range(self.n_rows) if row not in held)

    def check_integrity(self, owned: Sequence[int]) -> None:
        """Assert that every row is free or somebody's, and nobody's twice."""
        assert sorted([*owned, *self._free]) == list(range(self.n_rows)), f"rows of {sorted(owned)}, free {self._free}"

    def close(self) -> None:
        """Drop the memory; nothing uses it any more, and there are no rows."""
        self.n_rows = 0
        self._free = deque()
        self._views = []
        self._table = torch.empty(0)
        self.memory = None
