"""A CPU and a disk that are only numbers: the time that the engine's own steps would take on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import thread_time
from typing import Any, cast

import torch

from moert.errors import MoertError
from moert.residency import Residency
from moert.runtime.fused import FusedExperts
from moert.runtime.layer import Fetch, LayerCache, LayerSpec, Weights
from moert.schedule import Costs
from moert.tiers.disk import Priority, ReadHandle
from moert.tiers.native_reads import PIECE_BYTES, guess_lanes
from moert.types import ExpertId


class VirtualRead:
    """A read's handle, as the engine's steps use one (`ReadHandle`); waiting for it lets time pass."""

    def __init__(self, machine: VirtualMachine, seconds: float, nbytes: int, priority: Priority) -> None:
        self._machine = machine
        self._nbytes = nbytes
        self.read_s = seconds
        self.chunks = max(1, round(nbytes / PIECE_BYTES))
        self.begun = self.ended = 0
        """Of the chunks."""
        self.priority = priority
        self.ready = False
        self.is_given_up = False
        self.native: object | None = None

    @property
    def chunk_s(self) -> float:
        """Each of them takes so long."""
        return self.read_s / self.chunks

    @property
    def wasted(self) -> int:
        """Bytes that were read for nothing."""
        return self._nbytes * self.ended // self.chunks if self.is_given_up and self.ready else 0

    def end_chunk(self) -> None:
        """One more has been read."""
        self.ended += 1
        self.ready = self.ended == (self.begun if self.is_given_up else self.chunks)

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        """Until it is over."""
        self._machine.wait_for(self)
        if self.is_given_up:
            raise MoertError("this read was given up")
        return ()

    def cancel(self) -> bool:
        """Take it back if nothing of it has been begun."""
        return not self.begun and self.give_up()

    def give_up(self) -> bool:
        """Begin no more of it; False if there is no more."""
        if self.begun == self.chunks:
            return False
        self.is_given_up = True
        self.ready = self.ended == self.begun
        return True

    def promote(self, priority: Priority = Priority.DEMAND) -> bool:
        """Raise it to a class, given up or not; False if nothing of it is left to begin, or not of a lower class."""
        if self.ready or self.begun == self.chunks or (self.priority <= priority and not self.is_given_up):
            return False
        self.priority, self.is_given_up = priority, False
        self._machine.line_up(self)
        return True


class VirtualMachine:
    """Its clock, a CPU that does what it is told, and a disk that reads beside it.

    Both slow each other down as far as the costs say (`moert.schedule.makespan` has the same rules). As many chunks
    have been begun as the disk has lanes, half of them at most of what nobody waits for; they share its bandwidth, and
    here one ends after the other, which moves as many bytes in the same time. Others begin in the order of priority.
    """

    def __init__(self, lanes: int) -> None:
        """`lanes` chunks at once."""
        self.now = 0.0
        """Seconds."""
        self.disk_s = 0.0
        """That the disk was busy."""
        self.thought_s = 0.0
        """Of the time, what passed in `thinking`."""
        self._lanes = lanes
        self.guesses = guess_lanes(lanes)
        """Of them, for what nobody waits for."""
        self._begun: list[VirtualRead] = []
        """Of each chunk that has been, its record."""
        self._left_s = 0.0
        """Of the first of them."""
        self._queue: list[VirtualRead] = []
        self._thinks_since: float | None = None

    def clock(self) -> float:
        """For whoever asks for the time."""
        thinks_s = 0.0 if self._thinks_since is None else thread_time() - self._thinks_since
        return self.now + thinks_s

    def submit(self, seconds: float, start_s: float, nbytes: int, priority: Priority) -> VirtualRead:
        """A read that takes so long, and `start_s` more if nothing is being read; returns at once."""
        read = VirtualRead(self, seconds, nbytes, priority)
        is_idle = not self._begun
        self.line_up(read)
        if is_idle:
            self._left_s += start_s
        return read

    def line_up(self, read: VirtualRead) -> None:
        """Behind all that are as urgent."""
        if read in self._queue:
            self._queue.remove(read)
        self._queue.append(read)
        self._fill()

    def work(self, seconds: float, cpu_slowdown: float = 1.0, read_slowdown: float = 1.0) -> None:
        """The CPU works for so long, longer by `cpu_slowdown` while something is being read, and reads go on."""
        left = seconds
        while left > 0:
            if not self._begun:
                self.now += left
                return
            passed = min(left * cpu_slowdown, self._left_s * read_slowdown)
            # What is done first has nothing left, whatever rounding says.
            left = 0.0 if left * cpu_slowdown <= passed else left - passed / cpu_slowdown
            read_left = 0.0 if self._left_s * read_slowdown <= passed else self._left_s - passed / read_slowdown
            self._pass(passed, read_left)

    def wait_for(self, read: VirtualRead) -> None:
        """The CPU does nothing until it is over."""
        while not read.ready:
            self._pass(self._left_s, 0.0)

    @contextmanager
    def thinking(self, seconds: float | None = None) -> Iterator[None]:
        """What happens within takes `seconds`; None: as long as it really does on a CPU of its own."""
        begun = thread_time()
        self._thinks_since = begun if seconds is None else None
        try:
            yield
        finally:
            took_s = thread_time() - begun if seconds is None else seconds
            self._thinks_since = None
            self.thought_s += took_s
            self.work(took_s)

    def _pass(self, seconds: float, left_s: float) -> None:
        self.now += seconds
        self.disk_s += seconds
        self._left_s = left_s
        if not left_s:
            self._begun.pop(0).end_chunk()
            self._left_s = self._begun[0].chunk_s if self._begun else 0.0
            self._fill()

    def _fill(self) -> None:
        while len(self._begun) < self._lanes:
            self._queue = [read for read in self._queue if not read.is_given_up and read.begun < read.chunks]
            first = min(self._queue, key=lambda read: read.priority, default=None)
            guesses = sum(read.priority is not Priority.DEMAND for read in self._begun)
            if first is None or (first.priority is not Priority.DEMAND and guesses >= self.guesses):
                return
            first.begun += 1
            self._begun.append(first)
            if len(self._begun) == 1:
                self._left_s = first.chunk_s


class _Kernels:
    """In the place of a layer's fused kernels: they compute nothing, and take their time for it."""

    def __init__(self, machine: VirtualMachine, costs: Costs) -> None:
        self._machine = machine
        self._costs = costs
        self._begun = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._begun = self._machine.now

    def end(self) -> None:
        """A step is over, but for adding up."""
        self._machine.work(self._costs.merge_s)

    def run(
        self,
        hidden: torch.Tensor,
        experts: Sequence[Any],
        tokens: Sequence[torch.Tensor | None],
        weights: Sequence[torch.Tensor | None],
        out: torch.Tensor,
        **_: Any,
    ) -> None:
        """As `ExpertFfn.run`."""
        self._take([len(hidden) if some is None else len(some) for some in tokens])

    def run_token(
        self, hidden: torch.Tensor, experts: Sequence[Any], places: Sequence[int], weights: torch.Tensor
    ) -> torch.Tensor:
        """As `ExpertFfn.run_token`."""
        self._take([1] * len(experts))
        return torch.zeros_like(hidden)

    def _take(self, tokens: Sequence[int]) -> None:
        costs, machine = self._costs, self._machine
        machine.work(max(0.0, self._begun + costs.cpu_start_s - machine.now))
        for n in tokens:
            machine.work(costs.cpu_s(n), costs.cpu_slowdown, costs.read_slowdown)


