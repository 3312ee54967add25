"""Single tokens that the device runs by itself, under Triton's interpreter: tokens, books, and what it waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planned_support
import pytest
import torch
import triton_support
from planned_support import (
    EXPERTS,
    LAYERS,
    ON_DEVICE,
    TOP_K,
    Clock,
    check_rows,
    generate,
    make,
    patched,
    third_step_finds_no_memory,
    tier_of,
)

import moert
from moert.device.base import SlotAccessError
from moert.device.simulated import Machine, SimulatedDevice
from moert.hf import loading
from moert.hf.model import runtime_of
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import PLANNED, Ways
from moert.tiers.read import Priority
from moert.types import ExpertId

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")


@pytest.fixture(scope="module")
def wanted() -> tuple[torch.Tensor, torch.Tensor]:
    """What the same kernels give where the host decides about every layer's step."""
    model, tier = patched(planned=False)
    found = generate(model)
    assert set(tier.counts.ways) == {"exact"}
    moert.close(model)
    return found


@pytest.fixture
def planned() -> Iterator[Callable[..., tuple[Any, DeviceTier]]]:
    models = []

    def make_one(**options: Any) -> tuple[Any, DeviceTier]:
        models.append(patched(**options))
        return models[-1]

    yield make_one
    for model, _ in models:
        moert.close(model)


def same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    for got, right in zip(found, wanted, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        ("ema", "25%"),
        ("lru", "50%"),
        ("ema,alpha=0.2,burst=0", "100%"),
        *(
            pytest.param(policy, share, marks=pytest.mark.slow)
            for policy, share in (("ema", "50%"), ("ema", "100%"), ("lru", "25%"), ("lru", "100%"))
        ),
    ],
)
def test_tokens_are_those_that_the_host_decides_about(
    wanted: Any, planned: Callable[..., Any], policy: str, share: str
) -> None:
    model, tier = planned(policy=policy, device_memory=share)
    assert tier.planned.why_not is None
    same(generate(model), wanted)
    assert tier.counts.ways == {"exact": LAYERS, PLANNED: 5 * LAYERS}
    check = moert.stats(model)
    assert check.hits + check.misses == tier.counts.on_device
    assert check.misses == tier.counts.fetched
    assert (check.misses == 0) == (share == "100%")
    # A prompt again, by the host, and tokens again, by the device.
    same(generate(model), wanted)
    tier.settle()
    check_rows(tier)


def test_rows_that_the_device_was_the_first_to_fill(wanted: Any, planned: Callable[..., Any]) -> None:
    model, tier = planned(preload=False)
    with torch.inference_mode():
        for token in range(3, 9):
            model(torch.tensor([[token]]))
    assert set(tier.counts.ways) == {PLANNED}
    same(generate(model), wanted)
    assert tier.counts.ways["exact"] == LAYERS
    tier.settle()
    check_rows(tier)


def test_no_token_waits_for_the_device(planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tier = planned()
    generate(model, n=2)
    asked = []
    to_host = SimulatedDevice.to_host
    monkeypatch.setattr(SimulatedDevice, "to_host", lambda self, tensor: asked.append(1) or to_host(self, tensor))
    cache = None
    token = torch.tensor([[5]])
    with torch.inference_mode():
        for _ in range(3):
            output = model(token, past_key_values=cache)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    assert not asked and tier.is_planning
    moert.stats(model)
    assert asked


def test_statistics_are_of_now_and_counted_once(planned: Callable[..., Any]) -> None:
    model, tier = planned(device_memory="100%")
    generate(model, n=4)
    first = moert.stats(model)
    assert (moert.stats(model).hits, moert.stats(model).misses) == (first.hits, first.misses)
    assert tier.is_planning
    moert.stats(model)
    before = first.hits
    with torch.inference_mode():
        model(torch.tensor([[7]]))
    assert moert.stats(model).hits == before + LAYERS * TOP_K
    tier.settle()
    assert moert.stats(model).hits == before + LAYERS * TOP_K


def test_the_policy_learns_what_the_device_did(planned: Callable[..., Any]) -> None:
    model, tier = planned()
    seen: list[list[ExpertId]] = []
    cache = tier.caches[0]
    chosen: list[set[int]] = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda module, inputs, output: chosen.append({*output[-1].flatten().tolist()}))
    generate(model, n=6)
    handle.remove()
    policy = cache.residency.policy
    access = policy.access
    policy.access = lambda event: seen.append(list(event)) or access(event)  # type: ignore[method-assign]
    tier.settle()
    # The prompt was the host's; the others come in their order.
    assert [{expert.expert for expert in event} for event in seen] == chosen[1:]
    assert len(seen) == 5


