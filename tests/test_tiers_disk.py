from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moert import _C
from moert.errors import CorruptFileError, MoertError, TransferError
from moert.tiers import shard_file, thread_reads
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import (
    BLOCK_BYTES,
    DiskReader,
    FileCalls,
    Priority,
    Read,
    ReadHandle,
    ShardFile,
    measure_read_bandwidth,
    window_bytes,
)

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
def every_fall_back_warns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "_warned_devices", set())


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    fds = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("moert")]
    assert left == []
    assert set(os.listdir("/proc/self/fd")) - fds == set()


def refusing_open(code: int) -> Callable[[str, int], int]:
    def open_(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code), path)
        return os.open(path, flags)

    return open_


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
    """A disk on which every read waits to be let through; it notes the offsets in the order they were begun."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._changed = threading.Condition()
        self._tickets = 0
        self._open = False

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._changed:
            self.begun.append(offset)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or self._tickets > 0, PATIENCE_S)
            self._tickets -= 1
        return os.preadv(fd, buffers, offset)

    def wait_begun(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, PATIENCE_S), self.begun

    def let_one_through(self) -> None:
        with self._changed:
            self._tickets += 1
            self._changed.notify()

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


class TestShardFile:
    @pytest.mark.parametrize("mode", ["direct", "buffered", "refused at open", "refused at first read"])
    def test_any_range_reads_the_files_own_bytes(
        self, path: Path, content: bytes, slots: SlotBank, mode: str, recwarn: pytest.WarningsRecorder
    ) -> None:
        calls = {
            "refused at open": FileCalls(open=refusing_open(errno.EINVAL)),
            "refused at first read": FileCalls(preadv=Disk(os_error(errno.EINVAL)).preadv),
        }.get(mode, FileCalls())
        rng = random.Random(3)
        ranges = [
            (0, 1),
            (0, BLOCK_BYTES),
            (BLOCK_BYTES - 1, 2),
            (SIZE - 1, 1),
            (SIZE - 1234, 1234),
            (SIZE - 5000, 5000),
        ]
        ranges += [(BLOCK_BYTES, SLOT_BYTES), (SIZE - 100_000, 100_000)]
        for _ in range(150):
            nbytes = rng.choice([1, 100, 5000, 70_000, 900_000])
            ranges.append((rng.randrange(SIZE - nbytes + 1), nbytes))
        slot = slots.slot(0)
        with ShardFile(path, direct=mode != "buffered", calls=calls) as file:
            for offset, nbytes in ranges:
                slots.poison(0)
                start = file.read(offset, nbytes, slot)
                assert start == offset % BLOCK_BYTES
                assert slot[start : start + nbytes] == content[offset : offset + nbytes]
            assert file.direct == (mode == "direct")
            assert file.size == SIZE
        assert len(recwarn) == (1 if "refused" in mode else 0)

    def test_the_window_is_the_least_that_is_enough(self, path: Path, slots: SlotBank) -> None:
        assert window_bytes(0, 1) == BLOCK_BYTES
        assert window_bytes(4095, 2) == 2 * BLOCK_BYTES
        assert window_bytes(4096, 4096) == BLOCK_BYTES
        with ShardFile(path) as file:
            assert file.window_bytes(4095, 4098) == 3 * BLOCK_BYTES
            file.read(4095, 4098, slots.slot(0)[: 3 * BLOCK_BYTES])
            with pytest.raises(ValueError, match="12288 bytes, not 12287"):
                file.read(4095, 4098, slots.slot(0)[: 3 * BLOCK_BYTES - 1])

    def test_a_file_without_o_direct_support_warns_once_per_file_system(self, path: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"x")
        calls = FileCalls(open=refusing_open(errno.ENOTSUP))
        with pytest.warns(RuntimeWarning, match="O_DIRECT.*CPU"):
            ShardFile(path, calls=calls).close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ShardFile(path, calls=calls).close()
            ShardFile(other, calls=calls).close()

    def test_asking_for_buffered_reads_is_no_fall_back(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ShardFile(path, direct=False).close()

    @pytest.mark.parametrize("mode", ["direct", "buffered", "refused at first read"])
    @pytest.mark.filterwarnings("ignore:.*O_DIRECT:RuntimeWarning")
    def test_reads_leave_no_page_cache(self, path: Path, slots: SlotBank, mode: str) -> None:
        """By mincore, which asks the kernel for the pages it holds and brings none in."""
        libc = ctypes.CDLL(None, use_errno=True)

        def cached_pages(fd: int) -> int:
            resident = (ctypes.c_ubyte * (-(-SIZE // mmap.PAGESIZE)))()
            with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), resident) == 0
            return sum(page & 1 for page in resident)

        calls = FileCalls(preadv=Disk(os_error(errno.EINVAL)).preadv) if mode.startswith("refused") else FileCalls()
        with open(path, "rb") as plain, ShardFile(path, direct=mode != "buffered", calls=calls) as file:
            fd = plain.fileno()
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_pages(fd) > 0:
                pytest.skip("this file system does not drop its cache")
            for offset in range(100, SIZE - 300_000, 300_000):
                file.read(offset, 100_000, slots.slot(0))
            # Of 769 pages; the last page of each window stays, because the kernel drops only whole pages.
            assert cached_pages(fd) <= 10

    @pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs")
    def test_tmpfs(self, content: bytes, slots: SlotBank) -> None:
        path = Path(f"/dev/shm/moert-test-{os.getpid()}")
        try:
            path.write_bytes(content)
            with warnings.catch_warnings():
                # Newer kernels take O_DIRECT on tmpfs, older ones do not: both are right.
                warnings.simplefilter("ignore", RuntimeWarning)
                with ShardFile(path) as file:
                    start = file.read(SIZE - 5001, 5001, slots.slot(0))
                    assert slots.slot(0)[start : start + 5001] == content[-5001:]
        finally:
            path.unlink(missing_ok=True)

    def test_a_record_beyond_the_end_names_the_numbers(self, path: Path, slots: SlotBank) -> None:
        with ShardFile(path) as file, pytest.raises(CorruptFileError, match=f"ends at {SIZE + 1}.* {SIZE} bytes"):
            file.read(SIZE - 9, 10, slots.slot(0))

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 5), (0, 0), (0, -1)])
    def test_a_range_that_cannot_be(self, path: Path, slots: SlotBank, offset: int, nbytes: int) -> None:
        with ShardFile(path) as file, pytest.raises(ValueError, match="no record"):
            file.read(offset, nbytes, slots.slot(0))

    @pytest.mark.parametrize("direct", [True, False])
    def test_truncated_while_open(self, path: Path, slots: SlotBank, direct: bool) -> None:
        with ShardFile(path, direct=direct) as file:
            file.read(SIZE - 5000, 5000, slots.slot(0))
            os.truncate(path, 2_000_005)
            for offset in (SIZE - 5000, 2_000_000 - 50_000, 0):
                with pytest.raises(CorruptFileError, match=rf"shard\.safetensors.*size {SIZE} -> 2000005"):
                    file.read(offset, 5000, slots.slot(0))

    def test_overwritten_in_place(self, path: Path, slots: SlotBank) -> None:
        os.utime(path, ns=(10**18, 10**18))
        with ShardFile(path) as file:
            file.read(0, 5000, slots.slot(0))
            with open(path, "r+b") as writer:
                writer.write(b"new")
            with pytest.raises(CorruptFileError, match=r"changed.*modified 2001-09-09 .* -> 20"):
                file.read(100_000, 5000, slots.slot(0))

    def test_replaced_by_rename_reads_as_before(
        self, path: Path, content: bytes, slots: SlotBank, tmp_path: Path
    ) -> None:
        with ShardFile(path) as file:
            new = tmp_path / "new"
            new.write_bytes(b"z" * SIZE)
            new.rename(path)
            start = file.read(77, 5000, slots.slot(0))
            assert slots.slot(0)[start : start + 5000] == content[77:5077]

    def test_unlinked_reads_as_before(self, path: Path, content: bytes, slots: SlotBank) -> None:
        with ShardFile(path) as file:
            path.unlink()
            start = file.read(77, 5000, slots.slot(0))
            assert slots.slot(0)[start : start + 5000] == content[77:5077]

    def test_one_io_error_is_tried_again(self, path: Path, content: bytes, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.EIO))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            start = file.read(10, 5000, slots.slot(0))
        assert slots.slot(0)[start : start + 5000] == content[10:5010]
        assert disk.requests == [(0, 8192), (0, 8192)]

    def test_a_second_io_error_is_reported_with_its_place(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.EIO), os_error(errno.EIO))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            with pytest.raises(TransferError, match="8192 bytes at 4096") as caught:
                file.read(5000, 5000, slots.slot(0))
            assert caught.value.errno == errno.EIO
            assert caught.value.filename == str(path)
            assert isinstance(caught.value, OSError)
            assert file.direct
            file.read(5000, 5000, slots.slot(0))

    def test_another_error_is_not_tried_again(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.ENXIO))
        with (
            ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file,
            pytest.raises(TransferError, match="No such device"),
        ):
            file.read(0, 10, slots.slot(0))
        assert len(disk.requests) == 1

    def test_an_interrupted_call_is_made_again(self, path: Path, content: bytes, slots: SlotBank) -> None:
        disk = Disk(InterruptedError(errno.EINTR, "interrupted"), InterruptedError(errno.EINTR, "interrupted"))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            file.read(0, 4096, slots.slot(0))
        assert slots.slot(0)[:4096] == content[:4096]

    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("step", [4096, 5000, 12288, 19_999])
    def test_reads_that_stop_short_are_resumed(
        self, path: Path, content: bytes, slots: SlotBank, direct: bool, step: int
    ) -> None:
        disk = Disk(*[step] * 40)
        with ShardFile(path, direct=direct, calls=FileCalls(preadv=disk.preadv)) as file:
            start = file.read(1000, 60_000, slots.slot(0))
        assert slots.slot(0)[start : start + 60_000] == content[1000:61_000]
        if direct:
            assert all(offset % BLOCK_BYTES == 0 for offset, _ in disk.requests), "O_DIRECT cannot resume there"

    @pytest.mark.parametrize(("direct", "step"), [(True, 0), (True, 100), (False, 0)])
    def test_a_read_that_gets_nowhere_is_an_error_and_no_endless_loop(
        self, path: Path, slots: SlotBank, direct: bool, step: int
    ) -> None:
        disk = Disk(8192, *[step] * 1000)
        message = rf"short read: {8192 + step} of 16384 bytes at 4096.* {SIZE} bytes"
        with (
            ShardFile(path, direct=direct, calls=FileCalls(preadv=disk.preadv)) as file,
            pytest.raises(TransferError, match=message),
        ):
            file.read(4096, 16384, slots.slot(0))
        assert len(disk.requests) <= 3

    def test_a_misaligned_buffer_is_the_callers_mistake_not_the_file_systems(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(os_error(errno.EINVAL))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file:
            with pytest.raises(ValueError, match="not a multiple of 4096"):
                file.read(0, 10, slots.slot(0)[1:])
            assert file.direct

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(TransferError, match="cannot open") as caught:
            ShardFile(tmp_path / "absent")
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == str(tmp_path / "absent")

    def test_closed(self, path: Path, slots: SlotBank) -> None:
        file = ShardFile(path)
        file.close()
        file.close()
        assert file.closed
        with pytest.raises(MoertError, match="closed"):
            file.read(0, 10, slots.slot(0))

    def test_closing_waits_for_the_reads_on_it(self, path: Path, content: bytes, slots: SlotBank, gate: Gate) -> None:
        """A descriptor closed under a read could name another file by the time the kernel looks it up."""
        file = ShardFile(path, calls=FileCalls(preadv=gate.preadv))
        with DiskReader(1) as reader:
            handle = submit_block(reader, file, 3, slots)
            gate.wait_begun(1)
            file.close()
            # Would take the number of a descriptor closed too early.
            with open(os.devnull, "rb"):
                gate.open()
                handle.wait(PATIENCE_S)
        assert slots.slot(3)[:BLOCK_BYTES] == content[3 * BLOCK_BYTES : 4 * BLOCK_BYTES]


class TestDiskReader:
    def test_many_records_of_many_parts(self, path: Path, content: bytes, slots: SlotBank) -> None:
        rng = random.Random(5)
        with ShardFile(path) as file, DiskReader(4) as reader:
            total = 0
            for _ in range(10):
                submitted = []
                for index in range(len(slots)):
                    destination = slots.slot(index)
                    parts = []
                    for part in range(rng.randint(1, 3)):
                        nbytes = rng.randint(1, 200_000)
                        offset = rng.randrange(SIZE - nbytes)
                        begin = part * (SLOT_BYTES // 4)
                        parts.append(Read(file, offset, nbytes, destination[begin : begin + SLOT_BYTES // 4]))
                        total += nbytes
                    priority = rng.choice(list(Priority))
                    submitted.append((parts, reader.submit_read(parts, priority)))
                for parts, handle in submitted:
                    starts = handle.wait(PATIENCE_S)
                    assert handle.ready
                    assert len(starts) == len(parts)
                    for read, start in zip(parts, starts, strict=True):
                        got = read.destination[start : start + read.nbytes]
                        assert got == content[read.offset : read.offset + read.nbytes]
            totals = reader.totals()
            assert totals.records == 80
            assert totals.bytes_read == total
            assert totals.bytes_per_s == totals.bytes_read / totals.read_s

    def test_demand_goes_before_prefetch_and_each_in_order(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        calls = FileCalls(preadv=gate.preadv)
        with ShardFile(path, calls=calls) as file, DiskReader(1) as reader:
            handles = [submit_block(reader, file, 0, slots)]
            gate.wait_begun(1)
            for block, priority in enumerate([1, 1, 0, 1, 0, 0], start=1):
                handles.append(submit_block(reader, file, block, slots, Priority(priority)))
            gate.open()
            for handle in handles:
                handle.wait(PATIENCE_S)
        assert [offset // BLOCK_BYTES for offset in gate.begun] == [0, 3, 5, 6, 1, 2, 4]

    def test_prefetches_never_take_all_the_lanes(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        calls = FileCalls(preadv=gate.preadv)
        with ShardFile(path, calls=calls) as file, DiskReader(4, prefetch_depth=2) as reader:
            guesses = [submit_block(reader, file, block, slots, Priority.PREFETCH) for block in range(4)]
            gate.wait_begun(2)
            demands = [submit_block(reader, file, block, slots) for block in (4, 5)]
            gate.wait_begun(4)
            assert {offset // BLOCK_BYTES for offset in gate.begun[2:]} == {4, 5}
            gate.open()
            for handle in guesses + demands:
                handle.wait(PATIENCE_S)
        assert len(gate.begun) == 6

    @pytest.mark.parametrize("depth", [1, 2, 4])
    def test_as_many_demands_are_in_flight_as_asked(self, path: Path, slots: SlotBank, gate: Gate, depth: int) -> None:
        with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file, DiskReader(depth) as reader:
            handles = [submit_block(reader, file, block, slots) for block in range(7)]
            gate.wait_begun(depth)
            time.sleep(0.05)
            assert len(gate.begun) == depth == reader.depth
            gate.open()
            for handle in handles:
                handle.wait(PATIENCE_S)

    def test_idle_workers_wake_for_a_burst(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        """All lanes, even when the burst comes while fewer workers than records are awake."""
        with ShardFile(path) as plain, DiskReader(4) as reader:
            submit_block(reader, plain, 0, slots).wait(PATIENCE_S)
            with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file:
                handles = [submit_block(reader, file, block, slots) for block in range(4)]
                gate.wait_begun(4)
                gate.open()
                for handle in handles:
                    handle.wait(PATIENCE_S)

    def test_only_what_has_not_started_can_be_cancelled(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file, DiskReader(1) as reader:
            running = submit_block(reader, file, 0, slots)
            gate.wait_begun(1)
            queued = submit_block(reader, file, 1, slots, Priority.PREFETCH)
            after = submit_block(reader, file, 2, slots, Priority.PREFETCH)
            assert not running.cancel()
            assert queued.cancel()
            assert not queued.cancel()
            assert queued.ready
            with pytest.raises(MoertError, match="cancelled"):
                queued.wait()
            gate.open()
            running.wait(PATIENCE_S)
            after.wait(PATIENCE_S)
            assert not running.cancel()
        assert gate.begun == [0, 2 * BLOCK_BYTES]

    def test_a_promoted_prefetch_is_a_demand(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file, DiskReader(1) as reader:
            handles = [submit_block(reader, file, 0, slots)]
            gate.wait_begun(1)
            handles += [submit_block(reader, file, block, slots, Priority.PREFETCH) for block in (1, 2)]
            handles += [submit_block(reader, file, 3, slots)]
            handles[2].promote()
            handles[0].promote()
            assert handles[2].priority is Priority.DEMAND
            gate.open()
            for handle in handles:
                handle.wait(PATIENCE_S)
        assert [offset // BLOCK_BYTES for offset in gate.begun] == [0, 3, 2, 1]

    def test_waiting_with_a_time_limit(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file, DiskReader(1) as reader:
            handle = submit_block(reader, file, 0, slots)
            assert not handle.ready
            with pytest.raises(TimeoutError, match="4096 bytes"):
                handle.wait(0.01)
            gate.open()
            assert handle.wait(PATIENCE_S) == (0,)
            assert handle.wait() == (0,)

    def test_finish_runs_on_the_worker_after_the_reads(self, path: Path, content: bytes, slots: SlotBank) -> None:
        seen: list[tuple[tuple[int, ...], bytes, str]] = []
        slot = slots.slot(0)

        def finish(starts: tuple[int, ...]) -> None:
            seen.append((starts, bytes(slot[starts[0] : starts[0] + 100]), threading.current_thread().name))

        with ShardFile(path) as file, DiskReader(2) as reader:
            handle = reader.submit_read([Read(file, 50, 100, slot)], finish=finish)
            assert handle.wait(PATIENCE_S) == (50,)
        assert seen == [((50,), content[50:150], seen[0][2])]
        assert seen[0][2].startswith("moert-read")

    def test_errors_reach_the_waiter_and_the_workers_live_on(self, path: Path, slots: SlotBank) -> None:
        def fail(starts: tuple[int, ...]) -> None:
            raise KeyError("conversion")

        disk = Disk(os_error(errno.EIO), os_error(errno.EIO))
        finished: list[object] = []
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file, DiskReader(1) as reader:
            broken = reader.submit_read([Read(file, 0, 10, slots.slot(0))], finish=finished.append)
            with pytest.raises(TransferError, match=r"reading 4096 bytes at 0"):
                broken.wait(PATIENCE_S)
            with pytest.raises(KeyError, match="conversion"):
                reader.submit_read([Read(file, 0, 10, slots.slot(0))], finish=fail).wait(PATIENCE_S)
            assert submit_block(reader, file, 1, slots).wait(PATIENCE_S) == (0,)
            assert reader.totals().bytes_read == 10 + BLOCK_BYTES, "the failed record counts nothing"
        assert finished == []

    def test_the_parts_after_a_failed_one_are_not_read(self, path: Path, slots: SlotBank) -> None:
        disk = Disk(None, os_error(errno.ENXIO))
        with ShardFile(path, calls=FileCalls(preadv=disk.preadv)) as file, DiskReader(1) as reader:
            parts = [Read(file, block * BLOCK_BYTES, 10, slots.slot(block)) for block in range(4)]
            with pytest.raises(TransferError):
                reader.submit_read(parts).wait(PATIENCE_S)
        assert [offset // BLOCK_BYTES for offset, _ in disk.requests] == [0, 1]

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_finished_handle_holds_no_buffer(self, path: Path, fails: bool) -> None:
        calls = FileCalls(preadv=Disk(os_error(errno.ENXIO) if fails else None).preadv)
        block = bytearray(3 * BLOCK_BYTES)
        gc.collect()
        gc.disable()
        try:
            with ShardFile(path, direct=False, calls=calls) as file, DiskReader(1) as reader:
                handle = reader.submit_read([Read(file, 0, 10, memoryview(block))], finish=lambda starts, b=block: None)
                if fails:
                    with pytest.raises(TransferError):
                        handle.wait(PATIENCE_S)
                else:
                    handle.wait(PATIENCE_S)
                # Python refuses to resize while any view is alive; the worker lets go of its own a moment later.
                deadline = time.monotonic() + PATIENCE_S
                while True:
                    try:
                        block.append(0)
                        break
                    except BufferError:
                        assert time.monotonic() < deadline, "something still holds the destination"
                        time.sleep(0.001)
        finally:
            gc.enable()

    def test_close_while_busy_ends_what_runs_and_fails_what_waits(
        self, path: Path, slots: SlotBank, gate: Gate
    ) -> None:
        with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file:
            reader = DiskReader(2)
            handles = [submit_block(reader, file, block, slots) for block in range(6)]
            gate.wait_begun(2)
            outcome: list[object] = []

            def wait_for_last() -> None:
                try:
                    outcome.append(handles[-1].wait(PATIENCE_S))
                except MoertError as error:
                    outcome.append(str(error))

            waiter = threading.Thread(target=wait_for_last)
            waiter.start()
            closer = threading.Thread(target=reader.close)
            closer.start()
            waiter.join(PATIENCE_S)
            assert len(outcome) == 1
            assert "closed before" in str(outcome[0])
            assert closer.is_alive(), "close must wait for the reads in flight"
            gate.open()
            closer.join(PATIENCE_S)
            assert not closer.is_alive()
            assert handles[0].wait() == handles[1].wait() == (0,)
            assert len(gate.begun) == 2
            reader.close()
            assert reader.closed
            with pytest.raises(MoertError, match="closed"):
                submit_block(reader, file, 0, slots)

    def test_closing_from_a_finish_does_not_hang(self, path: Path, slots: SlotBank) -> None:
        with ShardFile(path) as file:
            reader = DiskReader(2)
            handle = reader.submit_read([Read(file, 0, 10, slots.slot(0))], finish=lambda starts: reader.close())
            assert handle.wait(PATIENCE_S) == (0,)
            reader.close()

    def test_an_interrupt_while_a_worker_starts_is_an_interrupt(
        self, path: Path, slots: SlotBank, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(event: Any, timeout: float | None = None) -> None:
            """As when the signal comes before `Condition.wait` has its lock back, which leaving then releases."""
            with event._cond:
                event._cond.release()
                raise KeyboardInterrupt

        with ShardFile(path) as file, DiskReader(2) as reader:
            reads = [Read(file, 0, 10, slots.slot(0))]
            with monkeypatch.context() as patch:
                patch.setattr(threading.Event, "wait", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    reader.submit_read(reads, finish=lambda starts: None)
            (worker,) = (thread for thread in threading.enumerate() if thread.name.startswith("moert-read"))
            assert reader.submit_read(reads, finish=lambda starts: None).wait(PATIENCE_S) == (0,)
            reader.close()
            assert not worker.is_alive()

    def test_a_thread_that_cannot_start_is_an_error_and_not_waited_for(
        self, path: Path, slots: SlotBank, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with ShardFile(path) as file, DiskReader(1) as reader:
            reads = [Read(file, 0, 10, slots.slot(0))]
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refused)
                with pytest.raises(RuntimeError, match="can't start"):
                    reader.submit_read(reads, finish=lambda starts: None)
            assert reader.submit_read(reads, finish=lambda starts: None).wait(PATIENCE_S) == (0,)

    def test_a_forgotten_reader_ends_its_threads(self, path: Path, slots: SlotBank) -> None:
        with ShardFile(path) as file:
            reader = DiskReader(2)
            reader.submit_read([Read(file, 0, 10, slots.slot(0))], finish=lambda starts: None).wait(PATIENCE_S)
            threads = [thread for thread in threading.enumerate() if thread.name.startswith("moert")]
            assert threads
            del reader
            gc.collect()
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive()

    @pytest.mark.parametrize("falls_asleep", [False, True])
    def test_a_reader_that_its_own_worker_collects_ends(
        self, falls_asleep: bool, path: Path, slots: SlotBank, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The garbage collector may run in a worker that is choosing what to read next, or on its way to sleep."""
        monkeypatch.setattr(thread_reads, "LOOK_S", 0.05)
        with ShardFile(path) as file:
            reads = thread_reads.ThreadReads(1, 1, _C.busy_clock())
            choose, wait = reads._next_handle, reads._changed.wait
            collected = threading.Event()

            def shut_down(then: Callable[..., Any], *args: Any) -> Any:
                if reads.records and not collected.is_set():
                    collected.set()
                    reads.shut_down()
                return then(*args)

            if falls_asleep:
                monkeypatch.setattr(reads._changed, "wait", lambda *args: shut_down(wait, *args))
            else:
                monkeypatch.setattr(reads, "_next_handle", lambda: shut_down(choose))
            reads.submit((Read(file, 0, 10, slots.slot(0)),), Priority.DEMAND, None).wait(PATIENCE_S)
            (worker,) = reads._threads
            worker.join(PATIENCE_S)
            assert collected.is_set()
            assert not worker.is_alive()

    def test_busy_time_is_the_union_of_the_reads(self, path: Path, slots: SlotBank) -> None:
        delay_s = 0.1
        side_by_side = threading.Barrier(4)
        converting_at: list[float] = []

        def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            side_by_side.wait(PATIENCE_S)
            time.sleep(delay_s)
            return os.preadv(fd, buffers, offset)

        def convert(starts: tuple[int, ...]) -> None:
            converting_at.append(time.perf_counter())
            time.sleep(2 * delay_s)

        with ShardFile(path, calls=FileCalls(preadv=slow)) as file, DiskReader(4) as reader:
            assert reader.totals().read_s == 0
            began = time.perf_counter()
            handles = [submit_block(reader, file, block, slots) for block in range(4)]
            for handle in handles:
                handle.wait(PATIENCE_S)
            together_s, whole_s = reader.totals().read_s, time.perf_counter() - began
            assert delay_s <= together_s <= whole_s, "four reads side by side are no four delays"
            time.sleep(delay_s)
            assert reader.totals().read_s == together_s, "an idle disk is not busy"
            side_by_side = threading.Barrier(1)
            began = time.perf_counter()
            handle = reader.submit_read([Read(file, 0, 10, slots.slot(0))], finish=convert)
            handle.wait(PATIENCE_S)
            whole_s = converting_at[0] - began
            assert delay_s <= reader.totals().read_s - together_s <= whole_s + 1e-6, "converting is not reading"
            assert delay_s <= handle.read_s <= whole_s

    @pytest.mark.parametrize(("depth", "prefetch_depth"), [(0, None), (2, 0), (2, 3)])
    def test_depths_that_cannot_be(self, depth: int, prefetch_depth: int | None) -> None:
        with pytest.raises(ValueError, match="prefetch_depth"):
            DiskReader(depth, prefetch_depth)

    def test_descriptors_do_not_pile_up(self, path: Path, slots: SlotBank) -> None:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            with ShardFile(path) as file, DiskReader(2) as reader:
                submit_block(reader, file, 0, slots).wait(PATIENCE_S)
        assert len(os.listdir("/proc/self/fd")) == before


