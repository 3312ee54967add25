"""An NVIDIA GPU through torch: its streams, events, copies and memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

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
    is_out_of_memory,
)
from moert.errors import ConfigError, KernelUnavailableError, MoertError
from moert.tiers.read import Priority

_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every GPU, as a range cannot be locked once more for another one."""

_MAPPED = 2
"""cudaHostRegisterMapped: kernels may read it, which the other flag alone does not promise."""

LEAST_CAPABILITY = (8, 0)
"""The first with bf16, which the kernels are compiled for."""


class CudaDevice(Device):
    """One GPU. Kernels run in the caller's current stream; copies run in streams of their own, demands first."""

    def __init__(self, index: int = 0, cuda: Any = torch.cuda) -> None:
        """
        Args:
            index: torch's number of the GPU.
            cuda: `torch.cuda`, or what stands for it.

        Raises:
            ConfigError: there is no such GPU, no driver, or one that is too old for this torch.
            KernelUnavailableError: the GPU is too old for the kernels.
        """
        self._cuda = cuda
        _check_driver(cuda)
        if not 0 <= index < cuda.device_count():
            raise ConfigError(f"there is no CUDA device {index}: this machine has {cuda.device_count()}")
        capability = cuda.get_device_capability(index)
        self.name = f"{cuda.get_device_name(index)} ({index})"
        if tuple(capability) < LEAST_CAPABILITY:
            raise KernelUnavailableError(
                f"{self.name} is of compute capability {capability[0]}.{capability[1]}, which has no bf16; moert's "
                "kernels need 8.0 or newer: leave device_memory out to run the experts on the CPU"
            )
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self._lost: str | None = None
        self._locked: dict[int, int] = {}
        self._closed = False
        self._is_captured = False
        self._used: Any = None
        """The stream that was the caller's when `compute` was last asked for."""
        self.reads_host = _reads_host(index)
        with self.calls():
            # A lower number comes first.
            self.copies: dict[Priority, Stream] = {
                priority: _CudaStream(self, cuda.Stream(index, priority=-1 if priority is Priority.DEMAND else 0))
                for priority in Priority
            }
            self.back = _CudaStream(self, cuda.Stream(index, priority=-1))

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """Calls of torch within it raise this package's errors."""
        self.check()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, MoertError):
                raise
            if is_out_of_memory(error):
                raise OutOfDeviceMemoryError(f"{self.name} is out of memory: {_first_line(error)}") from error
            if self._is_captured or not _is_cuda_error(error):
                raise
            # What a kernel or copy did wrong shows in some later call, and every call after it fails as well.
            self._lost = _first_line(error)
            raise self._lost_error() from error

    def check(self) -> None:
        """Raise DeviceLostError if it is known to be lost."""
        if self._lost is not None:
            raise self._lost_error()

    def _lost_error(self) -> DeviceLostError:
        return DeviceLostError(f"{self.name} was lost in mid-run ({self._lost}); start the program and load again")

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    @property
    def compute(self) -> Stream:
        current = self._cuda.current_stream(self.index)
        if not self._is_captured and current != self._used:
            # Tables and rows are written to in the order of one stream, and threads may have one each.
            if self._used is not None:
                with self.calls():
                    event = self._cuda.Event()
                    event.record(self._used)
                    current.wait_event(event)
            self._used = current
        return _CudaStream(self, current)

    def join(self, event: Event) -> None:
        self.compute.wait(event)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        _ = self.compute  # what another stream has been told comes before
        with self.calls():
            return tensor.cpu()

    def capture(self, work: Callable[[], object]) -> Graph:
        self.synchronize()
        graph = self._cuda.CUDAGraph()
        self._is_captured = True
        try:
            # Other threads of the process may go on with the device: what they do is none of the graph's.
            with self._cuda.device(self.index), self._cuda.graph(graph, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfDeviceMemoryError(f"{self.name} is out of memory: {_first_line(error)}") from error
            # A call that no graph takes spoils the capture and nothing else; anything worse shows here.
            self._is_captured = False
            self.synchronize()
            raise CaptureError(f"{self.name} cannot make a graph of this: {_first_line(error)}") from error
        finally:
            self._is_captured = False
        return _CudaGraph(self, graph)

    @property
    def memory(self) -> DeviceMemory:
        with self.calls():
            free, total = self._cuda.mem_get_info(self.index)
            kept = self._cuda.memory_reserved(self.index) - self._cuda.memory_allocated(self.index)
        return DeviceMemory(free + max(0, kept), total)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self.calls(), torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def allocate_pinned(self, nbytes: int) -> torch.Tensor:
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            self._forget_error()
            raise PinningRefusedError(
                f"{format_bytes(nbytes)} of page-locked memory cannot be had: {_first_line(error)}"
            ) from error

    def page_lock(self, address: int, nbytes: int) -> None:
        self.check()
        # Or whichever GPU is the current one would get a context, which takes some hundred MiB of it.
        with self._cuda.device(self.index):
            code = int(self._cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE | _MAPPED))
        if code:
            self._forget_error()
            raise PinningRefusedError(f"the driver refuses to page-lock {format_bytes(nbytes)} (error {code})")
        self._locked[address] = nbytes

    def page_unlock(self, address: int) -> None:
        if self._locked.pop(address, None) is not None:
            with self._cuda.device(self.index):
                self._cuda.cudart().cudaHostUnregister(address)

    def _forget_error(self) -> None:
        """The driver keeps the last error for whoever looks next, which would be some kernel that has done nothing."""
        with contextlib.suppress(RuntimeError):
            torch.empty(1, dtype=torch.uint8, device=self.torch_device).fill_(0)

    def now(self) -> float:
        return perf_counter()

    def synchronize(self) -> None:
        with self.calls():
            self._cuda.synchronize(self.index)

    def close(self) -> None:
        if not self._closed and not self.is_lost:
            with contextlib.suppress(DeviceLostError):
                self.synchronize()
        self._closed = True
        for address in list(self._locked):
            with contextlib.suppress(RuntimeError):
                self.page_unlock(address)