def test_the_policy_of_host_memory_learns_what_came_from_there(planned: Callable[..., Any]) -> None:
    model, tier = planned()
    cache = tier.caches[0]
    chosen: list[set[ExpertId]] = []
    there: set[ExpertId] = set()

    def look(module: Any, inputs: Any, output: Any) -> None:
        if len(chosen) == 1:
            there.update(cache.residency.residents)
        chosen.append({ExpertId(0, expert) for expert in output[-1].flatten().tolist()})

    handle = model.model.layers[0].mlp.gate.register_forward_hook(look)
    generate(model, n=6)
    handle.remove()
    seen: list[list[ExpertId]] = []
    cache.host.cache.residency.policy.access = lambda event: seen.append(list(event))
    tier.settle()
    came = []
    for event in chosen[1:]:
        if event - there:
            came.append(sorted(event - there))
        there |= event
    assert came and seen == came


def test_only_the_latest_events_are_told(planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moert.runtime.device_planned.LOGGED", 3)
    model, tier = planned()
    generate(model, n=6)
    seen = []
    policy = tier.caches[1].residency.policy
    policy.access = seen.append
    tier.settle()
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("options", "why_not"),
    [
        ({"policy": "lfu"}, "the policy lfu runs on the host only, unlike ema, lru"),
        ({"triton": False}, "is computed by the CPU's kernels"),
        ({"machine": Machine(reads_host=False)}, "cannot read host memory where it is"),
        ({"machine": Machine(lockable_bytes=40_000)}, "is not in page-locked memory"),
        ({"planned": False}, "it was not asked for"),
    ],
)
def test_why_the_device_runs_nothing_by_itself(
    planned: Callable[..., Any], options: dict[str, Any], why_not: str
) -> None:
    if "lockable_bytes" in str(options) and options.get("machine", Machine()).lockable_bytes is not None:
        with pytest.warns(RuntimeWarning, match="page-locked here"):
            model, tier = planned(**options)
    else:
        model, tier = planned(**options)
    generate(model, n=3)
    assert why_not in str(tier.planned.why_not)
    assert PLANNED not in tier.counts.ways


def loaded(folder: Path, **options: Any) -> tuple[Any, DeviceTier]:
    config, device, rest = planned_support.settings(**options)
    model = loading.load(folder, config, None, device=device, device_options=rest)
    return model, tier_of(model)


