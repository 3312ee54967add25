"""Records that the extension's own threads read."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moert import _C
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import DiskReader, Priority, Read, ReadHandle, ShardFile
from moert.tiers.native_reads import NativeHandle

MIB = 1 << 20
SIZE = 24 * MIB + 1234
SLOT_BYTES = 4 * MIB
PATIENCE_S = 20.0
UNDER_WAY, WHOLE, FAILED = range(3)


@pytest.fixture(scope="module")
def arena() -> Iterator[HostArena]:
    arena = HostArena(8 * SLOT_BYTES)
    yield arena
    arena.close()


@pytest.fixture(scope="module")
def slots(arena: HostArena) -> SlotBank:
    return SlotBank(arena, 0, SLOT_BYTES, 8)


class Content(bytes):
    def __repr__(self) -> str:  # where a test fails it is printed
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def content() -> bytes:
    return Content(random.Random(7).randbytes(SIZE))


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[ShardFile]:
    with ShardFile(path) as file:
        if not file.direct:
            pytest.skip("this file system has no O_DIRECT")
        yield file


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def set_lanes(reader: DiskReader, file: ShardFile, lanes: int) -> None:
    """With 0 nothing is begun."""
    _C.reader_set_lanes(reader._reads.native._reader, file.identity.device, lanes, lanes)


def state(handle: ReadHandle) -> int:
    """What has become of a record, without the handle's noticing."""
    assert isinstance(handle, NativeHandle)
    return _C.record_state(handle._record)


def submit(
    reader: DiskReader,
    file: ShardFile,
    place: memoryview,
    offset: int,
    nbytes: int,
    priority: Priority = Priority.DEMAND,
) -> ReadHandle:
    handle = reader.submit_read([Read(file, offset, nbytes, place)], priority)
    assert isinstance(handle, NativeHandle)
    return handle


@contextlib.contextmanager
def unreadable(file: ShardFile) -> Iterator[None]:
    """Its descriptor cannot be read from meanwhile."""
    good, bad = os.dup(file._fd), os.open(file.path.with_suffix(".bad"), os.O_WRONLY | os.O_CREAT)
    os.dup2(bad, file._fd, inheritable=False)
    try:
        yield
    finally:
        os.dup2(good, file._fd, inheritable=False)
        os.close(good)
        os.close(bad)


def await_native(handle: ReadHandle) -> None:
    """Until the extension is done with it."""
    until(lambda: state(handle) != UNDER_WAY)
