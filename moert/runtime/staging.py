"""Buffers for records that are converted on their way into a slot."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from moert.tiers.arena import SlotBank
from moert.tiers.disk import Buffer


@dataclass(frozen=True)
class StagingBuffer:
    """One buffer of the pool, as bytes and as a tensor over the same bytes; `release` it exactly once."""

    pool: StagingPool
    index: int
    buffer: Buffer
    tensor: torch.Tensor

    def release(self) -> None:
        """Give the buffer back; any thread may."""
        self.pool._give_back(self.index)


class StagingPool:
    """The slots of a bank, lent one at a time. Thread-safe; never blocks."""

    def __init__(self, bank: SlotBank) -> None:
        self._bank = bank
        self._free = list(range(bank.n_slots))
        self._lock = threading.Lock()
        self._buffers: dict[int, StagingBuffer] = {}
        """Those that have been lent, as they are lent again."""

    def can_acquire(self, count: int = 1) -> bool:
        """Whether so many buffers are free. Only one thread acquires, so the answer stays true until it does."""
        return len(self._free) >= count

    def acquire(self) -> StagingBuffer:
        """A free buffer; there must be one."""
        with self._lock:
            index = self._free.pop()
        buffer = self._buffers.get(index)
        if buffer is None:
            memory = self._bank.slot(index)
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            buffer = self._buffers[index] = StagingBuffer(self, index, Buffer(memory, tensor.data_ptr()), tensor)
        return buffer

    def close(self) -> None:
        """Drop every view of the bank's memory; nothing uses them any more."""
        self._buffers.clear()

    def recover(self) -> None:
        """Take back every buffer; nothing uses them any more."""
        with self._lock:
            self._free = list(range(self._bank.n_slots))

    def _give_back(self, index: int) -> None:
        with self._lock:
            assert index not in self._free, f"staging buffer {index} was given back twice"
            self._free.append(index)
