"""Compiled replays against the policy objects, and the bound against trying everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import fewest_misses as fewest_by_trying
from policy_reference import fewest_misses_with_bypass
from simulate_support import header_of, random_trace, random_traces, sequence_of, trace_of

from moert.policies import policy_names
from moert.simulate import fast_policies, future, simulate
from moert.simulate.capacity import Scope
from moert.simulate.events import Reading, first_ids, read_events
from moert.simulate.run import EventSource, Setup, fewest_misses, replay
from moert.trace import Sequence, Trace

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

VARIANTS = [
    "ema,alpha=0.5",
    "lfu,in_cache=true",
    "lfu,decay=0.5",
    "mrs,alpha=0.2",
    "random,seed=-3",
    "s3fifo,small=0.3,threshold=1",
    "slru,protected=0.5",
    "static,warm_up_events=3",
    "wtinylfu,window=0.3,sample=2",
]
scopes = st.sampled_from(["layer", "global"])
resets = st.sampled_from(["never", "sequence"])


def test_most_policies_are_compiled() -> None:
    assert set(policy_names()) - set(fast_policies()) == {"activation_matrix", "ema_ahead"}


@pytest.mark.parametrize("policy", [*fast_policies(), *VARIANTS])
@settings(max_examples=25, deadline=None)
@given(
    trace=random_traces(),
    capacity=st.integers(1, 14),
    scope=scopes,
    reset=resets,
    batch=st.integers(1, 3),
    atomic=st.booleans(),
)
def test_compiled_replays_are_those_of_the_policy_objects(
    policy: str, trace: Trace, capacity: int, scope: Scope, reset: str, batch: int, atomic: bool
) -> None:
    options = {"scope": scope, "reset": reset, "batch": batch, "atomic": atomic, "keep_events": True}
    fast = simulate(trace, policy, capacity, **options)  # type: ignore[arg-type]
    general = simulate(trace, policy, capacity, fast=False, **options)  # type: ignore[arg-type]
    assert (fast.path, general.path) == ("fast", "general")
    assert fast.event_hits is not None
    assert fast.event_hits.tolist() == general.event_hits.tolist()  # type: ignore[union-attr]
    assert {**fast.row(), "path": ""} == {**general.row(), "path": ""}


@settings(max_examples=60, deadline=None)
@given(trace=random_traces(), capacity=st.integers(1, 14), scope=scopes, reset=resets)
def test_compiled_bypass_is_that_of_the_policy_object(trace: Trace, capacity: int, scope: Scope, reset: str) -> None:
    options = {"scope": scope, "reset": reset, "bypass": True, "keep_events": True}
    fast = simulate(trace, "min_bypass", capacity, **options)  # type: ignore[arg-type]
    general = simulate(trace, "min_bypass", capacity, fast=False, **options)  # type: ignore[arg-type]
    assert (fast.path, general.path) == ("fast", "general")
    assert fast.event_hits.tolist() == general.event_hits.tolist()  # type: ignore[union-attr]
    assert fast.transfers == general.transfers <= fast.misses


def test_other_policies_with_bypass_are_replayed_in_python() -> None:
    trace = random_trace(np.random.default_rng(3))
    for policy in ("ema", "lru", "static,warm_up_events=2", "belady"):
        assert simulate(trace, policy, 4, bypass=True).path == "general"


def test_mrs_looks_at_scores_where_there_are_some() -> None:
    sequence = sequence_of([[[0]], [[1]], [[2]], [[0]]] * 3, width=1)
    scores = np.random.default_rng(0).random((12, 1, 3)).astype(np.float32)
    with_scores = Trace(header_of([3], 1), [replace(sequence, scores=scores)])
    found = simulate(with_scores, "mrs", 2, keep_events=True)
    assert found.path == "general"
    without = Trace(header_of([3], 1), [sequence])
    assert simulate(without, "mrs", 2).path == "fast"
    assert found.event_hits.tolist() != simulate(without, "mrs", 2, keep_events=True).event_hits.tolist()  # type: ignore[union-attr]


def as_events(trace: Trace) -> list[tuple[int, ...]]:
    bases = first_ids(trace.header.layers)
    (events,) = read_events(trace, Reading("all"))
    assert bases[-1] == trace.header.layers[0].num_experts
    return [tuple(events.ids[a:b].tolist()) for a, b in zip(events.offsets, events.offsets[1:], strict=False)]


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(lambda one: [one]), min_size=1, max_size=11
    ),
    capacity=st.integers(1, 5),
)
def test_min_is_what_trying_everything_finds(picks: list[list[list[int]]], capacity: int) -> None:
    trace = trace_of([6], picks)
    events = as_events(trace)
    if max(map(len, events)) <= capacity:
        assert simulate(trace, "belady", capacity).misses == fewest_by_trying(events, capacity)
        assert fewest_misses(EventSource(trace, Reading()), capacity, Setup()) == fewest_by_trying(events, capacity)
    bypass = simulate(trace, "min_bypass", capacity, bypass=True)
    assert bypass.misses == fewest_misses_with_bypass(events, capacity)


def fewest_counted(events: list[tuple[tuple[int, ...], bool]], capacity: int) -> int:
    """The least counted misses of any policy that admits each miss, by keeping every set of residents it could have."""
    best = {frozenset[int](): 0}
    for event, counts in events:
        after: dict[frozenset[int], int] = {}
        for residents, misses in best.items():
            now = misses + (len(set(event) - residents) if counts else 0)
            pending = [frozenset(residents | set(event))]
            for held in pending:
                if len(held) <= capacity:
                    after[held] = min(after.get(held, now), now)
                else:
                    pending += [held - {other} for other in held - set(event)]
        best = after
    return min(best.values())


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), st.booleans()),
        min_size=6,
        max_size=14,
    ),
    capacity=st.integers(3, 4),
)
def test_the_bound_is_of_what_counts(tokens: list[tuple[list[int], bool]], capacity: int) -> None:
    """Where prompts do not count, MIN may spend them: it must not be asked to save their misses."""
    trace = trace_of([6], [[chosen] for chosen, _ in tokens])
    (whole,) = trace.sequences
    phases = np.array([counts for _, counts in tokens], dtype=np.uint8)
    phases[-1] = 1
    trace = Trace(trace.header, [Sequence(whole.experts, whole.steps, phases)])
    events = [(tuple(sorted(chosen)), bool(phase)) for (chosen, _), phase in zip(tokens, phases, strict=True)]
    found = fewest_misses(EventSource(trace, Reading()), capacity, Setup())
    assert found == fewest_counted(events, capacity)


def test_the_bound_spends_what_does_not_count() -> None:
    """Two slots; 0 and 1 are there when 2 comes. 0 is needed first but by a prompt, 1 later by a token that counts."""
    trace = trace_of([3], [[[0, 1]], [[2]], [[0]], [[1]]])
    (whole,) = trace.sequences
    trace = Trace(trace.header, [replace(whole, phases=np.array([1, 1, 0, 1], dtype=np.uint8))])
    source = EventSource(trace, Reading())
    assert replay(source, "belady", 2, Setup()).misses == 4
    assert fewest_misses(source, 2, Setup()) == 3


@settings(max_examples=40, deadline=None)
@given(trace=random_traces(), capacity=st.integers(1, 20), scope=scopes, reset=resets)
def test_no_policy_beats_the_bound(trace: Trace, capacity: int, scope: Scope, reset: str) -> None:
    setup = Setup(scope, reset)  # type: ignore[arg-type]
    source = EventSource(trace, Reading())
    fewest = fewest_misses(source, capacity, setup)
    assert fewest is not None
    for policy in policy_names():
        result = replay(source, policy, capacity, setup)
        assert result.misses >= fewest, policy
        assert result.misses >= max(result.forced_misses, result.compulsory_misses if reset == "sequence" else 0)


@settings(max_examples=30, deadline=None)
@given(trace=random_traces(), capacity=st.integers(1, 14), scope=scopes)
def test_the_future_may_lie_on_disk(trace: Trace, capacity: int, scope: Scope) -> None:
    in_memory = simulate(trace, "belady", capacity, scope=scope, keep_events=True)
    before = future.HELD_IDS
    try:
        future.HELD_IDS = 0
        on_disk = simulate(trace, "belady", capacity, scope=scope, keep_events=True)
    finally:
        future.HELD_IDS = before
    assert on_disk.event_hits.tolist() == in_memory.event_hits.tolist()  # type: ignore[union-attr]


def test_the_future_leaves_nothing_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(future, "HELD_IDS", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trace = random_trace(np.random.default_rng(1))
    simulate(trace, "belady", 3)
    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]
