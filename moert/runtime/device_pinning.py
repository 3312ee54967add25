"""Host memory that a device can copy from while everything else goes on: page-locked, or through buffers that are."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moert.config import format_bytes
from moert.device.base import Device, Event, PinningRefusedError
from moert.formats import RecordLayout, TensorSpec
from moert.tiers.arena import PAGE_BYTES

BUFFERS = 3
"""For copies of what could not be page-locked: one on its way, one that is filled meanwhile, and one spare."""

LEAST_BYTES = 16 << 20
"""A refusal is taken as final when it is of so few bytes."""


@dataclass
class _Buffer:
    memory: torch.Tensor
    is_pinned: bool
    until: Event | None = None


class PinnedHost:
    """Which of the experts' host memory is page-locked. Locks it once, as much as the system gives, and says so once
    where that is not all: what is not is copied through a few buffers, which costs a copy in host memory more.

    The device must be done with all copies before `unlock`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._buffers: list[_Buffer] = []
        self._next = 0
        self._warned = False

    @property
    def locked_bytes(self) -> int:
        return sum(self._ends) - sum(self._begins)

    def lock(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Page-lock ranges (address, bytes) of memory that is there; blocks. Those that overlap are locked together."""
        wanted = _merged(ranges)
        for begin, end in wanted:
            if not self._lock(begin, end):
                break
        total = sum(end - begin for begin, end in wanted)
        if self.locked_bytes < total and not self._warned:
            self._warned = True
            warnings.warn(
                f"only {format_bytes(self.locked_bytes)} of {format_bytes(total)} of experts in host memory can be "
                f"page-locked here (as in containers and under WSL): the others are copied to {self._device.name} "
                "through buffers, which is slower; raise the limit on locked memory, or lower host_memory",
                RuntimeWarning,
                stacklevel=2,
            )

    def _lock(self, begin: int, end: int) -> bool:
        """Lock as much as the system gives; False if it was less than asked for."""
        place = bisect.bisect(self._begins, begin)
        # Noted before it is done: an interrupt in between leaves nothing locked that `unlock` does not know of.
        self._begins.insert(place, begin)
        self._ends.insert(place, end)
        try:
            self._device.page_lock(begin, end - begin)
        except PinningRefusedError:
            del self._begins[place], self._ends[place]
            half = begin + (end - begin) // 2 // PAGE_BYTES * PAGE_BYTES
            if end - begin <= LEAST_BYTES or half == begin:
                return False
            return self._lock(begin, half) and self._lock(half, end)
        return True

    def is_locked(self, tensor: torch.Tensor) -> bool:
        """Whether all of it was locked at once; a copy must not go across two that were locked one by one."""
        place = bisect.bisect(self._begins, tensor.data_ptr()) - 1
        return place >= 0 and tensor.data_ptr() + tensor.nbytes <= self._ends[place]

    def source(
        self, weights: Mapping[str, torch.Tensor], specs: Sequence[TensorSpec], row_bytes: int
    ) -> tuple[Mapping[str, torch.Tensor], _Buffer | None]:
        """An expert's tensors where the device can copy them from: where they are, or in a buffer, which is given until
        the event that the caller sets; then this blocks until one is free.

        Raises:
            DeviceLostError: while it waits.
        """
        if all(self.is_locked(weights[spec.name]) for spec in specs):
            return weights, None
        buffer = self._buffer(row_bytes)
        views = RecordLayout.packed(specs).views(buffer.memory)
        for name, view in views.items():
            view.copy_(weights[name])
        return views, buffer

    def _buffer(self, nbytes: int) -> _Buffer:
        if len(self._buffers) < BUFFERS:
            self._buffers.append(self._make(nbytes))
            return self._buffers[-1]
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % BUFFERS
        if buffer.until is not None:
            buffer.until.wait()
        if buffer.memory.nbytes < nbytes:
            buffer.memory, buffer.is_pinned = (made := self._make(nbytes)).memory, made.is_pinned
        return buffer

    def _make(self, nbytes: int) -> _Buffer:
        try:
            return _Buffer(self._device.allocate_pinned(nbytes), is_pinned=True)
        except PinningRefusedError:
            with torch.inference_mode(False):
                return _Buffer(torch.empty(nbytes, dtype=torch.uint8), is_pinned=False)

    def forget_buffers(self) -> None:
        """The device has done everything."""
        for buffer in self._buffers:
            buffer.until = None

    def close(self) -> None:
        """Unlock everything and drop the buffers; nothing uses them any more."""
        self.unlock()
        self._buffers = []

    def unlock(self) -> None:
        """Undo all of `lock`. Idempotent."""
        while self._begins:
            self._device.page_unlock(self._begins[-1])
            del self._begins[-1:], self._ends[-1:]


class SharedPinning(PinnedHost):
    """For one more device over the same host memory: locked for all devices at once, by the one that `lead` is of."""

    def __init__(self, device: Device, lead: PinnedHost) -> None:
        super().__init__(device)
        self._lead = lead

    @property
    def locked_bytes(self) -> int:
        """None of its own."""
        return 0

    def lock(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The lead does that."""

    def is_locked(self, tensor: torch.Tensor) -> bool:
        return self._lead.is_locked(tensor)

    def unlock(self) -> None:
        """The lead does that."""


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """[begin, end) of whole pages, ascending, apart from each other."""
    merged: list[tuple[int, int]] = []
    for address, nbytes in sorted(ranges):
        begin, end = address // PAGE_BYTES * PAGE_BYTES, -(-(address + nbytes) // PAGE_BYTES) * PAGE_BYTES
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif nbytes:
            merged.append((begin, end))
    return merged