PRELUDE = """
    import os, signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have been started without it
    from moert.tiers.arena import HostArena
    from moert.tiers.disk import *
    arena = HostArena(1 << 20)
    def slow(fd, buffers, offset):
        begun.append(offset)
        PAUSE
        return os.preadv(fd, buffers, offset)
    begun = []
    file = ShardFile(sys.argv[1], calls=FileCalls(preadv=slow))
    reader = DiskReader(2)
    def finish(starts):
        os.write(1, b"read ")
    def submit(i):
        return reader.submit_read([Read(file, 0, 4096, arena.view(i * 4096, 4096))], finish=finish)
    handles = [submit(i) for i in range(20)]
"""


UNTIL_CLOSED = "while not reader._reads.threads.closed: time.sleep(0.001)"


def run_child(code: str, path: Path, pause: str = "time.sleep(0.3)") -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(PRELUDE).replace("PAUSE", pause) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, timeout=60)


class TestProcesses:
    def test_exit_without_close_waits_for_what_is_in_flight(self, path: Path) -> None:
        code = """
            while len(begun) < 2:
                time.sleep(0.001)
            print('done', flush=True)
        """
        child = run_child(code, path, pause=UNTIL_CLOSED)
        assert (child.returncode, child.stdout, child.stderr) == (0, "done\nread read ", "")

    def test_exit_by_an_exception(self, path: Path) -> None:
        child = run_child("handles[0].wait(); raise SystemExit(3)", path)
        assert (child.returncode, child.stderr) == (3, "")

    def test_interrupted_while_waiting(self, path: Path) -> None:
        child = run_child(
            """
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            handles[-1].wait()
            """,
            path,
        )
        assert child.returncode in (-signal.SIGINT, 130)
        assert child.stderr.rstrip().endswith("KeyboardInterrupt")
        # Twenty reads two at a time take 3 s; those in flight end, the rest is dropped.
        assert 2 <= child.stdout.count("read ") < 20

    def test_a_forked_child_gets_an_error_instead_of_hanging(self, path: Path) -> None:
        child = run_child(
            """
            pid = os.fork()
            if pid == 0:
                for attempt in (handles[-1].wait, lambda: reader.submit_read([])):
                    try:
                        attempt()
                    except Exception as error:
                        print(type(error).__name__, "fork" in str(error))
                sys.exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), handles[0].wait())
            """,
            path,
        )
        assert (child.returncode, child.stderr) == (0, "")
        assert child.stdout.replace("read ", "").splitlines() == ["MoertError True", "MoertError True", "0 (0,)"]


def test_bandwidth_is_that_of_a_known_disk(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * 5000)

    class Clock:
        """Two reads at once take 20 ms."""

        reads = 0

        @staticmethod
        def perf_counter() -> float:
            return Clock.reads / 2 * 0.02

    def paced(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with lock:
            Clock.reads += 1
        return os.preadv(fd, buffers, offset)

    lock = threading.Lock()

    class Paced(ShardFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path, calls=FileCalls(preadv=paced))

    monkeypatch.setattr("moert.tiers.disk.ShardFile", Paced)
    monkeypatch.setattr("moert.tiers.disk.time", Clock)
    record_bytes = 100_000
    rate = measure_read_bandwidth([path, small], record_bytes, depth=2, seconds=0.4)
    assert rate == pytest.approx(2 * 102_400 / 0.02)
    assert 40 <= Clock.reads <= 42
    with pytest.raises(ValueError, match="none of 1 files has 102400 bytes"):
        measure_read_bandwidth([small], record_bytes)


def test_bandwidth_of_this_disk_is_plausible(path: Path) -> None:
    assert 1e5 < measure_read_bandwidth([path], 1 << 20, depth=4, seconds=0.1) < 1e12