def test_experts_that_leave_host_memory_end_it(wanted: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model, tier = loaded(tmp_path, host_memory="100%")
    same(generate(model), wanted)
    assert tier.is_planning
    moert.resize(model, host_memory="100%")
    same(generate(model), wanted)
    assert tier.is_planning
    moert.resize(model, host_memory="50%")
    assert not tier.is_planning
    same(generate(model), wanted)
    # A cache that grows is not put back, so a pass over it cannot be run again.
    assert tier.planned.why_not is None and not tier.is_planning
    check_rows(tier)
    moert.close(model)


def test_experts_that_are_still_to_be_read_are_waited_for(wanted: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model, tier = loaded(tmp_path, host_memory="100%", preload=False)
    same(generate(model), wanted)
    assert tier.planned.why_not is None and not tier.is_planning
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            runtime_of(model).weights(layer, expert)
    same(generate(model), wanted)
    assert tier.is_planning
    moert.close(model)


def test_a_device_without_memory_for_it_leaves_it_to_the_host(
    wanted: Any, planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier = planned()
    calls = third_step_finds_no_memory(tier, monkeypatch)
    with pytest.warns(RuntimeWarning, match="no memory: the device cannot run single tokens by itself") as found:
        same(generate(model), wanted)
    assert len(calls) > 3
    assert len(found) == 1
    tier.settle()
    check_rows(tier)


def test_no_memory_for_what_it_plans_with_is_no_end(
    wanted: Any, planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    with monkeypatch.context() as patch:
        patch.setattr("moert.runtime.device_planned.make_planner", full)
        model, tier = planned()
        assert "CUDA out of memory" in str(tier.planned.why_not)
        same(generate(model), wanted)
    runtime_of(model).give_back(1, 0.0, lambda _: 0)
    assert tier.planned.why_not is None, "there is some now"
    same(generate(model), wanted)
    assert tier.counts.ways[PLANNED] == 5 * LAYERS
    # Or when it is to begin, until there is some.
    model, tier = planned()
    with monkeypatch.context() as patch:
        patch.setattr("moert.kernels.copy_rows.scattered_table", full)
        with pytest.warns(RuntimeWarning, match="no memory for its tables: CUDA out of memory") as found:
            same(generate(model), wanted)
        assert len(found) == 1
        assert PLANNED not in tier.counts.ways
    same(generate(model), wanted)
    assert tier.counts.ways[PLANNED] == 5 * LAYERS


def test_an_interrupt_costs_no_token(wanted: Any, planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tier = planned()
    generate(model, n=3)
    run = tier.planned._passes.run

    def interrupted(*args: Any) -> Any:
        run(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tier.planned._passes, "run", interrupted)
        with pytest.raises(KeyboardInterrupt), torch.inference_mode():
            model(torch.tensor([[7]]))
    same(generate(model), wanted)
    assert tier.is_planning
    tier.settle()
    check_rows(tier)


@pytest.mark.parametrize("planned_s", [0.005, 0.015])
def test_it_is_used_where_it_is_seen_to_be_faster(planned_s: float) -> None:
    clock = Clock()
    ways = Ways("exact", clock)
    used = []
    for _ in range(600):
        ways.begin(1)
        used.append(ways.way)
        clock.now += planned_s if ways.way == PLANNED else 0.01
    assert PLANNED in used
    assert (used[-100:].count(PLANNED) > 90) == (planned_s < 0.01)
    assert ways.scheduler is not None
    # More tokens at once are the host's.
    for _ in range(300):
        ways.begin(7)
        clock.now += 0.01
        assert ways.way != PLANNED
    ways.do_not_plan(ever=True)
    for _ in range(300):
        ways.begin(1)
        clock.now += 0.01
        assert ways.way != PLANNED


def test_guarded_it_is_a_way_among_others(wanted: Any, planned: Callable[..., Any]) -> None:
    model, tier = planned(planned=None, guarded=True, costs=ON_DEVICE)
    assert tier.planned.why_not is None
    same(generate(model, n=6), wanted)
    assert PLANNED not in tier.counts.ways, "a trial begins only when the way in use is known"


def test_a_row_that_is_still_being_filled_is_not_to_be_read(
    planned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulated device looks at what passes read that it runs by itself, too."""
    model, tier = planned(machine=Machine(latency_s=1e-3))
    generate(model)
    tier.settle()
    cache = tier.caches[0]
    (gone, *_) = cache.residency.residents
    cache.drop([gone])
    with monkeypatch.context() as patch:
        patch.setattr(tier.transfers, "drain", lambda: None)
        tier.sizing.load(cache, [gone])
        assert tier.transfers.copying
        with pytest.raises(SlotAccessError, match="is read while its slot is being filled"), torch.inference_mode():
            model(torch.tensor([[7]]))


def test_a_graph_reads_no_row_that_somebody_else_fills(planned: Callable[..., Any]) -> None:
    model, tier = planned(machine=Machine(latency_s=1e-3))
    generate(model, n=6, cache_implementation="static")
    captured = vars(model)["forward"]._pass
    for state in captured._states:
        state["cumulative_length"].zero_()
    graph = captured._graph
    assert tier.is_planning
    (lease, *_) = tier.planned._passes.leases([1])
    cache = tier.caches[1]
    graph.replay()
    expert = next(ExpertId(1, expert) for expert in range(EXPERTS) if cache.host.has(ExpertId(1, expert)))
    cache.bank.fill(lease.slot, tier.device.copies[Priority.PREFETCH], cache.host.weights(expert))
    tier.device.sleep(5e-4)
    with pytest.raises(SlotAccessError, match=f"slot={lease.slot}.* is read"):
        graph.replay()
