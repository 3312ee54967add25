"""A token's pass as one graph: what a tape does, and models whose passes are replayed, on a simulated device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_support
from planned_support import LAYERS, generate, make, patched
from test_device_cuda import FakeCuda

import moert
from moert.device.base import CaptureError, DeviceLostError, OutOfDeviceMemoryError
from moert.device.cuda import CudaDevice
from moert.device.simulated import SimulatedDevice
from moert.hf import graphed_forward
from moert.hf.graphed_forward import WARM_UPS, GraphedForward
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import PLANNED

interpreted = pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    device = SimulatedDevice(virtual=True)
    yield device
    device.close()


def test_nothing_happens_until_the_replay(device: SimulatedDevice) -> None:
    given, total, found = torch.ones(3), torch.zeros(3), []

    def work() -> None:
        total.add_(given)
        doubled = (total * 2).reshape(3, 1).t()
        found.append(doubled.contiguous())
        found.append(doubled[0, 1:])

    graph = device.capture(work)
    assert total.tolist() == [0, 0, 0]
    assert all(tensor.isnan().all() for tensor in found)
    graph.replay()
    assert (total.tolist(), found[0].tolist(), found[1].tolist()) == ([1] * 3, [[2] * 3], [2] * 2)
    given.fill_(5)
    graph.replay()
    assert (total.tolist(), found[0].tolist(), found[1].tolist()) == ([6] * 3, [[12] * 3], [12] * 2)


def test_what_python_decided_stays_decided(device: SimulatedDevice) -> None:
    total, factor = torch.ones(2), [3.0]
    graph = device.capture(lambda: total.mul_(factor[0]))
    factor[0] = 100.0
    graph.replay()
    graph.replay()
    assert total.tolist() == [9, 9]


@pytest.mark.parametrize(
    "work",
    [
        lambda tensor, device: tensor.sum().item(),
        lambda tensor, device: bool(tensor[0] > 0),
        lambda tensor, device: tensor[tensor > 0],
        lambda tensor, device: device.to_host(tensor),
        lambda tensor, device: device.compute.record().wait() or device.compute.record().ready,
        lambda tensor, device: device.compute.copy(tensor, tensor.clone(), pageable=True),
    ],
)
def test_what_waits_for_the_device_cannot_be_captured(device: SimulatedDevice, work: Any) -> None:
    tensor = torch.ones(3)

    def works() -> None:
        tensor.add_(1)
        work(tensor, device)

    with pytest.raises(CaptureError):
        device.capture(works)
    assert tensor.tolist() == [1, 1, 1]
    # The device is as it was.
    device.compute.launch(lambda: tensor.mul_(7))
    device.compute.record().wait()
    assert tensor.tolist() == [7, 7, 7]


class FakeGraphs(FakeCuda):
    """A driver that captures, and fails if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: Exception | None = None

    def CUDAGraph(self) -> Any:
        return self

    def graph(self, graph: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        self.said.append("captures")
        return self.stream(self.current_stream(0))

    def device(self, index: int) -> Any:
        return self.stream(self.current_stream(index))

    def synchronize(self, index: int) -> None:
        self.said.append("synchronizes")
        self.fail_if_told()

    def replay(self) -> None:
        self.said.append("replays")
        self.fail_if_told()


def test_a_gpu_captures_and_replays() -> None:
    cuda = FakeGraphs()
    device = CudaDevice(0, cuda)
    graph = device.capture(lambda: cuda.said.append("works"))
    assert cuda.said[-3:] == ["synchronizes", "captures", "works"]
    graph.replay()
    assert cuda.said[-1] == "replays"


def test_a_gpu_that_cannot_capture_something_is_not_lost() -> None:
    cuda = FakeGraphs()
    device = CudaDevice(0, cuda)

    def fails(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    refused = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    for work in (fails(refused), lambda: device.compute.launch(fails(refused))):
        with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
            device.capture(work)
        assert not device.is_lost
    with pytest.raises(OutOfDeviceMemoryError):
        device.capture(fails(torch.OutOfMemoryError("no memory")))
    with pytest.raises(CaptureError, match="mine"):
        device.capture(fails(CaptureError("mine")))
    graph = device.capture(lambda: None)
    cuda.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceLostError):
        device.capture(fails(refused))
    with pytest.raises(DeviceLostError):
        graph.replay()


@pytest.fixture(scope="module")
def wanted() -> tuple[torch.Tensor, torch.Tensor]:
    """Static caches without graphs."""
    model, _ = patched(planned=False)
    found = generate(model, n=8, cache_implementation="static")
    moert.close(model)
    return found


@pytest.fixture
def graphed() -> Iterator[Callable[..., tuple[Any, DeviceTier, GraphedForward]]]:
    models = []

    def make_one(**options: Any) -> tuple[Any, DeviceTier, GraphedForward]:
        model, tier = patched(**options)
        models.append(model)
        return model, tier, vars(model)["forward"]

    yield make_one
    for model in models:
        moert.close(model)


def static(model: Any, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return generate(model, n=n, cache_implementation="static")


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for got, right in zip(found, wanted, strict=True):
        assert torch.equal(got, right)


@interpreted
def test_replays_give_the_same_bits(wanted: Any, graphed: Callable[..., Any]) -> None:
    model, tier, forward = graphed()
    same(static(model), wanted)
    assert (forward.captured, forward.replayed, forward.why_not) == (1, 7 - WARM_UPS, None)
    # A pass of the graph counts as any other.
    assert tier.counts.ways[PLANNED] == 7 * LAYERS
    counts = moert.stats(model)
    assert counts.hits + counts.misses == tier.counts.on_device
    assert counts.decoding.steps == 7
    # Another cache, as generate makes one each time: the graph holds, prompts and all between.
    before = forward.replayed
    same(static(model), wanted)
    assert (forward.captured, forward.replayed - before) == (1, 7)
    tier.settle()
    tier.check_integrity()


@interpreted
def test_a_cache_that_is_still_in_use_is_left_alone(graphed: Callable[..., Any]) -> None:
    from transformers import StaticCache

    model, _, forward = graphed()
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
    prompt = torch.tensor([[5, 9, 7, 2]])
    plain, _ = patched(planned=False)
    with torch.inference_mode():
        wanted = StaticCache(config=model.config, max_cache_len=12)
        right = [plain(prompt, past_key_values=wanted).logits[:, -1:]]
        right += [plain(torch.tensor([[token]]), past_key_values=wanted).logits for token in range(20, 27)]
        for cache in caches:
            found = [model(prompt, past_key_values=cache).logits[:, -1:]]
            found += [model(torch.tensor([[token]]), past_key_values=cache).logits for token in range(20, 27)]
            same(tuple(found), tuple(right))
        assert forward.captured == 2
        states = [[layer.keys.clone() for layer in cache.layers] for cache in caches]
        assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
        assert caches[0].layers[0].keys.data_ptr() != caches[1].layers[0].keys.data_ptr()
        # When both are gone, a third one takes the graph over.
        del caches, cache
        third = StaticCache(config=model.config, max_cache_len=12)
        found = [model(prompt, past_key_values=third).logits[:, -1:]]
        before = forward.replayed
        found += [model(torch.tensor([[token]]), past_key_values=third).logits for token in range(20, 27)]
        same(tuple(found), tuple(right))
    assert (forward.captured, forward.replayed - before) == (2, 7)
    moert.close(plain)


@interpreted
def test_a_cache_that_grows_is_no_graph(graphed: Callable[..., Any]) -> None:
    model, tier, forward = graphed()
    generate(model, n=6)
    assert tier.is_planning
    assert (forward.captured, forward.replayed) == (0, 0)


@interpreted
def test_what_would_not_see_a_replay_gets_the_code_of_the_model(wanted: Any, graphed: Callable[..., Any]) -> None:
    model, _, forward = graphed()
    same(static(model), wanted)
    seen = []
    handle = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: seen.append(1))
    before = forward.replayed
    same(static(model), wanted)
    assert forward.replayed == before and len(seen) == 8
    handle.remove()
    same(static(model), wanted)
    assert forward.replayed == before + 7
    # A weight that is another.
    other = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(-other, requires_grad=False)
    before = forward.replayed
    tokens, _ = static(model)
    assert forward.replayed == before and not torch.equal(tokens, wanted[0])


@interpreted
def test_hooks_that_were_there_before_keep_it_from_being_captured(wanted: Any, graphed: Callable[..., Any]) -> None:
    model, _, forward = graphed()
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="cannot be made a graph.*self_attn has hooks"):
        same(static(model), wanted)
    assert forward.replayed == 0 and "has hooks" in str(forward.why_not)


