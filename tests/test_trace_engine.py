"""The live engine and a replay of the trace recorded of it: hits and misses must be equal, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import build

import moert
from moert.hf.model import runtime_of
from moert.policies import Policy, make_policy, policy_names
from moert.residency import Residency, Split
from moert.trace.scores import mean_scores
from moert.trace.sequence import NO_EXPERT, Phase
from moert.trace.trace import Trace
from moert.types import ExpertId

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

Event = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Layer, hits, misses."""

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "longcat_flash", "dbrx", "zaya", "jamba", "diffusion_gemma")
TEXTS = (((5, 17, 33, 8, 61), (9,), (40, 41, 42)), ((77, 3, 12),), ((30, 31), (6, 7, 8, 9, 10, 11, 12), (88,)))
"""Batches of prompts, one after the other."""


class Told(Policy):
    """LRU that also notes what it is told of scores and sequences, and forgets its order when a sequence begins."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.inner = make_policy("lru", capacity)
        self.notes: list[Any] = []

    def access(self, event: Sequence[ExpertId]) -> None:
        self.notes.append(len(event))
        self.inner.access(event)

    def admit(self, expert: ExpertId) -> None:
        self.inner.admit(expert)

    def evict(self, expert: ExpertId) -> None:
        self.inner.evict(expert)

    def victim(self, locked: Any) -> ExpertId:
        return self.inner.victim(locked)

    def observe_scores(self, layer: int, scores: Sequence[float]) -> None:
        self.notes.append((layer, tuple(scores)))

    def begin_sequence(self) -> None:
        self.notes.append("sequence")


def replay(trace: Trace, policies: Sequence[Policy]) -> list[Event]:
    """The simplest replay there is: steps by number, layers in order, one cache a layer."""
    caches = [Residency(policy.capacity, policy) for policy in policies]
    events: list[Event] = []
    for step in sorted({int(step) for sequence in trace for step in sequence.steps}):
        rows = [(sequence, sequence.steps == step) for sequence in trace if (sequence.steps == step).any()]
        if any(here[0] for _, here in rows):
            for cache in caches:
                cache.policy.begin_sequence()
        for layer, cache in enumerate(caches):
            chosen = np.unique(np.concatenate([sequence.experts[here, layer].ravel() for sequence, here in rows]))
            event = [ExpertId(layer, int(expert)) for expert in chosen if expert != NO_EXPERT]
            if not event:
                continue
            scores = [sequence.scores[here, layer] for sequence, here in rows if sequence.scores is not None]
            if scores:
                n_experts = trace.header.layers[layer].num_experts
                cache.policy.observe_scores(layer, mean_scores(np.concatenate(scores)[:, :n_experts]))
            events.append(run_event(cache, event))
    return events


def run_event(cache: Residency, event: list[ExpertId]) -> Event:
    split = cache.begin(event)
    cache.promise()
    for expert in split.hits:
        cache.release(expert)
    for expert in split.misses:
        assert cache.admit(expert) is not None
        cache.arrive(expert)
        cache.release(expert)
    cache.end()
    return as_event(split)


def as_event(split: Split) -> Event:
    return (
        (split.hits or split.misses)[0].layer,
        tuple(expert.expert for expert in split.hits),
        tuple(expert.expert for expert in split.misses),
    )


@pytest.fixture
def live_events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What every step of the engine finds, in order."""
    events: list[Event] = []
    begin, begin_hits = Residency.begin, Residency.begin_hits

    def noting(self: Residency, event: Sequence[ExpertId]) -> Split:
        split = begin(self, event)
        events.append(as_event(split))
        return split

    def noting_hits(self: Residency, event: Sequence[ExpertId]) -> bool:
        begun = begin_hits(self, event)
        if begun:
            events.append(as_event(Split(tuple(event), (), ())))
        return begun

    monkeypatch.setattr(Residency, "begin", noting)
    monkeypatch.setattr(Residency, "begin_hits", noting_hits)
    return events


