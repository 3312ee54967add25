"""Reads without a disk: they end when a test says so, or when somebody waits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moert.errors import MoertError, TransferError
from moert.formats import TensorSpec
from moert.policies import make_policy
from moert.residency import Residency, Resize
from moert.runtime.layer import Fetch, LayerCache, LayerSpec, Place
from moert.tiers.arena import PAGE_BYTES
from moert.tiers.disk import Priority
from moert.types import ExpertId

READ_BYTES = 4096


class FakeRead:
    """A read's handle. Bytes reach the slot when the read ends well, and never after that."""

    def __init__(self, disk: FakeDisk, write: Callable[[], None], priority: Priority, error: Exception | None) -> None:
        self._disk = disk
        self._write = write
        self._error = error
        self._over = False
        self.priority = priority
        self.given_up = False
        self.started = False
        self.all_begun = False
        self.read_s = 0.0
        self.wasted = 0

    @property
    def ready(self) -> bool:
        return self._over

    def finish(self) -> None:
        assert not self._over
        self._disk.reads.remove(self)
        self._over = True
        if self.given_up:
            self._error = MoertError("given up")
        if self._error is None:
            self._write()

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        if not self._over:
            self._disk.finish_up_to(self)
        if self._error is not None:
            raise self._error
        return (0,)

    def cancel(self) -> bool:
        if self._over or self.started:
            return False
        self._disk.reads.remove(self)
        self._over, self._error = True, MoertError("cancelled")
        return True

    def give_up(self) -> bool:
        if self.cancel():
            return True
        if self._over or self.all_begun:
            return False
        self.given_up = True
        return True

    def promote(self, priority: Priority = Priority.DEMAND) -> bool:
        if self._over or self.all_begun or (self.priority <= priority and not self.given_up):
            return False
        self.priority, self.given_up = priority, False
        return True


class FakeDisk:
    """Serves the oldest read of the highest class first, unless a test picks another one."""

    def __init__(self) -> None:
        self.reads: list[FakeRead] = []
        self.failing: set[ExpertId] = set()
        self.n_submitted = 0

    def submit(self, expert: ExpertId, priority: Priority, write: Callable[[], None]) -> FakeRead:
        error = TransferError(5, f"no luck with {expert}", "shard") if expert in self.failing else None
        self.n_submitted += 1
        self.reads.append(FakeRead(self, write, priority, error))
        return self.reads[-1]

    def finish_up_to(self, last: FakeRead) -> None:
        for read in sorted(self.reads, key=lambda read: read.priority):
            read.finish()
            if read is last:
                return


def _page_of_its_own(n: int) -> torch.Tensor:
    """Numbers that share no page with other memory, as an arena's do not: whole pages are locked, and what a device
    allocates for itself may not begin in one of them."""
    nbytes = n * torch.float32.itemsize
    assert nbytes <= PAGE_BYTES
    memory = torch.empty(2 * PAGE_BYTES, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE_BYTES
    return memory[begin : begin + nbytes].view(torch.float32)


class FakeLayer(LayerCache):
    """Experts of one number each: expert e of layer l multiplies by 1 + e + 100 * l. An empty slot is NaN."""

    def __init__(self, index: int, num_experts: int, capacity: int, disk: FakeDisk) -> None:
        spec = LayerSpec(index, f"layers.{index}", num_experts, (TensorSpec("w", (1,), torch.float32),))
        super().__init__(spec, Residency(capacity, make_policy("lru", capacity)))
        self.slots = _page_of_its_own(num_experts).fill_(torch.nan)
        self.disk = disk

    def factor(self, expert: int) -> float:
        return 1.0 + expert + 100.0 * self.spec.index

    def weights(self, expert: int) -> dict[str, torch.Tensor]:
        slot = self.residency.slot_of(ExpertId(self.spec.index, expert))
        assert slot is not None
        return {"w": self.slots[slot : slot + 1]}

    def _can_submit(self, others: int = 0) -> bool:
        return True

    def read_bytes(self, expert: int) -> int:
        return READ_BYTES

    def _submit(self, places: Sequence[Place], priority: Priority) -> list[Fetch]:
        return [self._read(expert, slot, priority) for expert, slot in places]

    def _read(self, expert: int, slot: int, priority: Priority) -> Fetch:
        self.slots[slot] = torch.nan
        identity = ExpertId(self.spec.index, expert)

        def write() -> None:
            assert self.residency.slot_of(identity) == slot, f"a read writes into slot {slot}, which is another's now"
            self.slots[slot] = self.factor(expert)

        handle: Any = self.disk.submit(identity, priority, write)
        return Fetch(handle, READ_BYTES)

    def resize(self, n_slots: int) -> Resize:
        change = self.residency.resize(n_slots)
        for _, from_slot, to_slot in change.moves:
            self.slots[to_slot] = self.slots[from_slot]
        self.slots[n_slots:] = torch.nan
        return change
