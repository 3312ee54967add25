"""Records that the extension's threads read; `test_tiers_disk.py` has what Python's threads do."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_threads import check_no_disk_threads, disk_threads

from moert import _C
from moert.errors import CorruptFileError, MoertError, TransferError
from moert.tiers import native_reads, reader, shard_file
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.depth import DEPTHS, START_DEPTH, DepthTuner
from moert.tiers.disk import BLOCK_BYTES, DiskReader, FileCalls, Priority, Read, ReadHandle, ShardFile
from moert.tiers.native_reads import NativeHandle
from moert.tiers.thread_reads import ThreadHandle

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    fds = set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    check_no_disk_threads()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("moert")] == []
    assert set(os.listdir("/proc/self/fd")) - fds == set()


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
    """Reads of the file fail."""
    good = os.dup(file._fd)
    bad = os.open(file.path.with_suffix(".bad"), os.O_WRONLY | os.O_CREAT)
    try:
        os.dup2(bad, file._fd, inheritable=False)
        yield
    finally:
        os.dup2(good, file._fd, inheritable=False)
        os.close(good)
        os.close(bad)


class TestBytes:
    @settings(max_examples=150)
    @given(data=st.data())
    def test_any_record_has_the_files_bytes(
        self, data: st.DataObject, content: bytes, slots: SlotBank, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        size = data.draw(st.sampled_from([1, 4095, 4096, 4097, 3 * MIB + 77, SIZE]))
        path = tmp_path_factory.getbasetemp() / f"native-{size}"
        if not path.exists():
            path.write_bytes(content[:size])
        lengths = st.one_of(
            st.integers(1, 20_000),
            st.integers(MIB - 5000, 3 * MIB),
            st.sampled_from([1, BLOCK_BYTES, MIB, 3 * MIB // 2]),
        )
        with ShardFile(path) as file, DiskReader(data.draw(st.integers(1, 5))) as reader:
            if not file.direct:
                pytest.skip("this file system has no O_DIRECT")
            records = []
            for slot in range(data.draw(st.integers(1, 3))):
                parts: list[Read] = []
                end = 0
                for _ in range(data.draw(st.integers(1, 4))):
                    nbytes = min(data.draw(lengths), size)
                    offset = data.draw(st.one_of(st.just(size - nbytes), st.integers(0, size - nbytes)))
                    window = file.window_bytes(offset, nbytes)
                    if end + window >= SLOT_BYTES:
                        break
                    parts.append(Read(file, offset, nbytes, slots.slot(slot)[end : end + window]))
                    end += window
                slots.slot(slot)[end : end + 1] = b"\x5a"
                handle = reader.submit_read(parts, data.draw(st.sampled_from(Priority)))
                assert isinstance(handle, NativeHandle)
                records.append((parts, handle))
            for slot, (parts, handle) in enumerate(records):
                starts = handle.wait(PATIENCE_S)
                assert handle.ready
                assert starts == tuple(read.offset % BLOCK_BYTES for read in parts)
                for read, start in zip(parts, starts, strict=True):
                    got = read.destination[start : start + read.nbytes]
                    assert got == content[read.offset : read.offset + read.nbytes]
                end = sum(len(read.destination) for read in parts)
                assert slots.slot(slot)[end] == 0x5A, "nothing is written behind the windows"
            totals = reader.totals()
            assert totals.records == len(records)
            assert totals.bytes_read == sum(read.nbytes for parts, _ in records for read in parts)

    @pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs")
    def test_a_record_on_two_disks(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        path = Path(f"/dev/shm/moert-test-{os.getpid()}")
        try:
            path.write_bytes(content)
            with ShardFile(path) as other, DiskReader(2) as reader:
                if not other.direct or other.identity.device == file.identity.device:
                    pytest.skip("no second disk with O_DIRECT")
                parts = [Read(file, 5, 3 * MIB, slots.slot(0)), Read(other, 77, 3 * MIB, slots.slot(1))]
                handle = reader.submit_read(parts)
                assert isinstance(handle, NativeHandle)
                assert handle.wait(PATIENCE_S) == (5, 77)
                assert slots.slot(0)[5 : 5 + 3 * MIB] == content[5 : 5 + 3 * MIB]
                assert slots.slot(1)[77 : 77 + 3 * MIB] == content[77 : 77 + 3 * MIB]
        finally:
            path.unlink()


class TestWhoReads:
    def test_what_takes_more_than_reading_is_for_python(self, file: ShardFile, slots: SlotBank) -> None:
        place = slots.slot(0)
        calls = FileCalls(clear_direct=lambda fd: None)
        with (
            ShardFile(file.path, direct=False) as buffered,
            ShardFile(file.path, calls=calls) as other,
            DiskReader(2) as r,
        ):
            finished: list[tuple[int, ...]] = []
            handles = [
                r.submit_read([Read(file, 7, 10, place)], finish=finished.append),
                r.submit_read([Read(buffered, 7, 10, place)]),
                r.submit_read([Read(other, 7, 10, place)]),
                r.submit_read([Read(file, 7, 10, place), Read(buffered, 7, 10, slots.slot(1))]),
                r.submit_read([]),
            ]
            assert [type(handle) for handle in handles] == [ThreadHandle] * 5
            assert [handle.wait(PATIENCE_S) for handle in handles] == [(7,), (7,), (7,), (7, 7), ()]
            assert finished == [(7,)]
            assert type(r.submit_read([Read(file, 7, 10, place)])) is NativeHandle
            until(lambda: disk_threads() == 1)
        with ShardFile(file.path, calls=FileCalls()) as same, DiskReader(2) as r:
            assert type(r.submit_read([Read(same, 7, 10, place)])) is NativeHandle

    @pytest.mark.parametrize(
        ("offset", "nbytes", "begin", "error"),
        [
            (-1, 5, 0, ValueError),
            (0, 0, 0, ValueError),
            (SIZE - 9, 10, 0, CorruptFileError),
            (0, 4097, SLOT_BYTES - 4096, ValueError),
        ],
    )
    def test_mistakes_are_told_as_python_tells_them(
        self, file: ShardFile, slots: SlotBank, offset: int, nbytes: int, begin: int, error: type[Exception]
    ) -> None:
        place = slots.slot(0)[begin:]
        with pytest.raises(error) as expected:
            file.read(offset, nbytes, place)
        with DiskReader(1) as reader:
            handle = reader.submit_read([Read(file, offset, nbytes, place)])
            with pytest.raises(error) as found:
                handle.wait(PATIENCE_S)
        assert str(found.value) == str(expected.value)

    def test_memory_that_does_not_suit(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(1) as reader:
            for place in (slots.slot(0)[1:], memoryview(bytes(9000)), slots.slot(0)[::2]):
                handle = reader.submit_read([Read(file, 0, 10, place)])
                assert type(handle) is ThreadHandle
                with contextlib.suppress(Exception):
                    handle.wait(PATIENCE_S)

    def test_a_closed_file(self, file: ShardFile, slots: SlotBank) -> None:
        file.close()
        with DiskReader(1) as reader, pytest.raises(MoertError, match=r"shard\.safetensors is closed"):
            reader.submit_read([Read(file, 0, 10, slots.slot(0))]).wait(PATIENCE_S)

    def test_totals_are_of_both(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(2) as reader:
            handles = [submit(reader, file, slots.slot(0), 5, 3 * MIB)]
            handles += [reader.submit_read([Read(file, 5, 100, slots.slot(1))], finish=lambda _: None)]
            for handle in handles:
                handle.wait(PATIENCE_S)
                assert handle.read_s > 0
            totals = reader.totals()
            assert (totals.records, totals.bytes_read) == (2, 3 * MIB + 100)
            assert max(handle.read_s for handle in handles) <= totals.read_s * 1.001 + 1e-4
            time.sleep(0.05)
            assert reader.totals().read_s == totals.read_s, "an idle disk is not busy"


class TestQueue:
    def test_cancel_and_promote(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        with DiskReader(2) as reader:
            set_lanes(reader, file, 0)
            kinds = [Priority.PREFETCH, Priority.PROMOTION, Priority.DEMAND, Priority.PREFETCH]
            handles = [submit(reader, file, slots.slot(i), i * MIB, MIB, kind) for i, kind in enumerate(kinds)]
            assert not any(handle.ready for handle in handles)
            assert handles[0].cancel()
            assert not handles[0].cancel()
            assert handles[0].ready
            with pytest.raises(MoertError, match="cancelled before it started"):
                handles[0].wait()
            for handle in handles[1:]:
                handle.promote()
            assert [handle.priority for handle in handles[1:]] == [Priority.DEMAND] * 3
            handles[0].promote()
            assert handles[0].priority is Priority.PREFETCH
            with pytest.raises(TimeoutError, match=r"1048576 bytes is not done after 0\.01 s"):
                handles[1].wait(0.01)
            set_lanes(reader, file, 2)
            for i in (1, 2, 3):
                assert handles[i].wait(PATIENCE_S) == handles[i].wait(0) == (0,)
                assert slots.slot(i)[:MIB] == content[i * MIB : (i + 1) * MIB]
                assert not handles[i].cancel()
            assert reader.totals().records == 3

    def test_demand_goes_first(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        """Into the same memory: what is there at the end was read last."""
        with DiskReader(1) as reader:
            set_lanes(reader, file, 0)
            places = [slots.slot(0)[i * MIB : (i + 1) * MIB] for i in range(4)]
            guesses = [
                submit(reader, file, place, (8 + i) * MIB, MIB, Priority.PREFETCH) for i, place in enumerate(places)
            ]
            demand = submit(reader, file, slots.slot(0), 0, 4 * MIB)
            set_lanes(reader, file, 1)
            for handle in [demand, *guesses]:
                handle.wait(PATIENCE_S)
            for i, place in enumerate(places):
                assert place == content[(8 + i) * MIB : (9 + i) * MIB], f"guess {i} was read before the demand"

    def test_the_first_of_many_is_there_early(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(4) as reader:
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end:
                set_lanes(reader, file, 0)
                handles = [submit(reader, file, slots.slot(i), 0, 4 * MIB) for i in range(8)]
                set_lanes(reader, file, 4)
                handles[1].wait(PATIENCE_S)
                if handles[0].ready and not handles[-1].ready:
                    break
                for handle in handles:
                    handle.wait(PATIENCE_S)
            else:
                pytest.fail("the last of eight was there with the first, each time")

    def test_many_threads_lose_nothing(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        outcomes: list[list[str]] = [[] for _ in range(4)]
        with DiskReader() as reader:

            def work(number: int) -> None:
                chance = random.Random(number)
                for _ in range(60):
                    handles = []
                    for part in range(4):
                        begin = part * MIB
                        nbytes = chance.choice([1, 5000, 900_000])
                        offset = chance.randrange(SIZE - nbytes)
                        place = slots.slot(number)[begin : begin + MIB]
                        finish = (lambda _: None) if chance.random() < 0.1 else None
                        handle = reader.submit_read(
                            [Read(file, offset, nbytes, place)], chance.choice(list(Priority)), finish
                        )
                        handles.append((handle, place, offset, nbytes))
                        if chance.random() < 0.3:
                            chance.choice(handles)[0].promote()
                        if chance.random() < 0.2:
                            chance.choice(handles)[0].cancel()
                    for handle, place, offset, nbytes in handles:
                        try:
                            start = handle.wait(PATIENCE_S)[0]
                        except MoertError:
                            outcomes[number].append("cancelled")
                        else:
                            good = place[start : start + nbytes] == content[offset : offset + nbytes]
                            outcomes[number].append("good" if good else "bad")

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            everything = [outcome for one in outcomes for outcome in one]
            assert len(everything) == 4 * 60 * 4
            assert set(everything) == {"good", "cancelled"}
            assert reader.totals().records == everything.count("good")

    def test_several_may_wait_for_one(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(1) as reader:
            set_lanes(reader, file, 0)
            handle = submit(reader, file, slots.slot(0), 5, 100)
            found: list[tuple[int, ...]] = []
            threads = [threading.Thread(target=lambda: found.append(handle.wait(PATIENCE_S))) for _ in range(5)]
            for thread in threads:
                thread.start()
            time.sleep(0.02)
            set_lanes(reader, file, 1)
            for thread in threads:
                thread.join()
            assert found == [(5,)] * 5


class TestFailures:
    def test_truncated_while_in_use(self, file: ShardFile, path: Path, slots: SlotBank) -> None:
        with DiskReader(2) as reader:
            submit(reader, file, slots.slot(0), SIZE - 5000, 5000).wait(PATIENCE_S)
            os.truncate(path, 2_000_005)
            for offset in (SIZE - 5000, 2_000_000 - 50_000, 0):
                handle = submit(reader, file, slots.slot(0), offset, 5000)
                with pytest.raises(CorruptFileError, match=rf"shard\.safetensors.*size {SIZE} -> 2000005"):
                    handle.wait(PATIENCE_S)
                assert handle.ready
            assert reader.totals().records == 1

    def test_truncated_between_its_submission_and_its_reading(
        self, file: ShardFile, path: Path, slots: SlotBank
    ) -> None:
        with DiskReader(2) as reader:
            set_lanes(reader, file, 0)
            handle = submit(reader, file, slots.slot(0), SIZE - 3 * MIB, 3 * MIB)
            os.truncate(path, SIZE - 2 * MIB)
            set_lanes(reader, file, 2)
            with pytest.raises(CorruptFileError, match="size"):
                handle.wait(PATIENCE_S)

    def test_overwritten_in_place(self, file: ShardFile, path: Path, slots: SlotBank) -> None:
        os.utime(path, ns=(10**18, 10**18))
        with ShardFile(path) as later, DiskReader(2) as reader:
            submit(reader, later, slots.slot(0), 0, 5000).wait(PATIENCE_S)
            with open(path, "r+b") as writer:
                writer.write(b"new")
            with pytest.raises(CorruptFileError, match=r"changed.*modified 2001-09-09 .* -> 20"):
                submit(reader, later, slots.slot(0), 100_000, 5000).wait(PATIENCE_S)

    def test_what_fails_is_read_by_python(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        with DiskReader(2) as reader:
            with unreadable(file):
                handle = submit(reader, file, slots.slot(0), 77, 3 * MIB, Priority.PREFETCH)
                until(lambda: state(handle) != UNDER_WAY)
            assert state(handle) == FAILED
            assert _C.record_failure(handle._record) == (0, 0, errno.EBADF)  # type: ignore[attr-defined]
            assert reader.totals().records == 0
            until(lambda: handle.ready)
            assert handle.wait() == (77,)
            assert slots.slot(0)[77 : 77 + 3 * MIB] == content[77 : 77 + 3 * MIB]
            assert handle.read_s > 0
            assert not handle.cancel()
            assert (reader.totals().records, reader.totals().bytes_read) == (1, 3 * MIB)

    def test_what_python_cannot_read_either_is_its_error(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(2) as reader, unreadable(file):
            handle = submit(reader, file, slots.slot(0), 5000, 100)
            for _ in range(2):
                with pytest.raises(TransferError, match="Bad file descriptor reading 4096 bytes at 4096") as caught:
                    handle.wait(PATIENCE_S)
                assert (caught.value.errno, caught.value.filename) == (errno.EBADF, str(file.path))
            assert reader.totals().records == 0

    def test_a_file_that_is_read_through_the_page_cache_by_now(
        self, file: ShardFile, content: bytes, slots: SlotBank
    ) -> None:
        with DiskReader(2) as reader:
            with unreadable(file):
                handle = submit(reader, file, slots.slot(0), 5, 100)
                until(lambda: state(handle) == FAILED)
            shard_file._clear_direct(file._fd)
            file.direct = False
            assert handle.wait(PATIENCE_S) == (5,)
            assert slots.slot(0)[5:105] == content[5:105]
            assert type(reader.submit_read([Read(file, 5, 100, slots.slot(0))])) is ThreadHandle

    def test_closing_the_reader_reads_again_what_failed(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        reader = DiskReader(2)
        with unreadable(file):
            handle = submit(reader, file, slots.slot(0), 5, 100)
            until(lambda: state(handle) == FAILED)
        reader.close()
        assert handle.ready
        assert handle.wait() == (5,)
        assert slots.slot(0)[5:105] == content[5:105]
        assert reader.totals().records == 1

    def test_without_a_thread_python_reads(
        self, file: ShardFile, slots: SlotBank, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> object:
            raise RuntimeError("the system gives no thread to read with")

        with DiskReader(2) as reader:
            monkeypatch.setattr(_C, "reader_submit", refuse)
            handle = reader.submit_read([Read(file, 5, 100, slots.slot(0))])
            assert type(handle) is ThreadHandle
            assert handle.wait(PATIENCE_S) == (5,)
            assert file._readers == 0


def aligned(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class TestLifetimes:
    def test_memory_stays_until_the_read_is_over(self, file: ShardFile) -> None:
        memory = aligned(MIB)
        with DiskReader(1) as reader:
            set_lanes(reader, file, 0)
            handle = submit(reader, file, memoryview(memory), 0, MIB)
            record = handle._record  # type: ignore[attr-defined]
            del handle
            gc.collect()
            with pytest.raises(BufferError):
                memory.close()
            set_lanes(reader, file, 1)
            until(lambda: _C.record_state(record) == WHOLE)
            reader._reads.native.sweep()
            memory.close()

    def test_dropped_handles_are_swept_up_on_the_way(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(2) as reader:
            for _ in range(300):
                handle = submit(reader, file, slots.slot(0), 0, 100)
                until(lambda handle=handle: state(handle) == WHOLE)  # type: ignore[misc]
                assert len(reader._reads.native._unsettled) <= 64
            reader.close()
            assert reader._reads.native._unsettled == set()
        assert file._readers == 0

    def test_a_settled_handle_holds_no_memory(self, file: ShardFile) -> None:
        memory = aligned(MIB)
        gc.collect()
        gc.disable()
        try:
            with DiskReader(1) as reader:
                handle = submit(reader, file, memoryview(memory), 0, MIB)
                handle.wait(PATIENCE_S)
                memory.close()
        finally:
            gc.enable()

    def test_closing_a_file_waits_for_the_reads_on_it(self, path: Path, content: bytes, slots: SlotBank) -> None:
        """A descriptor closed under a read could name another file by the time the kernel looks it up."""
        file = ShardFile(path)
        if not file.direct:
            pytest.skip("this file system has no O_DIRECT")
        with DiskReader(1) as reader:
            set_lanes(reader, file, 0)
            handle = submit(reader, file, slots.slot(0), 0, MIB)
            file.close()
            with open(os.devnull, "rb") as other:
                assert other.fileno() != file._fd
                set_lanes(reader, file, 1)
                handle.wait(PATIENCE_S)
            assert slots.slot(0)[:MIB] == content[:MIB]
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(file._fd)

    def test_close_while_reading(self, file: ShardFile, content: bytes, arena: HostArena, slots: SlotBank) -> None:
        for depth in (1, 3):
            reader = DiskReader(depth)
            handles = [submit(reader, file, slots.slot(i), 5, 3 * MIB) for i in range(8)]
            handles[0].wait(PATIENCE_S)
            reader.close()
            after = hashlib.sha256(arena.view(0, arena.nbytes)).digest()
            assert all(handle.ready for handle in handles)
            whole = reader.totals().records
            for i, handle in enumerate(handles):
                if i < whole:
                    assert handle.wait() == (5,)
                    assert slots.slot(i)[5 : 5 + 3 * MIB] == content[5 : 5 + 3 * MIB]
                else:
                    with pytest.raises(MoertError, match=r"^the disk reader was closed before this read started$"):
                        handle.wait()
            time.sleep(0.05)
            assert hashlib.sha256(arena.view(0, arena.nbytes)).digest() == after
            check_no_disk_threads()
            reader.close()
            with pytest.raises(MoertError, match="closed; load or patch"):
                reader.submit_read([Read(file, 0, 1, slots.slot(0))])

    def test_waiters_of_queued_records_learn_of_the_closing(self, file: ShardFile, slots: SlotBank) -> None:
        reader = DiskReader(1)
        set_lanes(reader, file, 0)
        handle = submit(reader, file, slots.slot(0), 0, 100)
        outcome: list[str] = []

        def wait() -> None:
            try:
                handle.wait(PATIENCE_S)
            except MoertError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.02)
        reader.close()
        thread.join(PATIENCE_S)
        assert outcome == ["the disk reader was closed before this read started"]

    def test_a_forgotten_reader(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        for wait_first in (True, False):
            disk = DiskReader(2)
            handles = [submit(disk, file, slots.slot(i), 5, 4 * MIB - 5000) for i in range(8)]
            handles[0].wait(PATIENCE_S)
            if wait_first:
                for handle in handles:
                    handle.wait(PATIENCE_S)
            del disk
            gc.collect()
            check_no_disk_threads()
            for i, handle in enumerate(handles):
                with contextlib.suppress(MoertError):
                    handle.wait(PATIENCE_S)
                    assert slots.slot(i)[5 : 4 * MIB - 5000] == content[5 : 4 * MIB - 5000]

    def test_forgotten_in_the_middle_of_a_read(self, file: ShardFile) -> None:
        memory = aligned(16 * MIB)
        disk = DiskReader(1)
        submit(disk, file, memoryview(memory), 0, 16 * MIB)
        del disk
        gc.collect()
        check_no_disk_threads()
        DiskReader().close()
        assert reader._unfinished == set()
        memory.close()

    def test_descriptors_and_threads_do_not_pile_up(self, path: Path, file: ShardFile, slots: SlotBank) -> None:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            with ShardFile(path) as again, DiskReader(2) as disk:
                submit(disk, again, slots.slot(0), 0, 4 * MIB).wait(PATIENCE_S)
        assert len(os.listdir("/proc/self/fd")) == before
        check_no_disk_threads()


class TestDepth:
    def test_the_default_is_measured(self, file: ShardFile, slots: SlotBank, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []

        class Watched(DepthTuner):
            def observe(self, nbytes: float, seconds: float, lanes: int) -> int:
                seen.append(lanes)
                assert nbytes > 0
                assert seconds > 0
                return super().observe(nbytes, seconds, lanes)

        monkeypatch.setattr(native_reads, "DepthTuner", Watched)
        monkeypatch.setattr(native_reads, "PERIOD_S", 0.001)
        monkeypatch.setattr(native_reads, "PERIOD_BYTES", 4 * MIB)
        with DiskReader() as disk:
            assert disk.depth == START_DEPTH
            for _ in range(20):
                for handle in [submit(disk, file, slots.slot(i), 0, 4 * MIB) for i in range(8)]:
                    handle.wait(PATIENCE_S)
            assert disk.depth in DEPTHS
        assert set(seen) - {START_DEPTH}, "another depth was tried, and told of"
        assert set(seen) <= set(DEPTHS)

    def test_a_given_depth_stays(self, file: ShardFile, slots: SlotBank, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_reads, "PERIOD_S", 0.0)
        monkeypatch.setattr(native_reads, "PERIOD_BYTES", 0)
        with DiskReader(3) as disk:
            for _ in range(10):
                for handle in [submit(disk, file, slots.slot(i), 0, 4 * MIB) for i in range(8)]:
                    handle.wait(PATIENCE_S)
            assert disk.depth == 3
            assert disk_threads() == 3


PRELUDE = """
    import os, signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have been started without it
    from moert import _C
    from moert.tiers.arena import HostArena
    from moert.tiers.disk import *
    arena = HostArena(64 << 20)
    file = ShardFile(sys.argv[1])
    reader = DiskReader(2)
    def submit(i):
        return reader.submit_read([Read(file, 0, 8 << 20, arena.view(i * (8 << 20), 8 << 20))])
    def set_lanes(n):
        _C.reader_set_lanes(reader._reads.native._reader, file.identity.device, n, n)
