"""Buffers for records that are converted on their way into a slot."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from moert.tiers.arena import SlotBank


@dataclass(frozen=True)
class StagingBuffer:
    """One buffer of the pool, as bytes and as a tensor over the same bytes; `release` it exactly once."""

    pool: StagingPool
    index: int
    memory: memoryview
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

    def can_acquire(self) -> bool:
        """Whether a buffer is free. Only one thread acquires, so the answer stays true until it does."""
        return bool(self._free)

    def acquire(self) -> StagingBuffer:
        """A free buffer; there must be one."""
        with self._lock:
            index = self._free.pop()
        memory = self._bank.slot(index)
        return StagingBuffer(self, index, memory, torch.frombuffer(memory, dtype=torch.uint8))

    def recover(self) -> None:
        """Take back every buffer; nothing uses them any more."""
        with self._lock:
            self._free = list(range(self._bank.n_slots))

    def _give_back(self, index: int) -> None:
        with self._lock:
            assert index not in self._free, f"staging buffer {index} was given back twice"
            self._free.append(index)