class _Fused:
    def __init__(self, ffn: _Kernels) -> None:
        self.ffn = ffn


class VirtualLayer(LayerCache):
    """A layer whose experts have sizes and costs, and no weights."""

    def __init__(
        self,
        index: int,
        name: str,
        num_experts: int,
        top_k: int,
        residency: Residency,
        machine: VirtualMachine,
        costs: Costs,
        expert_bytes: int,
    ) -> None:
        self._kernels = _Kernels(machine, costs)
        fused = cast("FusedExperts", _Fused(self._kernels))
        super().__init__(LayerSpec(index, name, num_experts, (), top_k, fused=fused), residency)
        self.costs = costs
        self.reads = 0
        """Started so far."""
        self._machine = machine
        self._record_bytes = expert_bytes
        self._read_s = costs.read_s

    def step(self, missing: Sequence[ExpertId], run: Callable[[], object]) -> None:
        """Call `run`, which runs a step of this layer that needs these experts, which are not resident."""
        costs, misses = self.costs, len(missing)
        self._read_s = costs.each_read_s(misses)
        asked = sum(expert not in self.residency.arriving for expert in missing)
        self._machine.work(costs.lead_s(misses, asked), costs.cpu_slowdown, costs.read_slowdown)
        self._kernels.begin()
        run()
        self._kernels.end()

    def weights(self, expert: int) -> Weights:
        return {}

    def fused_expert(self, expert: int) -> Any:
        return None

    def fused_experts(self, experts: Sequence[ExpertId]) -> list[Any]:
        return [None] * len(experts)

    def read_bytes(self, expert: int) -> int:
        return self._record_bytes

    def begun_bytes(self, expert: int) -> int:
        return min(self._record_bytes, self._machine.guesses * PIECE_BYTES)

    def _can_submit(self, others: int = 0) -> bool:
        return True

    def _submit(self, places: Sequence[tuple[int, int]], priority: Priority) -> list[Fetch]:
        self.reads += len(places)
        if priority is not Priority.DEMAND:
            # What is asked for in time is no less work, but the disk may have something to do meanwhile.
            costs = self.costs
            self._machine.work(costs.miss_s * len(places), costs.cpu_slowdown, costs.read_slowdown)
        reads = [
            self._machine.submit(self._read_s, self.costs.read_start_s, self._record_bytes, priority) for _ in places
        ]
        return [Fetch(cast("ReadHandle", read), self._record_bytes) for read in reads]
