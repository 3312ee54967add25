"""A device that is none: bytes move in host memory, over a link as fast as it is told, and every access is checked."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from moert.config import format_bytes
from moert.device.base import (
    CaptureError,
    Device,
    DeviceLostError,
    DeviceMemory,
    Event,
    Graph,
    Lease,
    OutOfDeviceMemoryError,
    PinningRefusedError,
    Stream,
)
from moert.device.ledger import Ledger
from moert.device.tape import Tape
from moert.device.threaded import Threads
from moert.device.virtual import VirtualTime
from moert.device.work import Done, Engine, Lane, Link, Work
from moert.tiers.read import Priority

POISON = 0xFF
"""NaN in bf16, fp16 and fp32, wherever nothing is to be read."""

_NAMES = {Priority.DEMAND: "demand", Priority.PROMOTION: "promotion", Priority.PREFETCH: "prefetch"}


@dataclass(frozen=True)
class Machine:
    """What a simulated device is like."""

    total_bytes: int = 1 << 40
    up_bytes_per_s: float = 0.0
    """From host to device; 0: it takes no time."""
    down_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    """Of each copy, on top."""
    launch_s: float = 0.0
    """Of each launch."""
    sync_s: float = 0.0
    """Of each wait of the host's, on top."""
    lockable_bytes: int | None = None
    """How much host memory may be page-locked; None: all of it."""
    reads_host: bool = True
    """See `Device.reads_host`."""


