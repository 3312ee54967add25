"""In which order the extension reads records, and how many at once."""

from __future__ import annotations

import random
import threading
import time

import disk_support
import native_support
import pytest
from native_support import MIB, PATIENCE_S, SIZE, set_lanes, submit
from own_threads import disk_threads

from moert import _C
from moert.errors import MoertError
from moert.tiers import native_reads
from moert.tiers.arena import SlotBank
from moert.tiers.depth import DEPTHS, START_DEPTH, DepthTuner
from moert.tiers.disk import DiskReader, Priority, Read, ShardFile

arena, slots = native_support.arena, native_support.slots
content, path, file = native_support.content, native_support.path, native_support.file
nothing_is_left_behind = disk_support.nothing_is_left_behind


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

    def test_what_is_given_up_is_taken_up_in_a_class(self, file: ShardFile, content: bytes, slots: SlotBank) -> None:
        with DiskReader(2) as reader:
            set_lanes(reader, file, 0)
            handle = submit(reader, file, slots.slot(0), 0, MIB, Priority.PREFETCH)
            assert not handle.promote(Priority.PREFETCH)
            assert handle.promote(Priority.PROMOTION)
            assert handle.priority is Priority.PROMOTION
            assert handle.give_up()
            assert not handle.promote(Priority.PREFETCH), "it was over at once"
            with pytest.raises(ValueError, match="class is 3"):
                _C.reader_promote(reader._reads.native._reader, handle._record, 3)

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
