from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import disk_support
import pytest
from disk_support import PATIENCE_S, SIZE, SLOT_BYTES, Disk, Gate, os_error, submit_block

from moert.errors import MoertError, TransferError
from moert.tiers.arena import SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, FileCalls, Priority, Read, ShardFile, measure_read_bandwidth

arena, slots, gate = disk_support.arena, disk_support.slots, disk_support.gate
content, path = disk_support.content, disk_support.path
nothing_is_left_behind = disk_support.nothing_is_left_behind


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

    def test_what_is_raised_goes_to_its_class(self, path: Path, slots: SlotBank, gate: Gate) -> None:
        with ShardFile(path, calls=FileCalls(preadv=gate.preadv)) as file, DiskReader(1) as reader:
            handles = [submit_block(reader, file, 0, slots)]
            gate.wait_begun(1)
            kinds = [Priority.PREFETCH, Priority.PREFETCH, Priority.PROMOTION, Priority.DEMAND]
            handles += [submit_block(reader, file, 1 + i, slots, kind) for i, kind in enumerate(kinds)]
            assert handles[2].promote(Priority.PROMOTION)
            assert handles[2].priority is Priority.PROMOTION
            assert not any(handles[i].promote(Priority.PROMOTION) for i in (2, 3, 4))
            gate.open()
            for handle in handles:
                handle.wait(PATIENCE_S)
        assert [offset // BLOCK_BYTES for offset in gate.begun] == [0, 4, 3, 2, 1]

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