class SimulatedDevice(Device):
    """Streams that do their work on threads, or in virtual time, in host memory.

    What a GPU would let pass and compute garbage from raises here: a slot that is read before its bytes are there or
    after they have gone, a copy from memory that is not page-locked. Slots are full of NaN while they are filled. What
    goes wrong in a stream is raised by the next call that waits, as SlotAccessError, or as whatever a launch raised.

    `others_bytes` is memory that somebody else has taken meanwhile; `lose` is the end of it all.
    """

    def __init__(
        self,
        machine: Machine | None = None,
        *,
        virtual: bool = False,
        name: str = "simulated",
        beside: SimulatedDevice | None = None,
    ) -> None:
        """`beside`: one of the same computer, so that what is page-locked for either is so for both."""
        self.name = name
        self.torch_device = torch.device("cpu")
        self.machine = machine or Machine()
        self.reads_host = self.machine.reads_host
        self.ledger = Ledger()
        self.others_bytes = 0
        self.used_bytes = 0
        self.locked_bytes = 0
        self.up, self.down = Link("up"), Link("down")
        self._engine: Engine = VirtualTime(self) if virtual else Threads(self)
        self._numbers = itertools.count()
        self._locked: dict[int, int] = {} if beside is None else beside._locked
        self._own: dict[int, int] = {}
        self._closed = False
        self._captured: _CapturedStream | None = None
        self._compute = _SimulatedStream(self, self._engine.add_lane("compute", 0), None)
        self.copies: dict[Priority, Stream] = {
            priority: _SimulatedStream(self, self._engine.add_lane(name, priority), self.up)
            for priority, name in _NAMES.items()
        }
        self.back = _SimulatedStream(self, self._engine.add_lane("back", 0), self.down)

    @property
    def compute(self) -> Stream:
        return self._captured or self._compute

    def capture(self, work: Callable[[], object]) -> Graph:
        self.synchronize()
        used, tape = self.used_bytes, Tape()
        self._captured = _CapturedStream()
        try:
            tape.record(work)
        finally:
            self._captured = None
        assert self.used_bytes <= used, "a graph that takes slots"
        return _SimulatedGraph(self, tape)

    @property
    def is_lost(self) -> bool:
        return isinstance(self._engine.failure, DeviceLostError)

    @property
    def memory(self) -> DeviceMemory:
        self.check()
        total = self.machine.total_bytes
        return DeviceMemory(max(0, total - self.used_bytes - self.others_bytes), total)

    def now(self) -> float:
        return self._engine.now()

    def sleep(self, seconds: float) -> None:
        """The host does something that takes so long."""
        self._engine.sleep(seconds)

    def lose(self, why: str = "it fell off the bus") -> None:
        """From here on it answers nothing."""
        self._engine.fail(
            DeviceLostError(f"the device {self.name!r} was lost in mid-run ({why}); load the model again")
        )

    def change(self, **machine: float) -> None:
        """Be another machine from here on."""
        self.machine = replace(self.machine, **machine)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        if self._engine.failure is not None:
            raise self._engine.failure

    def allocate(self, nbytes: int) -> torch.Tensor:
        free = self.memory.free_bytes
        if nbytes > free:
            raise OutOfDeviceMemoryError(
                f"{format_bytes(nbytes)} on the device {self.name!r} cannot be had: {format_bytes(free)} of "
                f"{format_bytes(self.machine.total_bytes)} are free"
            )
        with torch.inference_mode(False):
            memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self.used_bytes += nbytes
        weakref.finalize(memory.untyped_storage(), self._freed, nbytes).atexit = False
        return memory

    def _freed(self, nbytes: int) -> None:
        self.used_bytes -= nbytes

    def allocate_pinned(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.page_lock(memory.data_ptr(), memory.nbytes)
        weakref.finalize(memory.untyped_storage(), self._locked_freed, memory.data_ptr()).atexit = False
        return memory

    def _locked_freed(self, address: int) -> None:
        self.locked_bytes -= self._locked.pop(address, 0)

    def page_lock(self, address: int, nbytes: int) -> None:
        limit = self.machine.lockable_bytes
        if limit is not None and self.locked_bytes + nbytes > limit:
            raise PinningRefusedError(
                f"{format_bytes(nbytes)} cannot be page-locked: {format_bytes(self.locked_bytes)} of "
                f"{format_bytes(limit)} are already"
            )
        assert address not in self._locked, "locked twice"
        self._locked[address] = nbytes
        self.locked_bytes += nbytes

    def page_unlock(self, address: int) -> None:
        self.locked_bytes -= self._locked.pop(address, 0)

    def is_locked(self, tensor: torch.Tensor) -> bool:
        """Whether all of it lies in page-locked memory."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = begin
        for address, nbytes in sorted(self._locked.items()):
            if address <= at < address + nbytes:
                at = address + nbytes
        return at >= end

    def join(self, event: Event) -> None:
        event.wait()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._captured is not None:
            raise CaptureError("a copy into host memory waits for the device, which a graph cannot do")
        event = self._compute.record()
        event.wait()
        return tensor.clone()

    def synchronize(self) -> None:
        self._engine.drain()
        self.check()

    def close(self) -> None:
        if not self._closed:
            self._engine.drain()
            self._engine.close()
        self._closed = True
        self._locked.clear()
        self.locked_bytes = 0

    def begin(self, work: Work) -> None:
        """For the engine."""
        self.ledger.begin(work.reads, work.writes)

    def end(self, work: Work) -> None:
        """For the engine."""
        self.ledger.end(work.reads, work.writes, is_ready=work.fills)

    def submit(self, lane: Lane, action: Callable[[], object], seconds: float, **details: object) -> Done:
        """For the streams."""
        self.check()
        prepare = details.pop("prepare", None)
        details["prepare"] = None if prepare is None else _in_mode(prepare)  # type: ignore[arg-type]
        work = Work(lane, next(self._numbers), _in_mode(action), seconds, **details)  # type: ignore[arg-type]
        self._engine.submit(work)
        return work.done

    def is_done(self, done: Done) -> bool:
        """For the events."""
        self.check()
        is_done = self._engine.is_done(done)
        self.check()
        return is_done

    def wait_for(self, done: Done) -> None:
        """For the events."""
        self._engine.wait(done)
        self.check()
        self._engine.sleep(self.machine.sync_s)


class _SimulatedEvent(Event):
    def __init__(self, device: SimulatedDevice, done: Done) -> None:
        self.device, self.done = device, done

    @property
    def ready(self) -> bool:
        return self.device.is_done(self.done)

    def wait(self) -> None:
        self.device.wait_for(self.done)


class _SimulatedStream(Stream):
    def __init__(self, device: SimulatedDevice, lane: Lane, link: Link | None) -> None:
        self._device, self._lane, self._link = device, lane, link
        self._after: list[Done] = []

    def copy(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        *,
        writes: Lease | None = None,
        is_last: bool = True,
        pageable: bool = False,
    ) -> None:
        assert destination.shape == source.shape and destination.dtype == source.dtype, (destination, source)
        machine, seconds = self._device.machine, 0.0
        if self._link is not None:
            host = source if self._link is self._device.up else destination
            assert pageable or self._device.is_locked(host), "a copy of memory that is not page-locked"
            rate = machine.up_bytes_per_s if self._link is self._device.up else machine.down_bytes_per_s
            seconds = machine.latency_s + (source.nbytes / rate if rate else 0.0)
        self._submit(
            lambda: destination.copy_(source),
            seconds,
            link=self._link,
            nbytes=source.nbytes,
            prepare=lambda: _poison(destination),
            writes=writes,
            fills=is_last,
        )

    def fill(self, destination: torch.Tensor, byte: int, *, writes: Lease | None = None) -> None:
        self._submit(lambda: destination.fill_(byte), 0.0, writes=writes)

    def launch(self, work: Callable[[], object], reads: Sequence[Lease] = ()) -> None:
        self._submit(work, self._device.machine.launch_s, reads=tuple(reads))

    def wait(self, event: Event) -> None:
        assert isinstance(event, _SimulatedEvent)
        self._after.append(event.done)

    def record(self) -> Event:
        return _SimulatedEvent(self._device, self._submit(_nothing, 0.0))

    def _submit(self, action: Callable[[], object], seconds: float, **details: object) -> Done:
        after, self._after = tuple(self._after), []
        return self._device.submit(self._lane, action, seconds, after=after, **details)


class _CapturedStream(Stream):
    """The compute stream while work is captured: what it is given is noted by the tape."""

    def copy(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        *,
        writes: Lease | None = None,
        is_last: bool = True,
        pageable: bool = False,
    ) -> None:
        if writes is not None or pageable:
            raise CaptureError("slots are filled and pageable memory is copied by the host, not by a graph")
        destination.copy_(source)

    def fill(self, destination: torch.Tensor, byte: int, *, writes: Lease | None = None) -> None:
        if writes is not None:
            raise CaptureError("slots are filled by the host, not by a graph")
        destination.fill_(byte)

    def launch(self, work: Callable[[], object], reads: Sequence[Lease] = ()) -> None:
        if reads:
            raise CaptureError("what is in a slot when a graph is replayed is not known when it is captured")
        work()

    def wait(self, event: Event) -> None:
        if not isinstance(event, _CapturedEvent):
            raise CaptureError("an event of another stream is no part of the graph")

    def record(self) -> Event:
        return _CapturedEvent()


class _CapturedEvent(Event):
    @property
    def ready(self) -> bool:
        raise CaptureError("an event within a graph cannot be asked for")

    def wait(self) -> None:
        """Whatever comes after it in a graph does so."""


class _SimulatedGraph(Graph):
    def __init__(self, device: SimulatedDevice, tape: Tape) -> None:
        self._device, self._tape = device, tape

    def replay(self, reads: Sequence[Lease] = ()) -> None:
        self._device.compute.launch(self._tape.replay, reads)
        self._device.compute.record().wait()


def _in_mode(action: Callable[[], object]) -> Callable[[], object]:
    """It, in the modes of torch that its caller is in now, on whichever thread: a GPU's kernels know none."""
    return functools.partial(_run_in_mode, action, torch.is_inference_mode_enabled(), torch.is_grad_enabled())


def _run_in_mode(action: Callable[[], object], is_inference: bool, has_grad: bool) -> object:
    with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
        return action()


def _nothing() -> None:
    pass


def _poison(memory: torch.Tensor) -> None:
    memory.view(torch.uint8).fill_(POISON)