@interpreted
def test_a_model_that_waits_for_the_device_is_run_as_it_is(
    wanted: Any, graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, forward = graphed()
    kind = type(model.model.norm)
    norm = kind.forward

    def asks(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.abs().max().item() < 1e9
        return norm(self, hidden)

    monkeypatch.setattr(kind, "forward", asks)
    with pytest.warns(RuntimeWarning, match="cannot be made a graph, so each of its kernels is started one by one"):
        same(static(model), wanted)
    assert forward.captured == 0 and "waits for the device" in str(forward.why_not)


@interpreted
def test_a_graph_that_there_was_no_memory_for_is_tried_again(
    wanted: Any, graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_forward, "RETRY_PASSES", 3)
    model, tier, forward = graphed()
    attempts = []

    def full(_: Any) -> Any:
        attempts.append(1)
        raise OutOfDeviceMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(tier.device, "capture", full)
        with pytest.warns(RuntimeWarning, match="cannot be made a graph.* no memory") as found:
            same(static(model), wanted)
        assert len(found) == 1
        assert len(attempts) == 2
        assert forward.replayed == 0
    same(static(model), wanted)
    assert forward.captured == 1
    assert forward.replayed


@interpreted
def test_it_takes_what_the_model_takes(graphed: Callable[..., Any]) -> None:
    model, _, forward = graphed()
    assert inspect.signature(forward) == inspect.signature(type(model).forward.__get__(model))
    assert model._supports_logits_to_keep()


@interpreted
def test_a_forward_that_somebody_gave_the_model_stays() -> None:
    model = make()
    model.forward = given = model.forward
    patched(model)
    assert vars(model)["forward"].before is given
    moert.unpatch(model)
    assert vars(model)["forward"] is given


@interpreted
def test_unpatched_it_is_the_class_s_forward_again(graphed: Callable[..., Any]) -> None:
    model, _, _ = graphed()
    static(model, n=4)
    moert.unpatch(model)
    assert "forward" not in vars(model)
    assert torch.isfinite(static(model, n=3)[1]).all()
    moert.patch(model)
