"""Records that the extension's threads read; `test_tiers_disk.py` has what Python's threads do."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import disk_support
import native_support
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_support import (
    FAILED,
    MIB,
    PATIENCE_S,
    SIZE,
    SLOT_BYTES,
    UNDER_WAY,
    set_lanes,
    state,
    submit,
    unreadable,
    until,
)
from own_threads import disk_threads

from moert import _C
from moert.errors import CorruptFileError, MoertError, TransferError
from moert.tiers import shard_file
from moert.tiers.arena import SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, FileCalls, Priority, Read, ShardFile
from moert.tiers.native_reads import NativeHandle
from moert.tiers.thread_reads import ThreadHandle

arena, slots = native_support.arena, native_support.slots
content, path, file = native_support.content, native_support.path, native_support.file
nothing_is_left_behind = disk_support.nothing_is_left_behind

ROOT = Path(__file__).resolve().parent.parent


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
