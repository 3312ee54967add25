"""A file, memory to read it into, and disks that do as a test says."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from own_threads import check_no_disk_threads

from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, Priority, Read, ReadHandle, ShardFile

SIZE = 3 * (1 << 20) + 1234
SLOT_BYTES = 1 << 20
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def arena() -> Iterator[HostArena]:
    arena = HostArena(8 * SLOT_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def slots(arena: HostArena) -> SlotBank:
    bank = SlotBank(arena, 0, SLOT_BYTES, 8)
    for index in range(len(bank)):
        bank.poison(index)
    return bank


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    fds = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    check_no_disk_threads()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("moert")]
    assert left == []
    assert set(os.listdir("/proc/self/fd")) - fds == set()


class Disk:
    """preadv that does as told: a list of errno values, byte counts to stop at, or None for a plain read."""

    def __init__(self, *script: OSError | int | None) -> None:
        self.script = list(script)
        self.requests: list[tuple[int, int]] = []

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.requests.append((offset, len(buffers[0])))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, OSError):
            raise step
        if step is not None:
            buffers = [buffers[0][:step]]
            # O_DIRECT does not take such lengths; a plain descriptor does.
            with open(f"/proc/self/fd/{fd}", "rb") as plain:
                return os.preadv(plain.fileno(), buffers, offset)
        return os.preadv(fd, buffers, offset)


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Gate:
    """A disk on which every read waits until it is opened; it notes the offsets in the order they were begun."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._changed = threading.Condition()
        self._open = False

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._changed:
            self.begun.append(offset)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open, PATIENCE_S)
        return os.preadv(fd, buffers, offset)

    def wait_begun(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, PATIENCE_S), self.begun

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def submit_block(
    reader: DiskReader, file: ShardFile, block: int, slots: SlotBank, priority: Priority = Priority.DEMAND
) -> ReadHandle:
    return reader.submit_read([Read(file, block * BLOCK_BYTES, BLOCK_BYTES, slots.slot(block % len(slots)))], priority)