"""


def run_child(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, timeout=60)


class TestProcesses:
    def test_exit_while_reading(self, file: ShardFile) -> None:
        child = run_child("handles = [submit(i) for i in range(8)]; handles[0].wait(); print('done')", file.path)
        assert (child.returncode, child.stdout, child.stderr) == (0, "done\n", "")

    def test_exit_while_others_wait(self, file: ShardFile) -> None:
        code = """
            set_lanes(0)
            handle = submit(0)
            def wait():
                try:
                    handle.wait()
                except Exception as error:
                    os.write(1, str(error).encode())
            threading.Thread(target=wait, daemon=True).start()
            time.sleep(0.1)
        """
        child = run_child(code, file.path)
        assert (child.returncode, child.stderr) == (0, "")

    @pytest.mark.parametrize("sent_to", ["process", "another thread"])
    def test_interrupted_while_waiting(self, file: ShardFile, sent_to: str) -> None:
        send = {
            "process": "os.kill(os.getpid(), signal.SIGINT)",
            # Whose handler then only notes that there was one.
            "another thread": "signal.pthread_kill(threading.get_ident(), signal.SIGINT)",
        }[sent_to]
        code = f"""
            set_lanes(0)
            handle = submit(0)
            try:
                threading.Timer(0.2, lambda: {send}).start()
                handle.wait()
            except KeyboardInterrupt:
                print(handle.ready, handle.cancel())
        """
        child = run_child(code, file.path)
        assert (child.returncode, child.stdout, child.stderr) == (0, "False True\n", "")

    def test_a_fork_is_told(self, file: ShardFile) -> None:
        code = """
            over = submit(0)
            over.wait()
            set_lanes(0)
            reads = [Read(file, 0, 4096, arena.view(0, 4096))]
            handle = submit(1)
            pid = os.fork()
            if pid == 0:
                for attempt in (handle.wait, lambda: reader.submit_read(reads)):
                    try:
                        attempt()
                    except Exception as error:
                        print(type(error).__name__, "fork" in str(error))
                print(over.wait(), handle.ready, handle.cancel())
                handle.promote()
                reader.close()
                del reader, handle
                sys.exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            set_lanes(2)
            print(handle.wait())
        """
        child = run_child(code, file.path)
        assert (child.returncode, child.stderr) == (0, "")
        expected = ["MoertError True", "MoertError True", "(0,) False False", "0", "(0,)"]
        assert child.stdout.splitlines() == expected

    def test_other_python_threads_run_meanwhile(self, file: ShardFile, slots: SlotBank) -> None:
        with DiskReader(1) as disk:
            set_lanes(disk, file, 0)
            handle = submit(disk, file, slots.slot(0), 0, 100)
            threading.Timer(0.1, set_lanes, (disk, file, 1)).start()
            assert handle.wait(PATIENCE_S) == (0,), "the timer's thread must get the GIL while this one waits"


def check_native(folder: Path, *options: str, rounds: int) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / "reader_check"
    sources = ["tests/native/reader_check.cpp", "csrc/reader.cpp", "csrc/record.cpp"]
    build = [compiler, "-std=c++17", "-O1", "-g", "-pthread", "-Icsrc", *options, *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=250)
    child = subprocess.run([program, str(rounds)], capture_output=True, text=True, timeout=250)
    assert (child.returncode, child.stdout) == (0, "all hold\n"), child.stderr


def test_native_checks(tmp_path: Path) -> None:
    check_native(tmp_path, "-Wall", "-Wextra", "-Werror", rounds=30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, p: _C.reader_open(257, 1, _C.busy_clock()), "lanes is 257"),
        (lambda r, p: _C.reader_open(2, 3, _C.busy_clock()), "guesses is 3"),
        (lambda r, p: _C.reader_submit(r, 3, 1, [p]), "class is 3"),
        (lambda r, p: _C.reader_submit(r, 0, 1, [(*p[:8], 5)]), "multiple of 4096"),
        (lambda r, p: _C.reader_submit(r, 0, 1, [(*p[:5], 1, *p[6:])]), "4096 bytes at 1,"),
        (lambda r, p: _C.reader_submit(r, 0, 1, [(*p[:6], 8192, 4096, 4096)]), "of which 4096 are needed"),
        (lambda r, p: _C.reader_submit(r, 0, 1, [(*p[:6], 4096, 4097, 4096)]), "of which 4097 are needed"),
        (lambda r, p: _C.reader_submit(r, 0, 1, [(*p[:6], 4096, 0, 4096)]), "of which 0 are needed"),
    ],
)
def test_arguments_that_cannot_be(call: Callable[[object, Sequence[int]], object], message: str) -> None:
    part = (0, 0, 0, 0, 0, 0, 4096, 4096, 4096)
    with pytest.raises(ValueError, match=message):
        call(_C.reader_open(2, 1, _C.busy_clock()), part)


def test_capsules_are_not_mixed_up() -> None:
    with pytest.raises(TypeError, match=r"moert\.record is wanted"):
        _C.record_state(_C.busy_clock())
    with pytest.raises(TypeError, match=r"moert\.reader is wanted"):
        _C.reader_totals(object())
