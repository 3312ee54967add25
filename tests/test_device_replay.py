"""Tokens that the device runs by itself while some experts are on disk: passes that are void, and run once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planned_support
import pytest
import torch
import triton_support
from planned_support import EXPERTS, LAYERS, TOP_K, generate, make, tier_of
from transformers import StaticCache

import moert
from moert.device.simulated import SimulatedDevice
from moert.errors import TransferError
from moert.hf import loading
from moert.hf.graphed_forward import WARM_UPS, GraphedForward
from moert.hf.model import runtime_of
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import HYBRID, PLANNED
from moert.types import ExpertId

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETED, reason="triton's interpreter is off: there is a GPU")

PROMPT = torch.tensor([[5, 9, 7, 2]])
TOKENS = range(20, 26)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(folder: Path) -> Iterator[Callable[..., tuple[Any, DeviceTier, GraphedForward]]]:
    models = []

    def load(**options: Any) -> tuple[Any, DeviceTier, GraphedForward]:
        config, device, rest = planned_support.settings(**{"host_memory": "50%", **options})
        model = loading.load(folder, config, None, device=device, device_options=rest)
        models.append(model)
        return model, tier_of(model), vars(model)["forward"]

    yield load
    for model in models:
        moert.close(model)


def decode(model: Any, cache: StaticCache | None = None, tokens: Any = TOKENS) -> list[torch.Tensor]:
    """The logits of a prompt and of some tokens after it."""
    cache = cache or StaticCache(config=model.config, max_cache_len=24)
    with torch.inference_mode():
        found = [model(PROMPT, past_key_values=cache).logits[:, -1:]]
        return found + [model(torch.tensor([[token]]), past_key_values=cache).logits for token in tokens]


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[torch.Tensor]:
    """What the host's decisions give."""
    config, device, rest = planned_support.settings(host_memory="50%", planned=False)
    model = loading.load(folder, config, None, device=device, device_options=rest)
    found = decode(model)
    assert set(tier_of(model).counts.ways) == {"exact"}
    moert.close(model)
    return found


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for place, (got, right) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(got, right), f"token {place}"


def check_books(tier: DeviceTier) -> None:
    """The host has them, they agree, and rows hold what they are said to."""
    tier.settle()
    tier.check_integrity()
    for cache in tier.caches:
        for expert in filter(cache.host.has, cache.residency.residents):
            there = cache.bank.views(cache.row_of(expert))
            for name, tensor in cache.host.weights(expert).items():
                assert torch.equal(there[name], tensor), f"{expert} {name}"


