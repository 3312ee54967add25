"""An interrupt (Ctrl-C) at whatever line of the bookkeeping: what is resident is right, and work goes on."""

from __future__ import annotations

import functools
import linecache
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from fault_support import LAYERS, ROUTING, E, Experts, check_books, right, step
from faulty_disk import PATIENCE_S, FaultyDisk

from moert.config import parse_budget
from moert.runtime.runtime import OffloadRuntime
from moert.types import ExpertId

pytestmark = pytest.mark.timeout(120)


class Interrupter:
    """Raises KeyboardInterrupt before the n-th line that the bookkeeping executes, as a signal may."""

    BOOKS = (os.sep + os.path.join("moert", "runtime") + os.sep, os.path.join("moert", "residency.py"))

    def __init__(self, line: int) -> None:
        self.left = line

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in self.BOOKS):
            return None
        if event == "line" and not self.is_atomic(frame):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace

    @staticmethod
    def is_atomic(frame: FrameType) -> bool:
        """Whether the interpreter traces the line but handles no signal there: on the way in and out of a lock."""
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        return line == "try:" or (line.startswith("with ") and line.endswith("_lock:"))

    def run(self, action: Callable[[], object]) -> bool:
        """Whether the action got to its end."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            action()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


@pytest.mark.parametrize("what", ["step", "prefetch", "weights", "resize"])
def test_an_interrupt_at_any_line_loses_no_more_than_time(what: str, tmp_path: Path) -> None:
    experts, disk = Experts(tmp_path), FaultyDisk()
    want = {layer: right(experts, layer) for layer in LAYERS}
    sizes = [parse_budget(size, "") for size in ("34%", "100%", "67%")]
    uses: dict[str, Callable[[OffloadRuntime, int], object]] = {
        "step": lambda runtime, turn: step(runtime, turn % 4, [[turn % E, (turn + 1) % E], [5, 2]]),
        "prefetch": lambda runtime, turn: runtime.prefetch([ExpertId(turn % 4, e) for e in (turn % E, (turn + 3) % E)]),
        "weights": lambda runtime, turn: runtime.weights(turn % 4, turn * 5 % E),
        "resize": lambda runtime, turn: runtime.resize(sizes[turn % 3]),
    }
    with experts.runtime(disk, host_memory="50%") as runtime:
        line = turn = uninterrupted = 0
        # Some turns are short, for what they ask for is there already.
        while uninterrupted < 10:
            line += 2
            turn += 1
            # Something is on its way already.
            runtime.prefetch([ExpertId(layer, (turn + 2) % E) for layer in LAYERS])
            uninterrupted += Interrupter(line).run(functools.partial(uses[what], runtime, turn))
            layer = turn % 4
            assert torch.equal(step(runtime, layer, ROUTING), want[layer]), f"interrupted at line {line}"
            check_books(runtime, experts)
        assert turn > 20
        for layer in LAYERS:
            assert torch.equal(step(runtime, layer, ROUTING), want[layer])
        check_books(runtime, experts)


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_signal_while_a_step_waits(layer: int, error: type[BaseException], tmp_path: Path) -> None:
    """Its reads still write into their slots then, which are nobody else's until they are over."""
    experts, disk = Experts(tmp_path), FaultyDisk()

    raised = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not raised.is_set():
            raised.set()
            raise error

    def interrupt() -> None:
        disk.wait_held(1)
        # One that comes just before the thread falls asleep does not wake it.
        while not raised.wait(0.01):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with experts.runtime(disk, host_memory="34%") as runtime:
            for _ in range(3):
                disk.hold()
                raised.clear()
                thread = threading.Thread(target=interrupt)
                thread.start()
                with pytest.raises(error):
                    step(runtime, layer, ROUTING)
                thread.join(PATIENCE_S)
                disk.release()
                assert torch.equal(step(runtime, layer, ROUTING), right(experts, layer))
                check_books(runtime, experts)
                step(runtime, layer, [[2, 5]])
            assert runtime.layers[layer].stats.failed_prefetches == 0, "an interrupt is no failure of the disk"
    finally:
        signal.signal(signal.SIGUSR1, before)
