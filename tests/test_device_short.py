"""Models that run out of a device's memory in their own layers: experts give some back, and the call goes on or not."""

from __future__ import annotations

import gc
import inspect
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import planned_support
import pytest
import short_support
import torch
import triton_support
from short_support import FULL, Short, leave, nothing
from test_device_model import PROMPT, generate, make
from test_faults_interrupt import Interrupter
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import moert
from moert.config import OffloadConfig
from moert.device.base import OutOfDeviceMemoryError
from moert.device.simulated import SimulatedDevice
from moert.errors import CapacityError
from moert.hf import patching
from moert.hf.cache_mark import CacheMark
from moert.hf.growing_cache import GrowingLayer
from moert.hf.model import runtime_of
from moert.hf.spared_forward import SHARES, ModelOutOfMemoryError, SparedForward

tiered, wanted = short_support.tiered, short_support.wanted

PARTS = {
    "attention": lambda model: model.model.layers[1].self_attn,
    "attention of the last layer": lambda model: model.model.layers[2].self_attn,
    "head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_prompt_that_finds_no_memory_gets_the_experts_and_is_run_again(
    part: str, tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    slots = sum(cache.residency.capacity for cache in tier.caches)
    short = Short(monkeypatch, device, PARTS[part](model), 300_000)
    leave(device, 150_000)
    with pytest.warns(RuntimeWarning, match=r"CUDA out of memory\. Tried .* have given .* back, and the") as said:
        tokens, numbers = generate(model)
    assert len(said) == 1
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(numbers, wanted[1])
    assert short.failed
    assert slots > sum(cache.residency.capacity for cache in tier.caches) >= 3 * 4
    assert device.memory.free_bytes >= 300_000
    assert all(len(cache.residency) == cache.residency.capacity for cache in tier.caches)
    tier.check_integrity()
    moert.unpatch(model)
    assert "forward" not in vars(model)
    assert not device.used_bytes


def test_a_librarys_handle_needs_memory_too_and_other_errors_stay_what_they_are(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    leave(device, 100_000)
    with monkeypatch.context() as other:
        short = Short(other, device, model.lm_head, 200_000, RuntimeError("CUDA error: an illegal memory access"))
        with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access$"):
            generate(model)
    assert short.failed == 1
    assert device.memory.free_bytes == 100_000
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    Short(monkeypatch, device, model.lm_head, 200_000, error)
    with pytest.warns(RuntimeWarning, match=r"^CUDA error: CUBLAS_STATUS_ALLOC_FAILED .* the pass is run again"):
        assert torch.equal(generate(model)[0], wanted[0])
    tier.check_integrity()


@pytest.mark.parametrize("kind", ["new", "static", "begun", "static begun"])
def test_the_cache_is_what_a_pass_without_the_error_leaves(
    kind: str, tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-generation, too: what the failed pass has appended is forgotten, in all layers that it reached."""
    model, _, device = tiered()
    short = Short(monkeypatch, device, model.model.layers[1].self_attn)
    found = []
    for is_short in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=16) if "static" in kind else DynamicCache()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            outputs = []
            for ids in (PROMPT, PROMPT[:, :1], PROMPT[:, 3:5]):
                if is_short and ("begun" not in kind or outputs):
                    leave(device, 1000)
                    short.nbytes = 1001
                outputs.append(model(ids, past_key_values=cache).logits)
        found.append((outputs, [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]))
    assert short.failed
    for got, right in zip(found[1][0], found[0][0], strict=True):
        assert torch.equal(got, right)
    for got, right in zip(found[1][1], found[0][1], strict=True):
        assert torch.equal(got[0], right[0])
        assert torch.equal(got[1], right[1])


@pytest.mark.parametrize("kind", [DynamicLayer, GrowingLayer])
def test_keys_without_their_values_are_forgotten(kind: type[DynamicLayer]) -> None:
    """Memory was there for the ones and not for the others; a layer that was not there before goes."""
    cache, right = DynamicCache(), DynamicCache()
    numbers = torch.arange(6.0).view(1, 1, 3, 2)
    for one in (cache, right):
        one.update(numbers, -numbers, 0)
        one.layers[0].__class__ = kind
    mark = CacheMark(cache, 3)
    layer = cache.layers[0]
    layer.keys = torch.cat([layer.keys, numbers], dim=-2)
    cache.update(numbers, numbers, 1)
    assert mark.can_return
    mark.go_back()
    assert len(cache.layers) == 1
    for one in (cache, right):
        for place in range(2):
            one.update(numbers + 1, numbers + 2, place)
    for got, expected in zip(cache.layers, right.layers, strict=True):
        assert torch.equal(got.keys, expected.keys)
        assert torch.equal(got.values, expected.values)


def _hooked(model: Any) -> dict[str, Any]:
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: None)
    return {"past_key_values": DynamicCache()}


def _unknown(model: Any) -> dict[str, Any]:
    class Layer(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers.append(Layer())
    return {"past_key_values": cache}


def _listening(model: Any) -> dict[str, Any]:
    return {"unknown": object()}


@pytest.mark.parametrize("prepare", [_hooked, _unknown, _listening])
def test_where_a_pass_cannot_be_run_again_the_next_call_has_more_memory(
    prepare: Callable[[Any], dict[str, Any]], tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    with torch.inference_mode():
        arguments = prepare(model)
        short = Short(monkeypatch, device, model.model.layers[1].self_attn, 200_000)
        leave(device, 100_000)
        runs = []
        model.model.embed_tokens.register_forward_pre_hook(lambda *_: runs.append(1)) if prepare is _hooked else None
        with pytest.raises(ModelOutOfMemoryError) as found:
            model(PROMPT, **arguments)
        message = str(found.value)
        for part in (
            r"^CUDA out of memory\. Tried to allocate 20\.00 KiB: the model around the experts found no memory on",
            r"which has \d+\.\d KiB of 1\.0 TiB free now",
            r"Experts have \d+\.\d .iB there in \d+ slots, and \d+\.\d KiB of rows",
            r"moert has given \d+\.\d KiB of the experts' back, which the next call has: try again",
            r"device_memory at most \d+\.\d .iB$",
        ):
            assert re.search(part, message), part
        assert isinstance(found.value, (CapacityError, torch.OutOfMemoryError))
        assert type(found.value.__cause__) is torch.OutOfMemoryError
        assert FULL in str(found.value.__cause__)
        assert short.failed == 1
        assert device.memory.free_bytes >= 200_000
        assert model(PROMPT).logits.isfinite().all()
    tier.check_integrity()


def test_there_is_no_memory_even_to_note_what_a_cache_holds(
    tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass has not begun, so it is no matter who looks at it."""
    model, tier, _ = tiered()
    stack, left = torch.stack, [1]
    cache = StaticCache(config=model.config, max_cache_len=40)
    lengths = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: lengths.append(cache.get_seq_length()))

    def failing(tensors: Any, *args: Any, **options: Any) -> torch.Tensor:
        if left[0] and len(tensors) == 3:
            left[0] -= 1
            raise torch.OutOfMemoryError(FULL)
        return stack(tensors, *args, **options)

    with torch.inference_mode():
        model(PROMPT, past_key_values=cache)
        monkeypatch.setattr(torch, "stack", failing)
        with pytest.warns(RuntimeWarning, match="the pass is run again"):
            model(PROMPT[:, :1], past_key_values=cache)
    assert left == [0]
    assert len(lengths) == 2
    tier.check_integrity()


def test_experts_keep_what_a_token_needs_and_the_error_says_so(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    short = Short(monkeypatch, device, model.lm_head, 1 << 50)
    with (
        pytest.warns(RuntimeWarning, match="the pass is run again"),
        pytest.raises(ModelOutOfMemoryError, match="fewer experts would not do for one token: take a shorter prompt"),
    ):
        generate(model)
    assert short.failed == 1 + len(SHARES)
    assert [cache.residency.capacity for cache in tier.caches] == [4, 4, 4]
    short.nbytes = 0
    assert torch.equal(generate(model)[0], wanted[0])


def test_steps_of_experts_that_torch_has_no_memory_for(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What puts the parts of a cut prompt together is torch's own memory; nothing of the step is left half done."""
    model, tier, _ = tiered()
    empty_like, left = torch.empty_like, [2]

    def failing(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if left[0] and tensor.shape == (24, 64):
            left[0] -= 1
            raise torch.OutOfMemoryError(FULL)
        return empty_like(tensor, **options)

    tier.hosted.parts.most_tokens = 8
    recovered = []
    monkeypatch.setattr(tier, "recover", lambda: recovered.append(1))
    monkeypatch.setattr(torch, "empty_like", failing)
    with pytest.warns(RuntimeWarning, match="simulated is out of memory: CUDA out of memory.* the pass is run again"):
        tokens, _ = generate(model)
    assert torch.equal(tokens, wanted[0])
    assert left == [0]
    assert not recovered
    tier.check_integrity()


def test_a_failed_pass_keeps_no_memory_while_its_error_is_held(
    tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = tiered()
    seen: list[weakref.ref[torch.Tensor]] = []
    own = model.model.layers[1].self_attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        seen.append(weakref.ref(output[0]))
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", forward)
    with pytest.warns(RuntimeWarning), pytest.raises(ModelOutOfMemoryError) as found, torch.inference_mode():
        model(PROMPT)
    assert found.value.__cause__ is not None
    assert seen
    assert not any(one() is not None for one in seen)


def test_several_devices_the_fullest_gives_back(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, group, (first, second) = tiered(n=2)
    slots = [sum(cache.residency.capacity for cache in tier.caches) for tier in group.tiers]
    Short(monkeypatch, second, model.model.layers[2].self_attn, 100_000)
    leave(second, 50_000)
    with pytest.warns(RuntimeWarning, match="the pass is run again"):
        assert torch.equal(generate(model)[0], wanted[0])
    now = [sum(cache.residency.capacity for cache in tier.caches) for tier in group.tiers]
    assert now[0] == slots[0]
    assert now[1] < slots[1]
    assert isinstance(vars(model)["forward"], SparedForward)
    moert.unpatch(model)
    assert "forward" not in vars(model)
    assert not first.used_bytes
    assert not second.used_bytes


def test_a_forward_of_ones_own_comes_back(tiered: Callable[..., Any], wanted: Any) -> None:
    model = make()
    own = model.forward
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = forward
    patching.patch(model, OffloadConfig(device_memory="50%"), device=SimulatedDevice(virtual=True), headroom_bytes=0)
    assert torch.equal(generate(model)[0], wanted[0])
    assert calls
    moert.unpatch(model)
    assert model.forward is forward


def test_even_the_smaller_bank_is_taken_by_somebody(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps ask for it again, each time, and go on when it is there."""
    model, tier, device = tiered()
    with torch.inference_mode():
        model(PROMPT)
    others, allocate = device.others_bytes, device.allocate

    def taken(nbytes: int) -> torch.Tensor:
        device.others_bytes = device.machine.total_bytes
        return allocate(nbytes)

    monkeypatch.setattr(device, "allocate", taken)
    with pytest.raises(OutOfDeviceMemoryError, match="cannot be had"):
        runtime_of(model).give_back(1000, 0.0, nothing)
    with pytest.raises(OutOfDeviceMemoryError, match="cannot be had"), torch.inference_mode():
        model(PROMPT)
    monkeypatch.undo()
    device.others_bytes = others
    assert torch.equal(generate(model)[0], wanted[0])
    assert [cache.residency.capacity for cache in tier.caches] == [4, 4, 4]
    tier.check_integrity()


def test_an_interrupt_anywhere_while_memory_is_given_back(tiered: Callable[..., Any], wanted: Any) -> None:
    model, tier, _ = tiered(schedule="fetch_all", guarded=False)
    runtime = runtime_of(model)
    line = uninterrupted = 0
    while not uninterrupted:
        line += 31
        uninterrupted += Interrupter(line).run(lambda: runtime.give_back(20_000, 0.0, nothing))
        with torch.inference_mode():
            model(PROMPT[:, :1])
        tier.check_integrity()
        if all(cache.residency.capacity == 4 for cache in tier.caches):
            break
    assert line > 31 * 5
    assert torch.equal(generate(model)[0], wanted[0])


def test_threads_that_generate_while_one_runs_out_of_memory(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    Short(monkeypatch, device, model.lm_head, 300_000)
    leave(device, 150_000)
    found: list[torch.Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        threads = [threading.Thread(target=lambda: found.append(generate(model)[0])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    assert all(torch.equal(tokens, wanted[0]) for tokens in found)
    tier.check_integrity()


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")
def test_graphs_go_and_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device looks tokens up by itself, and gives back in mid-generation."""
    model, tier = planned_support.patched(policy="lru", device_memory="75%")
    device, forward = tier.device, vars(model)["forward"]
    right = planned_support.generate(model, 8, cache_implementation="static")
    assert (forward.captured, forward.replayed > 0) == (1, True)
    graph = weakref.ref(forward._pass._graph)
    short = Short(monkeypatch, device, model.model.layers[1].self_attn, 20_000)  # type: ignore[arg-type]
    leave(device, 10_000)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="the pass is run again"):
        tokens = planned_support.generate(model, 8, cache_implementation="static")
    assert short.failed
    assert torch.equal(tokens[0], right[0])
    assert torch.equal(tokens[1], right[1])
    assert graph() is None
    assert forward.captured == 2
    assert tier.planned.why_not is None
    tier.settle()
    planned_support.check_rows(tier)
    graph = weakref.ref(forward._pass._graph)
    moert.close(model)
    assert graph() is None
    gc.collect()  # Triton's interpreter leaves tensors in cycles
    assert not device.used_bytes  # type: ignore[attr-defined]