@pytest.mark.parametrize(
    ("host_memory", "policy", "graphs"),
    [
        ("75%", "lru", True),
        pytest.param("50%", "ema", False, marks=pytest.mark.slow),
        ("25%", "ema", True),
        pytest.param("100%", "ema", True, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_that_the_host_decides_about(
    wanted: Any, loaded: Callable[..., Any], host_memory: str, policy: str, graphs: bool
) -> None:
    model, tier, forward = loaded(host_memory=host_memory, policy=policy)
    forward.is_on = graphs
    same(decode(model), wanted)
    assert tier.planned.why_not is None
    stats = moert.stats(model)
    assert (stats.decoding.repeated > 0) == (host_memory != "100%")
    assert stats.decoding.steps == len(TOKENS)
    assert tier.counts.ways[PLANNED] == LAYERS * len(TOKENS)
    assert tier.counts.ways["exact"] == LAYERS * (1 + stats.decoding.repeated)
    assert (forward.captured, forward.replayed) == ((1, len(TOKENS) - WARM_UPS) if graphs else (0, 0))
    # A prompt in between, and another cache.
    same(decode(model), wanted)
    check_books(tier)


def test_the_cpu_has_a_share_only_while_all_experts_are_in_host_memory(wanted: Any, loaded: Callable[..., Any]) -> None:
    model, tier, _ = loaded(host_memory="75%", device_memory="25%", planned=HYBRID)
    sharing = tier.planned.sharing
    assert sharing is not None
    sharing.forced = lambda top_k: [0] * (top_k + 1)
    same(decode(model), wanted)
    assert sharing.mailbox.messages == 0
    assert tier.counts.ways[PLANNED] == LAYERS * len(TOKENS)
    moert.resize(model, host_memory="100%")
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            runtime_of(model).weights(layer, expert)
    for got, right in zip(decode(model), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=2e-5)
    before = sharing.mailbox.messages
    assert before > 0
    moert.resize(model, host_memory="75%")
    same(decode(model), wanted)
    assert sharing.mailbox.messages == before
    check_books(tier)


def choices(model: Any) -> list[list[set[int]]]:
    """What the layers choose for each of `TOKENS`."""
    seen: list[set[int]] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        seen.append({*output[-1].flatten().tolist()})

    handles = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    decode(model)
    for handle in handles:
        handle.remove()
    n = len(handles)
    return [seen[place : place + n] for place in range(n, len(seen), n)]


def take_away(tier: DeviceTier, layer: int, expert: int) -> None:
    """From now on it is on disk only."""
    tier.settle()
    tier.transfers.drain()
    cache, one = tier.caches[layer], ExpertId(layer, expert)
    if one in cache.residency:
        cache.drop([one])
    cache.host.cache.residency.drop(one)


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_whichever_layer_misses_first_the_host_learns_of_each_event_once(at: int, tmp_path: Path) -> None:
    make(num_hidden_layers=3).save_pretrained(tmp_path)
    chosen = choices(make(num_hidden_layers=3))
    found = {}
    for planned in (False, True):
        config, device, rest = planned_support.settings(host_memory="100%", policy="lru", planned=planned)
        model = loading.load(tmp_path, config, None, device=device, device_options=rest)
        tier, forward = tier_of(model), vars(model)["forward"]
        cache = StaticCache(config=model.config, max_cache_len=24)
        with torch.inference_mode():
            found[planned] = [model(PROMPT, past_key_values=cache).logits[:, -1:]]
            told: list[list[list[ExpertId]]] = [[] for _ in range(3)]
            for layer, events in enumerate(told):
                policy = tier.caches[layer].residency.policy
                policy.access = lambda e, a=policy.access, to=events: to.append([*e]) or a(e)  # type: ignore[method-assign]
            for number, token in enumerate(TOKENS):
                take_away(tier, at, min(chosen[number][at]))
                found[planned].append(model(torch.tensor([[token]]), past_key_values=cache).logits)
                assert [layer.cumulative_length.item() for layer in cache.layers] == [5 + number] * 3
        tier.settle()
        for layer, events in enumerate(told):
            assert [{expert.expert for expert in event} for event in events] == [of[layer] for of in chosen]
        stats = moert.stats(model)
        assert all(one.hits + one.misses >= TOP_K * (len(TOKENS) + 1) for one in stats.layers)
        assert stats.decoding.hits + stats.decoding.misses == 3 * TOP_K * len(TOKENS)
        assert stats.decoding.repeated == (len(TOKENS) if planned else 0)
        found[planned].append(torch.tensor([stats.decoding.misses]))
        assert forward.replayed == (len(TOKENS) - WARM_UPS if planned else 0)
        check_books(tier)
        moert.close(model)
    same(found[True], found[False])


def test_the_host_tier_s_policy_learns_what_was_taken_from_it(loaded: Callable[..., Any]) -> None:
    """Of each stay with the device the experts that had no slot when it began, once."""
    model, tier, _ = loaded(host_memory="100%", device_memory="25%")
    chosen = choices(make())
    cache = StaticCache(config=model.config, max_cache_len=24)
    decode(model, cache, tokens=())
    told: list[list[list[int]]] = [[] for _ in range(LAYERS)]
    before = []
    for layer, events in enumerate(told):
        policy = tier.caches[layer].host.cache.residency.policy
        policy.access = lambda e, a=policy.access, to=events: to.append([one.expert for one in e]) or a(e)  # type: ignore[method-assign]
        before.append({one.expert for one in tier.caches[layer].residency.residents})
    with torch.inference_mode():
        for token in TOKENS:
            model(torch.tensor([[token]]), past_key_values=cache)
    assert told == [[] for _ in range(LAYERS)]
    tier.settle()
    for layer, events in enumerate(told):
        known, right = set(before[layer]), []
        for of in chosen:
            right.append(sorted(of[layer] - known))
            known |= of[layer]
        assert events == [event for event in right if event]
        assert events


def test_nobody_who_would_not_run_it_again_gets_a_pass_that_may_be_void(loaded: Callable[..., Any]) -> None:
    model, tier, forward = loaded()
    generate(model, n=4)
    assert PLANNED not in tier.counts.ways
    decode(model, tokens=range(20, 23))
    assert tier.counts.ways[PLANNED] == 3 * LAYERS and tier.is_planning
    before = forward.replayed, tier.counts.ways[PLANNED]
    seen: list[int] = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: seen.append(1))
    decode(model, tokens=range(20, 23))
    handle.remove()
    assert len(seen) == 4, "the prompt and each token once"
    generate(model, n=4)
    assert (forward.replayed, tier.counts.ways[PLANNED]) == before
    decode(model, tokens=range(20, 22))
    assert tier.is_planning
    before = forward.replayed, tier.counts.ways[PLANNED]
    with torch.inference_mode():
        model(torch.tensor([[7]]))
    assert not tier.is_planning and (forward.replayed, tier.counts.ways[PLANNED]) == before


def test_host_memory_of_another_size_between_passes(wanted: Any, loaded: Callable[..., Any]) -> None:
    model, tier, _ = loaded()
    cache = StaticCache(config=model.config, max_cache_len=24)
    found = decode(model, cache, tokens=())
    with torch.inference_mode():
        for place, token in enumerate(TOKENS):
            if place in (1, 3, 4):
                moert.resize(model, host_memory={1: "25%", 3: "100%", 4: "50%"}[place])
                assert not tier.is_planning
            found.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    same(found, wanted)
    check_books(tier)


def test_reading_an_expert_for_somebody_else_evicts_nothing_that_is_copied(
    wanted: Any, loaded: Callable[..., Any]
) -> None:
    model, tier, _ = loaded(host_memory="25%")
    cache = StaticCache(config=model.config, max_cache_len=24)
    found = decode(model, cache, tokens=())
    with torch.inference_mode():
        for place, token in enumerate(TOKENS):
            layer = place % LAYERS
            gone = [e for e in range(EXPERTS) if not tier.caches[layer].host.has(ExpertId(layer, e))]
            runtime_of(model).weights(layer, gone[0])
            assert not tier.is_planning
            found.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    same(found, wanted)
    check_books(tier)


def test_addresses_are_those_of_the_experts_that_are_there_now(loaded: Callable[..., Any]) -> None:
    model, tier, _ = loaded(host_memory="50%")
    passes = tier.planned._passes
    assert passes is not None
    left = 0
    for number in range(14):
        runtime_of(model).weights(0, number * 3 % EXPERTS)
        if number == 9:
            moert.resize(model, host_memory="75%")
        of = passes._layers[0]
        before = of.host.table[0] != 0
        passes.enter()
        here = [of.cache.host.has(ExpertId(0, expert)) for expert in range(EXPERTS)]
        left += int((before & ~torch.tensor(here)).sum())
        for expert, is_here in enumerate(here):
            weights = of.cache.host.weights(ExpertId(0, expert)) if is_here else {}
            addresses = [weights[spec.name].data_ptr() if is_here else 0 for spec in of.cache.bank.specs]
            assert of.addresses[:, expert].tolist() == addresses
        passes.leave()
    assert left > 3


def test_host_memory_that_changes_within_a_pass(
    wanted: Any, loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, forward = loaded(host_memory="25%")
    passes = tier.planned._passes
    assert passes is not None
    changes = []

    def relieve() -> None:
        # A layer has missed, and the next one begins.
        if passes.is_entered and passes._void.item():
            changes.append(1)
            tier.before_host_changes()
            tier.after_host_changes()

    monkeypatch.setattr(runtime_of(model)._sizing, "relieve", relieve)
    forward.is_on = False
    same(decode(model), wanted)
    assert 0 < len(changes) <= moert.stats(model).decoding.repeated
    check_books(tier)


def test_a_disk_that_fails_is_the_error_that_it_is_elsewhere(
    wanted: Any, loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, _ = loaded(host_memory="100%")
    needed = choices(make())[3]
    cache = StaticCache(config=model.config, max_cache_len=24)
    decode(model, cache, tokens=TOKENS[:3])
    take_away(tier, 1, min(needed[1]))
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> Any:
            raise TransferError("no such disk")

        patch.setattr(type(tier.caches[1].host.cache), "_submit", fails)
        with pytest.raises(TransferError, match="no such disk"), torch.inference_mode():
            model(torch.tensor([[TOKENS[3]]]), past_key_values=cache)
    same(decode(model), wanted)
    check_books(tier)


@pytest.mark.parametrize("where", ["planning", pytest.param("model", marks=pytest.mark.slow)])
def test_an_interrupt_costs_no_token(
    where: str, wanted: Any, loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tier, _ = loaded(host_memory="25%")
    caches = [StaticCache(config=model.config, max_cache_len=24) for _ in range(2)]
    found = [decode(model, cache, tokens=TOKENS[:2]) for cache in caches]
    passes = tier.planned._passes
    assert passes is not None
    run = passes.run

    def interrupted(*args: Any) -> Any:
        if where == "planning":
            run(*args)
        else:
            # Nobody has looked at it.
            passes._void.fill_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place = (passes, "run") if where == "planning" else (type(model.model.norm), "forward")
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt), torch.inference_mode():
            model(torch.tensor([[7]]), past_key_values=caches[0])
    with torch.inference_mode():
        found[1] += [model(torch.tensor([[token]]), past_key_values=caches[1]).logits for token in TOKENS[2:]]
    same(found[1], wanted)
    check_books(tier)


def test_taking_over_is_one_copy_each_way(loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tier, _ = loaded()
    decode(model, tokens=TOKENS[:1])
    tier.settle()
    tier.transfers.drain()
    said: list[str] = []
    to_host, stream = SimulatedDevice.to_host, type(tier.device.compute)
    launch = stream.launch
    monkeypatch.setattr(SimulatedDevice, "to_host", lambda self, one: said.append("down") or to_host(self, one))
    monkeypatch.setattr(stream, "launch", lambda self, *args: said.append("up") or launch(self, *args))
    passes = tier.planned._passes
    assert passes is not None
    passes.enter()
    assert said == ["up"]
    passes.leave()
    assert said == ["up", "down"]