class _CudaEvent(Event):
    def __init__(self, device: CudaDevice, event: Any) -> None:
        self.device, self.event = device, event

    @property
    def ready(self) -> bool:
        with self.device.calls():
            return bool(self.event.query())

    def wait(self) -> None:
        with self.device.calls():
            self.event.synchronize()


class _CudaStream(Stream):
    def __init__(self, device: CudaDevice, stream: Any) -> None:
        self._device, self._stream, self._cuda = device, stream, device._cuda

    def copy(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        *,
        writes: Lease | None = None,
        is_last: bool = True,
        pageable: bool = False,
    ) -> None:
        with self._device.calls(), self._cuda.stream(self._stream):
            destination.copy_(source, non_blocking=not pageable)
            if source.is_cuda:
                # It may be the caller's, whose memory torch would give to others before this stream has read it.
                source.record_stream(self._stream)

    def fill(self, destination: torch.Tensor, byte: int, *, writes: Lease | None = None) -> None:
        with self._device.calls(), self._cuda.stream(self._stream):
            destination.fill_(byte)

    def launch(self, work: Callable[[], object], reads: Sequence[Lease] = ()) -> None:
        with self._device.calls(), self._cuda.stream(self._stream):
            work()

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        with self._device.calls():
            self._stream.wait_event(event.event)

    def record(self) -> Event:
        with self._device.calls():
            event = self._cuda.Event()
            event.record(self._stream)
        return _CudaEvent(self._device, event)


class _CudaGraph(Graph):
    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def replay(self, reads: Sequence[Lease] = ()) -> None:
        _ = self._device.compute  # what another stream has been told comes before
        with self._device.calls():
            self._graph.replay()


def _check_driver(cuda: Any) -> None:
    if cuda.is_available():
        return
    why = "torch finds none"
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = _first_line(error)
    raise ConfigError(
        f"device_memory needs a CUDA device, and there is none to be used here ({why}); install or update the NVIDIA "
        "driver, or leave device_memory out to run the experts on the CPU"
    )


_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91
"""The number of the attribute in the driver's interface."""


def _reads_host(index: int) -> bool:
    """Whether memory that was page-locked later has one address for both; not so under WSL and on small boards."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, answer = ctypes.c_int(), ctypes.c_int()
    return (
        driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(answer), _CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, device) == 0
        and answer.value == 1
    )


def _is_cuda_error(error: RuntimeError) -> bool:
    accelerator_error = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator_error) or "CUDA error" in str(error) or "CUDA driver error" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__
