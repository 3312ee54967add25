"""Slots that experts gave back and have again when there is room: somebody else has left the device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import planned_support
import pytest
import short_support
import torch
import triton_support
from short_support import Short, leave, nothing
from test_device_model import PROMPT, generate
from test_faults_interrupt import Interrupter
from transformers import DynamicCache

from moert.device.base import OutOfDeviceMemoryError
from moert.device.simulated import SimulatedDevice
from moert.hf.cache_mark import cache_bytes
from moert.hf.model import runtime_of
from moert.runtime import device_regrowth
from moert.runtime.device_regrowth import MOST_PASSES, SETTLED_PASSES, Regrowth

tiered, wanted = short_support.tiered, short_support.wanted

WAIT = 4

NEED = 32 << 20
"""What a pass takes of the device beside its experts; more than experts leave in any case."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_regrowth, "SETTLED_PASSES", WAIT)


def slots_of(tier: Any) -> list[int]:
    return [cache.residency.capacity for cache in tier.caches]


def passes(model: Any, n: int) -> list[str]:
    """What is said in so many passes."""
    with warnings.catch_warnings(record=True) as said, torch.inference_mode():
        warnings.simplefilter("always")
        for _ in range(n):
            model(PROMPT[:, :1])
    return [str(one.message) for one in said]


