"""What the runtime asks of a device: memory, streams of copies and launches, events, page-locked host memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from moert.errors import CapacityError, MoertError, TransferError
from moert.tiers.read import Priority


class OutOfDeviceMemoryError(CapacityError):
    """The device has no memory left for an allocation; what was allocated before is as it was."""


_OUT_OF_MEMORY = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory on a device, whoever asked the driver: torch's allocator, a library's handle, a graph
    or a kernel's code. Nothing else is wrong with the device then."""
    return isinstance(error, (OutOfDeviceMemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


class PinningRefusedError(TransferError):
    """The system does not let so much host memory be page-locked; what was locked before still is."""


class DeviceLostError(MoertError, RuntimeError):
    """The device does not answer any more. Nothing on it can be had; whoever used it has to make a new one."""


class CaptureError(MoertError, RuntimeError):
    """Work cannot be made a graph: it waits for the device, or moves what may only be moved once."""


class SlotAccessError(AssertionError):
    """A slot was read before its bytes were there or after they had gone, or written while somebody read it."""


class Lease(NamedTuple):
    """One filling of one slot: what a launch that reads it was promised to find there."""

    bank: int
    slot: int
    filling: int
    """How often the slot had been given to somebody, counted from 1."""


class DeviceMemory(NamedTuple):
    """What the driver says, in bytes; other processes' memory is in neither."""

    free_bytes: int
    total_bytes: int


class Event(ABC):
    """A place in a stream's order."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether all before it is done; does not block.

        Raises:
            DeviceLostError: the device is gone.
        """

    @abstractmethod
    def wait(self) -> None:
        """Block until all before it is done.

        Raises:
            DeviceLostError: the device is gone.
        """


class Stream(ABC):
    """Work that a device does in the order given, beside other streams. Every call returns at once.

    All of them raise DeviceLostError if the device is gone. Tensors belong to the work until an event after it is
    ready. `reads` and `writes` are for devices that check accesses; a GPU ignores them.
    """

    @abstractmethod
    def copy(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        *,
        writes: Lease | None = None,
        is_last: bool = True,
        pageable: bool = False,
    ) -> None:
        """Copy a contiguous tensor into another one of its shape and dtype.

        Args:
            writes: the slot that is filled.
            is_last: its bytes are all there after this copy; else more follow.
            pageable: the host's tensor is not page-locked, so the copy may block until it is done.
        """

    @abstractmethod
    def fill(self, destination: torch.Tensor, byte: int, *, writes: Lease | None = None) -> None:
        """Set every byte of uint8 `destination`; a slot that `writes` names is empty afterwards."""

    @abstractmethod
    def launch(self, work: Callable[[], object], reads: Sequence[Lease] = ()) -> None:
        """Have the device compute: `work` starts kernels on it, in this stream, and waits for none of them."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Whatever follows in this stream comes after `event`."""

    @abstractmethod
    def record(self) -> Event:
        """An event behind everything so far."""


class Graph(ABC):
    """Work that was captured once, kernels and copies in their order, to be done again and again on the same memory.

    It keeps the memory alive that the work took and gave.
    """

    @abstractmethod
    def replay(self, reads: Sequence[Lease] = ()) -> None:
        """Do it in the compute stream; returns at once. Python code of the captured work does not run.

        Args:
            reads: as of `Stream.launch`.

        Raises:
            DeviceLostError: the device is gone.
        """


class Device(ABC):
    """One GPU, or what stands for one. It owns its streams and the memory it has given out, until `close`.

    `copies` has a stream from host memory for each class of copies, `back` is the one into host memory. One thread at a
    time calls it, save for `is_lost`.
    """

    name: str
    torch_device: torch.device
    """Where tensors in its memory say they are."""
    copies: dict[Priority, Stream]
    back: Stream
    reads_host: bool
    """Whether its kernels can read page-locked host memory at the address that it has on the host."""

    @property
    @abstractmethod
    def compute(self) -> Stream:
        """The stream in which the caller's own kernels run now: what they wrote so far comes before its work, and so
        does what was started in the stream that was the caller's before, of whichever thread."""

    @abstractmethod
    def join(self, event: Event) -> None:
        """What the caller itself does with the device's tensors from here on comes after `event`."""

    @abstractmethod
    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a small tensor of the caller's in host memory; blocks until it is there."""

    @abstractmethod
    def capture(self, work: Callable[[], object]) -> Graph:
        """Note what `work` starts in the compute stream, and do nothing of it: tensors that it makes have their
        contents after a replay. Blocks. Everything that it launches must have run once before, and no other thread may
        use the compute stream meanwhile.

        Raises:
            CaptureError: the work cannot be captured; nothing of it has happened.
            OutOfDeviceMemoryError: there is not so much memory as it takes.
            DeviceLostError: the device is gone.
        """

    @property
    @abstractmethod
    def memory(self) -> DeviceMemory:
        """What is free now.

        Raises:
            DeviceLostError: the device is gone.
        """

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """1-D uint8 memory on the device, aligned to 256 bytes, of any contents; it is free when nobody has it.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
            DeviceLostError: the device is gone.
        """

    @abstractmethod
    def allocate_pinned(self, nbytes: int) -> torch.Tensor:
        """1-D uint8 page-locked host memory, free when nobody has it.

        Raises:
            PinningRefusedError: the system does not give so much.
        """

    @abstractmethod
    def page_lock(self, address: int, nbytes: int) -> None:
        """Page-lock host memory that is there, whole pages of it, so that copies from it run beside everything else.

        Raises:
            PinningRefusedError: the system does not let so much be locked; nothing has changed.
        """

    @abstractmethod
    def page_unlock(self, address: int) -> None:
        """Undo `page_lock`, if it was done; no copy may be under way. Also on a device that is lost."""

    @abstractmethod
    def now(self) -> float:
        """Seconds on the clock that copies and kernels are to be timed by."""

    @property
    @abstractmethod
    def is_lost(self) -> bool:
        """Whether it does not answer any more."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until every stream has done all its work.

        Raises:
            DeviceLostError: the device is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Do what is queued, then give everything back; a lost device gives back what it can. Idempotent."""
