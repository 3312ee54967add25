"""What becomes of records, memory and the extension's threads when a handle, a reader or a process ends."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import disk_support
import native_support
import pytest
from native_support import MIB, PATIENCE_S, WHOLE, set_lanes, state, submit, until
from own_threads import check_no_disk_threads

from moert import _C
from moert.errors import MoertError
from moert.tiers import reader
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import DiskReader, Read, ShardFile

arena, slots = native_support.arena, native_support.slots
content, path, file = native_support.content, native_support.path, native_support.file
nothing_is_left_behind = disk_support.nothing_is_left_behind


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
