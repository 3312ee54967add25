"""What becomes of reads, threads and memory when a reader, a thread or a process ends."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disk_support
import pytest
from disk_support import PATIENCE_S, Disk, Gate, os_error, submit_block

from moert import _C
from moert.errors import MoertError, TransferError
from moert.tiers import thread_reads
from moert.tiers.arena import SlotBank
from moert.tiers.disk import BLOCK_BYTES, DiskReader, FileCalls, Priority, Read, ShardFile

arena, slots, gate = disk_support.arena, disk_support.slots, disk_support.gate
content, path = disk_support.content, disk_support.path
nothing_is_left_behind = disk_support.nothing_is_left_behind


class TestEnds:
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

    def test_a_forked_child_ends_though_another_thread_had_the_lock(self, path: Path) -> None:
        child = run_child(
            """
            held, let_go = threading.Event(), threading.Event()
            def hold():
                with reader._reads.threads._lock:
                    held.set()
                    let_go.wait()
            threading.Thread(target=hold, daemon=True).start()
            held.wait()
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                reader.close()
                sys.exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            let_go.set()
            print(code, handles[0].wait())
            """,
            path,
        )
        assert (child.returncode, child.stderr) == (0, "")
        assert child.stdout.replace("read ", "").splitlines() == ["0 (0,)"]

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
