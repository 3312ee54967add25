"""Records whose reads are worked out once and submitted together, against the files' own bytes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_support import await_native, unreadable

from moert import _C
from moert.errors import MoertError
from moert.runtime.staging import StagingPool
from moert.tiers import shard_file
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import (
    BLOCK_BYTES,
    Buffer,
    DiskReader,
    PlannedRead,
    Priority,
    ReadHandle,
    ReadPlan,
    ShardFile,
    Window,
    window_bytes,
)
from moert.tiers.native_reads import NativeHandle
from moert.tiers.thread_reads import ThreadHandle

MIB = 1 << 20
SIZE = 8 * MIB + 1234
SLOT_BYTES = 4 * MIB
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def slots() -> Iterator[SlotBank]:
    arena = HostArena(8 * SLOT_BYTES)
    yield SlotBank(arena, 0, SLOT_BYTES, 8)
    arena.close()


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    path = tmp_path_factory.mktemp("planned") / "shard.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[ShardFile]:
    with ShardFile(path) as file:
        if not file.direct:
            pytest.skip("this file system has no O_DIRECT")
        yield file
        assert file._readers == 0, "somebody has not said that he is done with it"


def buffer(slots: SlotBank, slot: int) -> Buffer:
    return Buffer(slots.slot(slot), slots.address(slot))


def plan_of(file: ShardFile, *ranges: tuple[int, int], moves: object | None = None) -> ReadPlan:
    """Of these (offset, nbytes), one after the other in the buffer."""
    windows, end = [], 0
    for offset, nbytes in ranges:
        windows.append(Window(file, offset, nbytes, end))
        end += window_bytes(offset, nbytes)
    return ReadPlan(windows, moves)


def holds(content: bytes, plan: ReadPlan, memory: memoryview, starts: Sequence[int]) -> bool:
    return all(
        memory[window.position + start :][: window.nbytes] == content[window.offset : window.offset + window.nbytes]
        for window, start in zip(plan.windows, starts, strict=True)
    )


ranges = st.integers(1, 3 * MIB // 2).flatmap(lambda n: st.tuples(st.integers(0, SIZE - n), st.just(n)))


@settings(max_examples=40)
@given(records=st.lists(st.lists(ranges, min_size=1, max_size=2), min_size=1, max_size=4), twice=st.booleans())
def test_any_records_have_the_files_bytes(
    records: list[list[tuple[int, int]]], twice: bool, path: Path, content: bytes, slots: SlotBank
) -> None:
    with ShardFile(path) as file, DiskReader(3) as reader:
        plans = [plan_of(file, *record) for record in records]
        for first in (0, 4) if twice else (0,):
            wanted = [PlannedRead(plan, buffer(slots, first + i)) for i, plan in enumerate(plans)]
            natives = [plan.native for plan in plans]
            handles = reader.submit_planned(wanted, Priority.DEMAND)
            for i, (plan, handle) in enumerate(zip(plans, handles, strict=True)):
                assert not file.direct or isinstance(handle, NativeHandle)
                starts = handle.wait(PATIENCE_S)
                assert starts == tuple(offset % BLOCK_BYTES for offset, _ in records[i])
                assert holds(content, plan, slots.slot(first + i), starts)
                assert handle.read_s > 0
            assert first == 0 or [plan.native for plan in plans] == natives, "worked out once"
        assert file._readers == 0
        totals = reader.totals()
        times = 2 if twice else 1
        assert totals.records == times * len(records)
        assert totals.bytes_read == times * sum(nbytes for record in records for _, nbytes in record)


def test_classes_are_as_of_single_reads(file: ShardFile, slots: SlotBank) -> None:
    with DiskReader(2) as reader:
        _C.reader_set_lanes(reader._reads.native._reader, file.identity.device, 0, 0)
        wanted = [PlannedRead(plan_of(file, (0, MIB)), buffer(slots, i)) for i in range(2)]
        handles = [*reader.submit_planned(wanted, Priority.PREFETCH), *reader.submit_planned(wanted[:1])]
        assert [handle.priority for handle in handles] == [Priority.PREFETCH] * 2 + [Priority.DEMAND]
        assert [handle.promote() for handle in handles] == [True, True, False]
        with pytest.raises(TimeoutError, match="1048576 bytes is not done"):
            handles[0].wait(0.01)
        assert handles[0].cancel()
        assert handles[1].give_up()
        for handle in handles[:2]:
            with pytest.raises(MoertError, match="cancelled"):
                handle.wait(PATIENCE_S)


def test_moves_follow_the_reads(file: ShardFile, content: bytes, slots: SlotBank) -> None:
    moves = _C.moves([(3, 3, 1, 1000, 77, 0, 1, 64, 0)])
    called: list[object] = []
    with DiskReader(2) as reader:
        wanted = PlannedRead(plan_of(file, (77, 1000), moves=moves), buffer(slots, 0), buffer(slots, 1), called.append)
        (handle,) = reader.submit_planned([wanted])
        assert handle.wait(PATIENCE_S) == (77,)
        assert slots.slot(1)[64:1064] == content[77:1077]
        assert called == []
        slots.slot(1)[64:1064] = bytes(1000)
        with unreadable(file):
            (handle,) = reader.submit_planned([wanted])
            await_native(handle)
        assert handle.wait(PATIENCE_S) == (77,)
        assert holds(content, wanted.plan, slots.slot(0), (77,))
        assert called == [(77,)], "Python has read it, and finishes it"
        assert slots.slot(1)[64:1064] == bytes(1000)


def test_what_takes_more_than_reading_is_for_python(file: ShardFile, content: bytes, slots: SlotBank) -> None:
    finished: list[object] = []
    plain, looked_at = plan_of(file, (5, 100)), plan_of(file, (7, 100))
    with DiskReader(2) as reader:
        wanted = [
            PlannedRead(plain, buffer(slots, 0)),
            PlannedRead(looked_at, buffer(slots, 1), finish=finished.append),
        ]
        handles = reader.submit_planned(wanted)
        assert [type(handle) for handle in handles] == [NativeHandle, ThreadHandle]
        assert [handle.wait(PATIENCE_S) for handle in handles] == [(5,), (7,)]
        assert finished == [(7,)]
        reader.submit_planned(wanted[:1])[0].wait(PATIENCE_S)
        shard_file._clear_direct(file._fd)
        file.direct = False
        (handle,) = reader.submit_planned(wanted[:1])
        assert type(handle) is ThreadHandle, "it was worked out for O_DIRECT"
        assert handle.wait(PATIENCE_S) == (5,)
    assert holds(content, plain, slots.slot(0), (5,))
    assert holds(content, looked_at, slots.slot(1), (7,))


def test_a_closed_file_or_reader(path: Path, slots: SlotBank) -> None:
    with ShardFile(path) as file, DiskReader(2) as reader:
        wanted = [PlannedRead(plan_of(file, (5, 100)), buffer(slots, i)) for i in range(2)]
        for handle in reader.submit_planned(wanted):
            handle.wait(PATIENCE_S)
        file.close()
        for handle in reader.submit_planned(wanted):
            with pytest.raises(MoertError, match=r"shard\.safetensors is closed"):
                handle.wait(PATIENCE_S)
        assert file._readers == 0
    with pytest.raises(MoertError, match="reader is closed"):
        reader.submit_planned(wanted)


def test_all_are_queued_or_none(file: ShardFile, slots: SlotBank, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, queued = DiskReader.submit_read, []
    begun = threading.Event()

    def finish(_: tuple[int, ...]) -> None:
        begun.set()
        time.sleep(0.2)

    def refuse_the_third(self: DiskReader, *args: object) -> ReadHandle:
        if len(queued) == 2:
            assert begun.wait(PATIENCE_S)
            raise RuntimeError("can't start new thread")
        queued.append(submit(self, *args))  # type: ignore[arg-type]
        return queued[-1]

    monkeypatch.setattr(DiskReader, "submit_read", refuse_the_third)
    with DiskReader(1) as reader:
        plan = plan_of(file, (0, MIB))
        wanted = [PlannedRead(plan, buffer(slots, i), finish=finish) for i in range(3)]
        with pytest.raises(RuntimeError, match="new thread"):
            reader.submit_planned(wanted)
        assert len(queued) == 2
        assert all(handle.ready for handle in queued), "nobody writes into the buffers any more"


PART = (0, 0, 0, 0, 0, 0, 8192, 8192)
PLAN = _C.read_plan(1, [(*PART, 4096)])
MOVED = _C.read_plan(1, [(*PART, 0)], _C.moves([(3, 3, 1, 1000, 77, 0, 1, 64, 0)]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: _C.read_plan(1, [(*PART, 5)]), ValueError, "place is 5"),
        (lambda r: _C.read_plan(1, [(*PART, -4096)]), (ValueError, OverflowError), "place"),
        (lambda r: _C.read_plan(1, [(*PART[:6], 8192, 4096, 0)]), ValueError, "of which 4096 are needed"),
        (lambda r: _C.read_plan(1, [], 7), TypeError, r"moert\.moves is wanted"),
        (lambda r: _C.reader_submit_plans(r, 3, []), ValueError, "class is 3"),
        (lambda r: _C.reader_submit_plans(r, 0, [(r, 4096, 4096)]), TypeError, r"moert\.read_plan is wanted"),
        (lambda r: _C.reader_submit_plans(r, 0, [(PLAN, 4096, 12287)]), ValueError, "12288 bytes .* into 12287"),
        (lambda r: _C.reader_submit_plans(r, 0, [(PLAN, 4097, 12288)]), ValueError, "in whole blocks"),
        (lambda r: _C.reader_submit_plans(r, 0, [(PLAN, 4096, 12288, 4096, 4096)]), ValueError, "if it is moved"),
        (lambda r: _C.reader_submit_plans(r, 0, [(MOVED, 4096, 8192)]), ValueError, "if it is moved"),
        (lambda r: _C.reader_submit_plans(r, 0, [(MOVED, 4096, 8192, 4096, 63)]), ValueError, "moves of 1077"),
        (lambda r: _C.reader_submit_plans(r, 0, [(MOVED, 4096, 8192, 4100, 4096)]), ValueError, "in whole blocks"),
    ],
)
def test_arguments_that_cannot_be(
    call: Callable[[object], object], error: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(_C.reader_open(2, 1, _C.busy_clock()))


def test_staging_buffers_are_made_once(slots: SlotBank) -> None:
    pool = StagingPool(slots)
    assert pool.can_acquire(8)
    assert not pool.can_acquire(9)
    first = pool.acquire()
    assert first.buffer.address == slots.address(first.index) == first.tensor.data_ptr()
    assert pool.can_acquire(7)
    assert not pool.can_acquire(8)
    first.release()
    assert pool.acquire() is first
