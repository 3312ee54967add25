"""What is for NVIDIA GPUs: against a fake of `torch.cuda` that does all at once, and on a GPU where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import build, greedy_tokens, inputs_for, logits

import moert
from moert.config import OffloadConfig
from moert.device.base import DeviceLostError, OutOfDeviceMemoryError, PinningRefusedError
from moert.device.cuda import CudaDevice
from moert.errors import ConfigError, KernelUnavailableError
from moert.hf import patching
from moert.hf.model import runtime_of
from moert.tiers.read import Priority

GIB = 1 << 30


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self, stream: Any) -> None:
        self.cuda.said.append(f"record in {stream.name}")

    def query(self) -> bool:
        self.cuda.fail_if_told()
        return True

    def synchronize(self) -> None:
        self.cuda.fail_if_told()


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.said.append(f"{self.name} waits")


class FakeRuntime:
    """What `torch.cuda.cudart` returns."""

    def __init__(self, lockable_bytes: int, devices: list[int]) -> None:
        self.lockable_bytes, self.devices = lockable_bytes, devices
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # its name
        if sum(self.locked.values()) + nbytes > self.lockable_bytes:
            return 2
        assert flags == 3, "not for other GPUs, or not for kernels"
        assert self.devices[-1:] == [0], "in whichever context is the current one"
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


class FakeCuda:
    """A driver with one GPU of some kind."""

    def __init__(
        self,
        *,
        problem: str | None = None,
        capability: tuple[int, int] = (9, 0),
        lockable_bytes: int = 1 << 50,
    ) -> None:
        self.problem, self.capability = problem, capability
        self.devices: list[int] = []
        """Those that a guard has made the current one, the innermost last."""
        self.runtime = FakeRuntime(lockable_bytes, self.devices)
        self.default = FakeStream(self, "current")
        self.current = self.default
        self.error: Exception | None = None
        self.said: list[str] = []
        self.now: list[str] = ["current"]
        self.streams = 0

    def fail_if_told(self) -> None:
        if self.error is not None:
            raise self.error

    def is_available(self) -> bool:
        return self.problem is None

    def init(self) -> None:
        if self.problem is not None:
            raise RuntimeError(self.problem)

    def device_count(self) -> int:
        return 1

    def get_device_name(self, index: int) -> str:
        return "a fake"

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capability

    def Stream(self, index: int, priority: int = 0) -> FakeStream:
        self.streams += 1
        return FakeStream(self, f"stream {self.streams} of priority {priority}")

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, index: int) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        self.devices.append(index)
        yield
        self.devices.pop()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.now.append(stream.name)
        yield
        self.now.pop()

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.fail_if_told()
        return 8 * GIB, 16 * GIB

    def memory_reserved(self, index: int) -> int:
        return 3 * GIB

    def memory_allocated(self, index: int) -> int:
        return 1 * GIB

    def cudart(self) -> FakeRuntime:
        return self.runtime

    def synchronize(self, index: int) -> None:
        self.fail_if_told()


def fake_device(cuda: FakeCuda | None = None) -> CudaDevice:
    """Whose memory is the host's."""
    device = CudaDevice(0, cuda or FakeCuda())
    device.torch_device = torch.device("cpu")
    return device


@pytest.mark.parametrize(
    "problem",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "The NVIDIA driver on your system is too old (found version 11040)",
    ],
)
def test_no_driver_or_one_that_is_too_old(problem: str) -> None:
    with pytest.raises(ConfigError) as found:
        CudaDevice(0, FakeCuda(problem=problem))
    assert problem in str(found.value)
    assert "install or update the NVIDIA driver" in str(found.value)


def test_a_gpu_without_bf16_and_one_that_is_not_there() -> None:
    with pytest.raises(KernelUnavailableError, match=r"a fake \(0\) is of compute capability 7\.5, which has no bf16"):
        CudaDevice(0, FakeCuda(capability=(7, 5)))
    with pytest.raises(ConfigError, match="there is no CUDA device 1: this machine has 1"):
        CudaDevice(1, FakeCuda())


def test_work_is_started_in_the_stream_it_is_for() -> None:
    cuda = FakeCuda()
    device = fake_device(cuda)
    there = device.allocate(4)
    demand = device.copies[Priority.DEMAND]
    demand.copy(there, torch.full((4,), 5, dtype=torch.uint8))
    event = demand.record()
    device.compute.wait(event)
    seen = []
    device.compute.launch(lambda: seen.append((cuda.now[-1], there.tolist())))
    assert seen == [("current", [5, 5, 5, 5])]
    assert cuda.said == ["record in stream 1 of priority -1", "current waits"]
    assert event.ready
    device.copies[Priority.PREFETCH].fill(there, 255)
    assert there.tolist() == [255] * 4
    # What torch keeps for itself counts as free.
    assert device.memory == (10 * GIB, 16 * GIB)


def test_memory_of_the_callers_is_kept_until_it_has_been_copied() -> None:
    class Tensor:
        def __init__(self, *, is_cuda: bool) -> None:
            self.is_cuda, self.used_by = is_cuda, []

        def record_stream(self, stream: Any) -> None:
            self.used_by.append(stream)

        def copy_(self, source: Any, non_blocking: bool) -> None:
            assert non_blocking

    cuda = FakeCuda()
    back: Any = fake_device(cuda).back
    for is_cuda in (True, False):
        source: Any = Tensor(is_cuda=is_cuda)
        back.copy(Tensor(is_cuda=False), source)
        assert source.used_by == ([back._stream] if is_cuda else [])