def generate(model: Any, texts: Sequence[Sequence[int]], n: int = 6) -> None:
    """Greedy, the prompts padded on the left."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    model = getattr(model, "thinker", model)
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )


def run(model: Any, *, texts: Any = TEXTS, scores: bool = False) -> Trace:
    with moert.record(model, scores=scores) as trace:
        for batch in texts:
            generate(model, batch)
        with torch.no_grad():
            model(input_ids=torch.tensor([[4, 5, 6, 7, 8, 9, 10]]))
    return trace


def capacities(model: Any) -> list[int]:
    return [layer.residency.capacity for layer in runtime_of(model).layers]


def assert_same(model: Any, trace: Trace, policy: str, events: list[Event]) -> None:
    live = list(events)
    events.clear()
    found = replay(trace, [make_policy(policy, capacity) for capacity in capacities(model)])
    events.clear()
    assert len(live) == len(found)
    for number, (one, other) in enumerate(zip(live, found, strict=True)):
        assert one == other, f"event {number}"
    stats = moert.stats(model)
    assert sum(len(misses) for _, _, misses in found) == stats.misses
    if not runtime_of(model).layers[0].spec.num_identity:
        assert sum(len(hits) for _, hits, _ in found) == stats.hits


@pytest.mark.parametrize("policy", policy_names(live_only=True))
def test_hits_of_the_engine_are_those_of_the_replay(policy: str, live_events: list[Event]) -> None:
    model = build("olmoe")
    for share in ("30%", "50%", "80%"):
        with moert.patch(model, host_memory=share, policy=policy, predictor="none", debug=True):
            live_events.clear()
            trace = run(model, scores=True)
            assert max(len(hits) + len(misses) for _, hits, misses in live_events) > min(capacities(model))
            assert_same(model, trace, policy, live_events)


@pytest.mark.parametrize("policy", ["ema", "random,seed=3", "s3fifo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, policy: str, live_events: list[Event]) -> None:
    model = build(family)
    plain = family == "diffusion_gemma"
    for share in ("35%", "65%"):
        with moert.patch(model, host_memory=share, policy=policy, predictor="none"):
            live_events.clear()
            if plain:
                ids = torch.arange(3, 15).view(2, 6)
                with moert.record(model) as trace, torch.no_grad():
                    for _ in range(4):
                        model(input_ids=ids, decoder_input_ids=ids.flip(1))
            else:
                trace = run(model)
            assert live_events
            assert_same(model, trace, policy, live_events)


def test_the_simulator_agrees_too(live_events: list[Event]) -> None:
    simulate = pytest.importorskip("moert.simulate").simulate
    for policy in ("lru", "lfu", "ema", "mrs", "activation_matrix", "arc"):
        model = build("olmoe")
        with moert.patch(model, host_memory="50%", policy=policy, predictor="none"):
            live_events.clear()
            trace = run(model, scores=True)
            (capacity,) = set(capacities(model))
            live = [len(hits) for _, hits, _ in live_events]
            for fast in (True, False):
                result = simulate(trace, policy, capacity, count="all", keep_events=True, fast=fast)
                assert result.event_hits.tolist() == live, (policy, fast)


def test_policies_are_told_the_same_live_as_in_a_replay(live_events: list[Event]) -> None:
    model = build("deepseek_v3")
    with moert.patch(model, host_memory="60%", policy="test_trace_engine:Told", predictor="none"):
        trace = run(model, scores=True)
        live: list[Any] = [layer.residency.policy for layer in runtime_of(model).layers]
        again = [Told(capacity) for capacity in capacities(model)]
        replay(trace, again)
        assert live[0].notes.count("sequence") == len(TEXTS) + 1
        assert any(isinstance(note, tuple) for note in live[0].notes)
        for one, other in zip(live, again, strict=True):
            assert one.notes == other.notes
    # Nothing of it is left.
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_policies_that_ask_for_nothing_cost_no_hook() -> None:
    model = build("olmoe")
    with moert.patch(model, host_memory="60%", policy="lru", predictor="none", dense_kernels=False):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_policy_is_told_when_a_model_has_no_scores_to_give() -> None:
    model = build("phimoe")
    with moert.patch(model, host_memory="60%", policy="mrs", predictor="none"):
        with pytest.warns(RuntimeWarning, match=r"puts out the router's scores, which policy='mrs' decides by"):
            model(input_ids=torch.tensor([[4, 5, 6]]))
        model(input_ids=torch.tensor([[4, 5, 6]]))


def test_padding_and_phases_are_what_was_run(live_events: list[Event]) -> None:
    model = build("olmoe")
    with moert.patch(model, host_memory="50%", policy="lru", predictor="none"):
        trace = run(model, texts=TEXTS[:1])
    assert [list(sequence.phases).count(Phase.PADDING) for sequence in trace] == [0, 4, 2, 0]
    assert [list(sequence.phases).count(Phase.DECODE) for sequence in trace] == [5, 5, 5, 0]
