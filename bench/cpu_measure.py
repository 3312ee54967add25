"""How the CPU expert benchmark takes time: contenders in turns, the machine's limits among them, rest in between."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from cpu_layers import Pages, Step

from moert import _C

Job = Callable[[], torch.Tensor]

SAMPLE_BYTES = 400 << 20
REST_S = 0.005
LONGEST_REST_S = 0.5
IDLE = 0.1
LARGEST_OPERAND = 2048
QUICK_S = 0.005


class Contender(Protocol):
    """One implementation of a layer, with its weights in memory as often as the benchmark asked for."""

    name: str
    detail: str
    expert_bytes: float
    """What one expert takes up in its own format, scales included."""
    copies: int
    """How often its weights lie in memory."""

    def prepare(self, step: Step, copy: int) -> Job:
        """All that may happen before time is taken. The job runs the step on one copy and returns [T, hidden]."""
        ...

    def begin(self) -> None:
        """Called before each sample, outside of the time."""
        ...

    def close(self) -> None:
        """Give up the weights."""
        ...


@dataclass
class Sample:
    """Seconds a step, and the share of it that the process's threads waited for a core, all threads together."""

    seconds: float
    waited: float


@dataclass
class Cell:
    """All that was measured of one shape, format and batch."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)
    """Bytes a second, or operations a second, one number a round."""
    rest_s: float = 0.0
    """The longest that threads of some contender kept a core busy after their work."""


def run_queue_wait_s() -> float:
    """Seconds that this process's threads have been runnable without a core; 0 where the kernel does not say."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(path.read_text().split()[1])
    return total / 1e9


def settle() -> float:
    """Sleep until the threads of whoever ran last have stopped spinning; returns how long that took."""
    start = time.perf_counter()
    while True:
        before_s, before_cpu_s = time.perf_counter(), time.process_time()
        time.sleep(REST_S)
        used = (time.process_time() - before_cpu_s) / (time.perf_counter() - before_s)
        if used < IDLE or time.perf_counter() - start > LONGEST_REST_S:
            return time.perf_counter() - start


def steps_per_sample(step_bytes: float, jobs: int) -> int:
    """Enough steps to make a clock tick small, and too few to come back to an expert."""
    return max(1, min(jobs - 1, round(SAMPLE_BYTES / step_bytes)))


def take(jobs: list[Job], cursor: int, count: int) -> Sample:
    """One untimed step, to have threads and code ready as they are within a model, then `count` timed ones."""
    jobs[cursor % len(jobs)]()
    waited = run_queue_wait_s()
    start = time.perf_counter()
    for place in range(cursor + 1, cursor + 1 + count):
        jobs[place % len(jobs)]()
    seconds = time.perf_counter() - start
    return Sample(seconds / count, (run_queue_wait_s() - waited) / seconds)


class Limits:
    """What the machine can do, measured in turn with everything else."""

    def __init__(self, pages: Pages, threads: int) -> None:
        self._pages = pages
        self._places = {"2 MiB pages": (pages.arena.address, pages.arena.nbytes)}
        # Ordinary memory, as torch has it.
        self._plain = torch.zeros(min(pages.arena.nbytes, 1 << 30), dtype=torch.uint8)
        self._places["4 KiB pages"] = (self._plain.data_ptr(), self._plain.numel())
        self._threads = threads
        self._offset = 0
        # As large as is quick: without instructions for bf16 torch takes minutes for what is milliseconds with AMX.
        self._a = torch.randn(256, 256).bfloat16()
        while len(self._a) < LARGEST_OPERAND and 2 * len(self._a) ** 3 / self._multiply() < QUICK_S:
            self._a = self._a.repeat(2, 2)

    def probes(self) -> dict[str, Callable[[], float]]:
        """Named measurements, each a rate."""
        counts = sorted({1, self._threads})
        named: dict[str, Callable[[], float]] = {}
        for where in self._places:
            for count in counts:
                named[read_limit(count, where)] = lambda where=where, count=count: self._read(where, count)
        named["bf16 matmul by torch, operations/s"] = self._multiply
        return named

    def _read(self, where: str, threads: int) -> float:
        address, nbytes = self._places[where]
        span = min(nbytes, SAMPLE_BYTES)
        offset = self._offset % max(1, nbytes - span) // 4096 * 4096
        self._offset += span
        return span / _C.stream_read(address + offset, span, threads, 1)

    def _multiply(self) -> float:
        torch.mm(self._a, self._a)
        start = time.perf_counter()
        torch.mm(self._a, self._a)
        return 2 * float(self._a.shape[0]) ** 3 / (time.perf_counter() - start)


def read_limit(threads: int, where: str = "2 MiB pages") -> str:
    """The name of a limit in bytes a second."""
    return f"read, {threads} thread{'s' * (threads > 1)}, {where}, B/s"


def rounds(
    jobs: dict[str, list[Job]],
    begin: dict[str, Callable[[], None]],
    step_bytes: dict[str, float],
    limits: Limits,
    count: int,
    draw: random.Random,
    say: Callable[[str], None],
) -> Cell:
    """`count` rounds, each in an order of its own.

    All contenders share one cursor over the sets of experts, so that one that shares its weights' memory with another
    never finds in the cache what the other has just read.
    """
    cell = Cell()
    probes = limits.probes()
    for turn in _turns(count, [*jobs, *probes], draw):
        cursor = turn.cursor
        for name in turn.order:
            say(f"round {turn.number + 1} of {count}: {name}")
            cell.rest_s = max(cell.rest_s, settle())
            if name in probes:
                cell.limits.setdefault(name, []).append(probes[name]())
                continue
            begin[name]()
            steps = steps_per_sample(step_bytes[name], len(jobs[name]))
            cell.samples.setdefault(name, []).append(take(jobs[name], cursor, steps))
            cursor += steps + 1
    return cell


@dataclass
class _Turn:
    number: int
    order: list[str]
    cursor: int


def _turns(count: int, names: list[str], draw: random.Random) -> Iterator[_Turn]:
    for number in range(count):
        yield _Turn(number, draw.sample(names, len(names)), draw.randrange(1 << 20))
