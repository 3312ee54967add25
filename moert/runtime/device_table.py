"""Which row each expert has, on the device, for kernels that look it up themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from moert.device.base import Device, Event, PinningRefusedError, Stream
from moert.runtime.device_by_layer import caches_by_layer
from moert.runtime.device_cache import DeviceCache
from moert.types import ExpertId

_BUFFERS = 8


class SlotTable:
    """int32 [L, E]: the row of each resident of each layer that the device has, -1 for none; and one table more for a
    few experts at a time. Whatever changes is copied in the order of the stream that reads it."""

    def __init__(self, device: Device, caches: Iterable[DeviceCache]) -> None:
        """Raises OutOfDeviceMemoryError."""
        self._device, self._caches = device, caches_by_layer(caches)
        self._row_of = {layer: row for row, layer in enumerate(self._caches.layers)}
        self._experts = max(cache.spec.num_experts for cache in self._caches)
        rows = len(self._caches) + 1
        self._memory = device.allocate(rows * self._experts * 4)
        self._table = self._memory.view(torch.int32).view(rows, self._experts)
        self._versions: list[int | None] = [None] * len(self._caches)
        self._buffers: list[tuple[torch.Tensor, bool, Event | None]] = []
        self._turn = 0

    def residents(self, layer: int, stream: Stream) -> torch.Tensor:
        """[E] of a layer, as it is now; for launches in `stream` only."""
        cache = self._caches[layer]
        row = self._row_of[layer]
        view = self._table[row, : cache.spec.num_experts]
        if self._versions[row] != cache.version:
            rows = {expert.expert: cache.row_of(expert) for expert in cache.residency.residents}
            self._write(view, rows, stream)
            self._versions[row] = cache.version
        return view

    def whole(self, layer: int, rows: Mapping[int, int], stream: Stream) -> torch.Tensor:
        """[E] in which these experts of a layer are right, and others may be there too; for launches in `stream`."""
        cache = self._caches[layer]
        known = ((ExpertId(cache.spec.index, expert), row) for expert, row in rows.items())
        if all(expert in cache.residency and cache.row_of(expert) == row for expert, row in known):
            return self.residents(layer, stream)
        return self.only(layer, rows, stream)

    def only(self, layer: int, rows: Mapping[int, int], stream: Stream) -> torch.Tensor:
        """[E] with these experts of a layer and no others; for the next launch in `stream`."""
        view = self._table[-1, : self._caches[layer].spec.num_experts]
        self._write(view, rows, stream)
        return view

    def _write(self, view: torch.Tensor, rows: Mapping[int, int], stream: Stream) -> None:
        memory, is_pinned = self._buffer()
        numbers = memory.view(torch.int32)[: view.numel()]
        numbers.fill_(-1)
        if rows:
            numbers[list(rows)] = torch.tensor(list(rows.values()), dtype=torch.int32)
        stream.copy(view, numbers, pageable=not is_pinned)
        self._buffers[self._turn] = (memory, is_pinned, stream.record())
        self._turn = (self._turn + 1) % _BUFFERS

    def _buffer(self) -> tuple[torch.Tensor, bool]:
        if self._turn == len(self._buffers):
            try:
                self._buffers.append((self._device.allocate_pinned(self._experts * 4), True, None))
            except PinningRefusedError:
                with torch.inference_mode(False):
                    self._buffers.append((torch.empty(self._experts * 4, dtype=torch.uint8), False, None))
        memory, is_pinned, until = self._buffers[self._turn]
        if until is not None:
            until.wait()
        return memory, is_pinned

    def forget(self) -> None:
        """What is on the device is not to be relied upon; it has done everything."""
        self._versions = [None] * len(self._caches)
        self._buffers = [(memory, is_pinned, None) for memory, is_pinned, _ in self._buffers]

    def close(self) -> None:
        """Drop the memory; nothing uses it any more."""
        self._table, self._memory = torch.empty(0), torch.empty(0)
        self._buffers = []