def shrunk(model: Any, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Short:
    """Somebody else takes the device's memory, and experts give some back."""
    short = Short(monkeypatch, device, model.model.layers[1].self_attn, NEED)
    leave(device, NEED - 150_000)
    with pytest.warns(RuntimeWarning, match="the pass is run again"), torch.inference_mode():
        model(PROMPT[:, :1])
    return short


def test_who_took_the_memory_leaves_in_mid_generation(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    most = slots_of(tier)
    short = Short(monkeypatch, device, model.model.layers[1].self_attn, NEED)
    seen: list[list[int]] = []
    own = model.lm_head.forward

    def head(*args: Any) -> Any:
        seen.append(slots_of(tier))
        if len(seen) == 1:
            leave(device, NEED - 150_000)
        elif len(seen) == 4:
            device.others_bytes = 0
        return own(*args)

    monkeypatch.setattr(model.lm_head, "forward", head)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokens, numbers = generate(model)
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(numbers, wanted[1])
    assert short.failed
    few = seen[1]
    assert few < most
    assert seen == [most] + [few] * (WAIT + 1) + [most] * (10 - 2 - WAIT)
    gave, regained = (str(one.message) for one in said)
    assert "are left to them, which is slower, until there is room again" in gave
    assert regained.startswith("there is room on simulated again: experts have got ")
    assert "missing" not in regained
    assert passes(model, 3 * WAIT) == []
    tier.check_integrity()
    assert all(len(cache.residency) == cache.residency.capacity for cache in tier.caches)


def test_nobody_has_left(tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the rest is what somebody else has, nor where the model itself needs what experts gave."""
    model, tier, device = tiered()
    shrunk(model, device, monkeypatch)
    few = slots_of(tier)
    assert passes(model, 5 * WAIT) == []
    assert slots_of(tier) == few


def test_what_a_cache_held_when_memory_ran_out_is_not_free_for_long(
    tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a sequence has ended, the next one's cache would take it."""
    model, tier, device = tiered()
    cache = DynamicCache()
    with torch.inference_mode():
        model(PROMPT, past_key_values=cache)
    held = cache_bytes(cache, device.torch_device)
    assert held >= 3 * 2 * PROMPT.numel() * 64 * 4
    assert not cache_bytes(cache, torch.device("meta"))
    Short(monkeypatch, device, model.model.layers[1].self_attn, NEED)
    leave(device, NEED - 150_000)
    with pytest.warns(RuntimeWarning, match="the pass is run again"), torch.inference_mode():
        model(PROMPT[:, :1], past_key_values=cache)
    few, missing = slots_of(tier), tier.sizing._shrinking.missing_bytes
    device.others_bytes -= cache_bytes(cache, device.torch_device)
    assert missing < 2 * cache_bytes(cache, device.torch_device)
    assert passes(model, 3 * WAIT) == []
    assert slots_of(tier) == few
    device.others_bytes -= missing
    assert len(passes(model, 2 * WAIT)) == 1


def test_most_of_it_but_not_all(tiered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tier, device = tiered()
    most = slots_of(tier)
    shrunk(model, device, monkeypatch)
    missing = tier.sizing._shrinking.missing_bytes
    row = tier.caches[0].bank.row_bytes
    device.others_bytes -= missing // 2 - row
    assert passes(model, 3 * WAIT) == []
    device.others_bytes -= 2 * row
    said = passes(model, 2 * WAIT)
    assert len(said) == 1
    assert said[0].endswith("KiB are still missing")
    assert sum(slots_of(tier)) < sum(most)
    device.others_bytes = 0
    assert len(passes(model, 2 * WAIT)) == 1
    assert slots_of(tier) == most


def test_out_of_memory_again_makes_it_wait_longer(
    tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, device = tiered()
    most = slots_of(tier)
    shrunk(model, device, monkeypatch)
    device.others_bytes = 0
    assert len(passes(model, WAIT)) == 0
    assert len(passes(model, 1)) == 1
    leave(device, NEED - 150_000)
    assert len(passes(model, 1)) == 1, "another episode is said too"
    device.others_bytes = 0
    assert passes(model, 2 * WAIT) == []
    assert len(passes(model, 1)) == 1
    assert slots_of(tier) == most
    assert torch.equal(generate(model)[0], wanted[0])


@pytest.mark.parametrize("left", [1, 2], ids=["what there was", "the fewest"])
def test_somebody_is_faster(
    left: int, tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room, and none when it comes to taking it."""
    model, tier, device = tiered()
    most = slots_of(tier)
    shrunk(model, device, monkeypatch)
    few = slots_of(tier)
    device.others_bytes = 0
    allocate, refused = device.allocate, []

    def taken(nbytes: int) -> torch.Tensor:
        if nbytes > 500_000 and len(refused) < left:
            refused.append(nbytes)
            raise OutOfDeviceMemoryError("somebody was faster")
        return allocate(nbytes)

    monkeypatch.setattr(device, "allocate", taken)
    assert passes(model, WAIT + 1) == []
    assert len(refused) == left
    assert slots_of(tier) == (few if left == 1 else [4, 4, 4])
    tier.check_integrity()
    before = slots_of(tier)
    assert passes(model, 3 * WAIT) == []
    assert slots_of(tier) == before != most, "with what was free then it could not be had"
    device.others_bytes = -NEED
    passes(model, 3 * WAIT)
    assert slots_of(tier) == most
    assert torch.equal(generate(model)[0], wanted[0])


def test_only_the_device_with_room(tiered: Callable[..., Any], wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, group, (first, second) = tiered(n=2)
    most = [slots_of(tier) for tier in group.tiers]
    for device in (first, second):
        leave(device, 1000)
        runtime_of(model).give_back(20_000, 0.0, nothing)
        leave(device, 500_000)
    few = [slots_of(tier) for tier in group.tiers]
    assert few[0] < most[0]
    assert few[1] < most[1]
    second.others_bytes = 0
    said = passes(model, WAIT + 1)
    assert len(said) == 1
    assert "simulated 1" in said[0]
    assert [slots_of(tier) for tier in group.tiers] == [few[0], most[1]]
    assert torch.equal(generate(model)[0], wanted[0])


def test_each_device_has_its_own_time(tiered: Callable[..., Any]) -> None:
    model, group, (first, second) = tiered(n=2)
    for tier in group.tiers:
        tier.sizing.give_back(200_000, 0.0, nothing)
    assert passes(model, WAIT - 1) == []
    group.tiers[0].sizing.give_back(1000, 0.0, nothing)
    first.others_bytes = second.others_bytes = -NEED
    said = passes(model, 2)
    assert len(said) == 1
    assert "simulated 1" in said[0]
    assert group.tiers[0].sizing.is_short
    assert len(passes(model, WAIT - 1)) == 1
    assert not group.sizing.is_short


def test_an_interrupt_anywhere_while_slots_come_back(tiered: Callable[..., Any], wanted: Any) -> None:
    model, tier, _ = tiered(schedule="fetch_all", guarded=False)
    most, runtime = slots_of(tier), runtime_of(model)
    line, uninterrupted = 0, False
    while not uninterrupted:
        line += 37
        runtime.give_back(20_000, 0.0, nothing)
        tier.sizing._regrowth = Regrowth(0)
        while not runtime.can_grow(nothing):
            pass
        uninterrupted = Interrupter(line).run(lambda: runtime.grow(nothing))
        with torch.inference_mode():
            model(PROMPT[:, :1])
        tier.check_integrity()
    assert slots_of(tier) == most
    assert line > 37 * 5
    assert torch.equal(generate(model)[0], wanted[0])


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")
def test_graphs_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device looks tokens up by itself, with few slots and with all of them."""
    model, tier = planned_support.patched(policy="lru", device_memory="75%")
    device, forward = tier.device, vars(model)["forward"]
    right = planned_support.generate(model, 12, cache_implementation="static")
    most = slots_of(tier)
    short = Short(monkeypatch, device, model.model.layers[1].self_attn, 20_000)  # type: ignore[arg-type]
    leave(device, 10_000)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="the pass is run again"):
        planned_support.generate(model, 1, cache_implementation="static")
    assert short.failed
    assert slots_of(tier) < most
    device.others_bytes = 0  # type: ignore[attr-defined]
    graphs: list[Any] = []
    can_grow, grow = tier.sizing.can_grow, tier.sizing.grow

    def asked(held: Any) -> bool:
        if forward._pass is not None:
            graphs[:] = [weakref.ref(forward._pass._graph)]
        return can_grow(held)

    def grows(held: Any) -> Any:
        assert graphs[0]() is None, "a graph of rows that are to go"
        return grow(held)

    monkeypatch.setattr(tier.sizing, "can_grow", asked)
    monkeypatch.setattr(tier.sizing, "grow", grows)
    captured, replayed = forward.captured, forward.replayed
    with pytest.warns(RuntimeWarning, match="there is room on simulated again"):
        tokens = planned_support.generate(model, 12, cache_implementation="static")
    assert torch.equal(tokens[0], right[0])
    assert torch.equal(tokens[1], right[1])
    assert slots_of(tier) == most
    assert forward.captured == captured + 2
    assert forward.replayed > replayed + 1
    assert tier.planned.why_not is None
    tier.settle()
    planned_support.check_rows(tier)


def test_regrowth_leaves_what_passes_were_seen_to_need() -> None:
    regrowth = Regrowth(100)
    assert regrowth.takes(50, 150, 1000) == 50
    assert regrowth.takes(50, 149, 1000) == 49
    assert regrowth.takes(50, 124, 1000) == 0, "less than half is not worth it"
    assert regrowth.takes(50, 1000, 30) == 30
    regrowth.gave_back(300)
    assert regrowth.takes(50, 349, 1000) == 49
    regrowth.gave_back(10)
    assert regrowth.takes(50, 149, 1000) == 49, "the reserve is left in any case"


def test_regrowth_waits_longer_each_time_it_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    regrowth = Regrowth(0)

    def passes_until_it_looks() -> int:
        n = 1
        while not regrowth.is_time():
            n += 1
        return n - 1

    regrowth.gave_back(0)
    regrowth.gave_back(0)
    assert [passes_until_it_looks() for _ in range(2)] == [SETTLED_PASSES] * 2
    found = []
    for _ in range(8):
        regrowth.grew()
        regrowth.gave_back(0)
        regrowth.gave_back(0)
        found.append(passes_until_it_looks())
    assert found == [min(SETTLED_PASSES << n, MOST_PASSES) for n in range(1, 9)]