def test_a_caller_in_another_stream_comes_after_the_one_before() -> None:
    """Each thread of torch has a current stream of its own, and the tables on the device are there once."""
    cuda = FakeCuda()
    device = fake_device(cuda)
    device.compute.launch(lambda: None)
    device.compute.launch(lambda: None)
    assert cuda.said == []
    cuda.current = FakeStream(cuda, "another")
    device.compute.launch(lambda: None)
    assert cuda.said == ["record in current", "another waits"]
    device.compute.launch(lambda: None)
    assert len(cuda.said) == 2
    cuda.current = cuda.default
    device.to_host(torch.zeros(1))
    assert cuda.said[2:] == ["record in another", "current waits"]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_no_memory_for_others_than_torchs_allocator_is_no_lost_device(text: str) -> None:
    device = fake_device()

    def full() -> None:
        raise RuntimeError(text)

    for _ in range(2):
        with pytest.raises(OutOfDeviceMemoryError, match=r"a fake \(0\) is out of memory: "):
            device.compute.launch(full)
    assert not device.is_lost
    device.synchronize()


def test_page_locking_and_its_refusal() -> None:
    cuda = FakeCuda(lockable_bytes=8192)
    device = fake_device(cuda)
    device.page_lock(4096, 8192)
    with pytest.raises(PinningRefusedError, match=r"the driver refuses to page-lock 4\.0 KiB \(error 2\)"):
        device.page_lock(65536, 4096)
    device.page_unlock(65536)
    device.close()
    device.close()
    assert not cuda.runtime.locked


def test_errors_of_torch_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    device = fake_device(cuda)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")

    with pytest.raises(OutOfDeviceMemoryError, match=r"a fake \(0\) is out of memory: CUDA out of memory\. Tried"):
        device.compute.launch(full)
    with pytest.raises(RuntimeError, match="something else"):
        device.compute.launch(lambda: (_ for _ in ()).throw(RuntimeError("something else")))
    assert not device.is_lost
    cuda.error = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    with pytest.raises(DeviceLostError, match=r"was lost in mid-run \(CUDA error: unspecified launch failure\)"):
        device.synchronize()
    cuda.error = None
    for call in (device.synchronize, device.compute.record, lambda: device.memory):
        with pytest.raises(DeviceLostError):
            call()
    device.close()


@pytest.mark.filterwarnings("ignore:only .* can be page-locked:RuntimeWarning")
@pytest.mark.parametrize("lockable_bytes", [1 << 50, 0])
def test_a_whole_model_through_the_calls_of_torch(lockable_bytes: int) -> None:
    """Whatever a GPU would do, in the order in which it is asked for: the same logits as on the CPU."""
    inputs = inputs_for("olmoe", model := build("olmoe"))
    with moert.patch(model):
        right = logits(model, inputs)
    cuda = FakeCuda(lockable_bytes=lockable_bytes)
    config = OffloadConfig(device_memory="25%", host_memory="50%", debug=True)
    patching.patch(model, config, device=fake_device(cuda), triton=False, schedule="exact", guarded=False)
    for _ in range(3):
        assert torch.equal(logits(model, inputs), right)
    tier = runtime_of(model).device
    assert tier is not None
    assert tier.counts.on_device
    assert bool(cuda.runtime.locked) == bool(lockable_bytes)
    moert.unpatch(model)
    assert not cuda.runtime.locked


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_tokens_on_a_gpu_are_the_same_at_every_budget(family: str) -> None:
    found = []
    for share in ("100%", "25%"):
        model = build(family)
        inputs = inputs_for(family, model)
        config = OffloadConfig(device_memory=share, host_memory="75%", debug=True)
        options = {"schedule": "fetch_all", "guarded": False, "headroom_bytes": 0}
        patching.patch(model, config, device=CudaDevice(), **options)
        inputs = {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in inputs.items()}
        found.append(greedy_tokens(model, inputs, 8).cpu())
        moert.close(model)
    assert torch.equal(found[0], found[1])


@pytest.mark.gpu
def test_hybrid_logits_on_a_gpu_are_close_to_those_of_transformers() -> None:
    inputs = inputs_for("olmoe", model := build("olmoe"))
    right = logits(model, inputs)
    patching.patch(model, OffloadConfig(device_memory="25%", debug=True), device=CudaDevice(), headroom_bytes=0)
    inputs = {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in inputs.items()}
    for _ in range(3):
        torch.testing.assert_close(logits(model, inputs).cpu(), right, rtol=1e-4, atol=2e-5)
    moert.close(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_public_option_on_a_gpu(dtype: torch.dtype) -> None:
    """The self-check passes, tokens are those of transformers, and everything comes back."""
    inputs = inputs_for("olmoe", model := build("olmoe").to(dtype))
    right, parameters = logits(model, inputs), dict(model.named_parameters())
    there = {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in inputs.items()}
    for host in ("100%", "50%"):
        with pytest.warns(RuntimeWarning, match="the self-check on this one passed"):
            moert.patch(model, device_memory="50%", host_memory=host)
        found = logits(model, there).cpu()
        torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 2e-5)
        moert.unpatch(model)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
        assert torch.equal(logits(model, inputs), right)


@pytest.mark.gpu
def test_copies_and_page_locking_on_a_gpu() -> None:
    device = CudaDevice()
    source = device.allocate_pinned(1 << 20).fill_(7)
    there = device.allocate(1 << 20)
    device.copies[Priority.DEMAND].copy(there, source)
    event = device.copies[Priority.DEMAND].record()
    device.compute.wait(event)
    assert bool((there == 7).all())
    plain = torch.zeros(1 << 20, dtype=torch.uint8)
    begin = plain.data_ptr() // 4096 * 4096
    device.page_lock(begin, 1 << 20)
    assert plain.is_pinned()
    device.page_unlock(begin)
    device.close()
