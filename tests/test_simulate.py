"""What a replay reports: the toy trace of the literature, capacities, bytes, and bad input."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_support import header_of, random_trace, random_traces, sequence_of, trace_of

from moert.config import Budget
from moert.errors import CapacityError, ConfigError
from moert.plan import LayerNeed, plan_slots
from moert.policies import Policy, policy_names
from moert.simulate import Result, parse_capacity, simulate
from moert.simulate.capacity import expert_sizes, plan_caches
from moert.trace import Trace
from moert.types import ExpertId

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")


def toy() -> Trace:
    """The hand-checkable trace of moe-cache-eval (arXiv 2608.07911): each layer needs 01, 02, 01, 03, 01."""
    return trace_of([4, 4, 4], [[chosen] * 3 for chosen in ([0, 1], [0, 2], [0, 1], [0, 3], [0, 1])], top_k=3)


@pytest.mark.parametrize("fast", [True, False])
def test_the_toy_trace_of_thirty_accesses(fast: bool) -> None:
    result = simulate(toy(), "lru", 2, keep_events=True, fast=fast)
    assert (result.accesses, result.hits, result.misses) == (30, 12, 18)
    assert result.event_hits.tolist() == [0, 0, 0, *[1] * 12]  # type: ignore[union-attr]
    assert result.layer_hits.tolist() == [4, 4, 4]
    assert result.capacity_experts == 6
    assert result.compulsory_misses == 12
    assert result.forced_misses == 0
    assert result.misses_per_token == 18 / 5


def test_every_number_by_hand() -> None:
    # A prompt of two tokens needs 0, 1, 2 and warms; then 2, 0, 3, 0 count.
    sequence = sequence_of([[[0, 1]], [[1, 2]], [[2]], [[0]], [[3]], [[0]]], num_prompt=2)
    trace = Trace(header_of([4], nbytes=[100]), [sequence])
    result = simulate(trace, "lru", 3, name="by hand")
    # Steps: the prompt ends in the step of its last token, which is not counted.
    assert result.row() == {
        "trace": "by hand",
        "policy": "lru",
        "scope": "layer",
        "reset": "never",
        "count": "decode",
        "batch": 1,
        "capacity": "3",
        "capacity_experts": 3,
        "capacity_bytes": 300,
        "accesses": 4,
        "hits": 3,
        "hit_rate": 0.75,
        "misses": 1,
        "misses_per_token": 0.25,
        "tokens": 4,
        "events": 4,
        "picks": 4,
        "bytes_moved": 100,
        "byte_miss_ratio": 0.25,
        "transfers": 1,
        "compulsory_misses": 1,
        "forced_misses": 0,
        "min_misses": None,
        "gap_misses": None,
        "gap_closed": None,
        "path": "fast",
    }
    everything = simulate(trace, "lru", 3, count="all")
    assert (everything.accesses, everything.misses, everything.tokens, everything.picks) == (7, 4, 6, 8)
    assert json.loads(json.dumps(everything.row(interval=True)))["hit_rate_low"] is None


def test_cold_and_persistent() -> None:
    trace = trace_of([4], [[[0]], [[0]]], [[[0]], [[1]]])
    assert simulate(trace, "lru", 2).hits == 2
    cold = simulate(trace, "lru", 2, reset="sequence")
    assert cold.hits == 1
    assert cold.sequence_hits.tolist() == [1, 0]
    assert cold.sequence_accesses.tolist() == [2, 2]
    assert cold.compulsory_misses == 3
    assert simulate(trace, "lru", 2).compulsory_misses == 2


def test_layers_share_a_global_cache() -> None:
    trace = trace_of([2, 2], [[[0], [1]]] * 3)
    layered = simulate(trace, "lru", 1)
    assert (layered.hits, layered.layer_hits.tolist(), layered.layer_accesses.tolist()) == (4, [2, 2], [3, 3])
    # Less than a cycle through the layers is nothing to LRU.
    assert simulate(trace, "lru", 1, scope="global").hits == 0
    shared = simulate(trace, "lru", 2, scope="global")
    assert shared.hits == 4
    assert (layered.layer_capacity.tolist(), shared.layer_capacity.tolist()) == ([1, 1], [2])
    assert layered.layers == ("layers.0", "layers.1")


@pytest.mark.parametrize("policy", policy_names())
def test_forced_misses_are_counted(policy: str) -> None:
    trace = trace_of([9], [[[0, 1, 2]], [[0, 1, 2]], [[0, 1, 2]], [[3]]])
    result = simulate(trace, policy, 2)
    assert result.forced_misses == 3
    assert result.misses >= 3 + 3
    everything = simulate(trace, policy, 9)
    assert (everything.forced_misses, everything.misses) == (0, 4)


@settings(max_examples=50, deadline=None)
@given(
    trace=random_traces(nbytes=True),
    budget=st.integers(3, 60),
    policy=st.sampled_from([name for name in policy_names() if name != "activation_matrix"]),
)
def test_bytes_are_shared_out_as_the_engine_does(trace: Trace, budget: int, policy: str) -> None:
    layers = trace.header.layers
    needs = [LayerNeed(layer.name, layer.num_experts, layer.expert_bytes, 1, layer.top_k) for layer in layers]
    if budget < sum(layer.expert_bytes for layer in layers):
        with pytest.raises(CapacityError, match="one expert in each"):
            simulate(trace, policy, f"{budget}B")
        return
    result = simulate(trace, policy, f"{budget}B")
    slots = result.layer_capacity.tolist()
    if budget >= sum(need.top_k * need.slot_bytes for need in needs):
        assert slots == plan_slots(needs, Budget(nbytes=budget))
    assert result.capacity_bytes is not None
    assert result.capacity_bytes <= budget
    assert result.capacity_experts == sum(slots)


class Strict(Policy):
    """FIFO that sees to it that the bytes of residents stay within the capacity."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._held: list[ExpertId] = []

    def access(self, event: Sequence[ExpertId]) -> None:
        assert sum(map(self.size, self._held)) <= self.capacity

    def admit(self, expert: ExpertId) -> None:
        self._held.append(expert)
        assert sum(map(self.size, self._held)) <= self.capacity

    def evict(self, expert: ExpertId) -> None:
        self._held.remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return next(expert for expert in self._held if expert not in locked)


@settings(max_examples=40, deadline=None)
@given(trace=random_traces(nbytes=True), budget=st.integers(3, 40), bypass=st.booleans())
def test_a_byte_budget_is_kept_by_experts_of_several_sizes(trace: Trace, budget: int, bypass: bool) -> None:
    policy = f"{__name__}:Strict"
    result = simulate(trace, policy, f"{budget}B", scope="global", bypass=bypass)
    sizes = np.array([layer.expert_bytes for layer in trace.header.layers])
    missed = result.layer_accesses - result.layer_hits
    assert result.bytes_moved is not None
    assert result.bytes_moved == missed @ sizes
    assert result.byte_miss_ratio == pytest.approx(missed @ sizes / (result.layer_accesses @ sizes))
    if len(set(sizes.tolist())) > 1:
        assert result.path == "general"
        assert result.row()["capacity_bytes"] == min(
            budget, sum(layer.num_experts * layer.expert_bytes for layer in trace.header.layers)
        )


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_takes_a_byte_budget(policy: str) -> None:
    traces = (random_trace(np.random.default_rng(seed), nbytes=True) for seed in itertools.count())
    trace = next(one for one in traces if len({layer.expert_bytes for layer in one.header.layers}) == 3)
    result = simulate(trace, policy, "14B", scope="global")
    assert 0 < result.hits < result.accesses


def test_ones_own_policy_is_replayed_as_it_is() -> None:
    trace = random_trace(np.random.default_rng(2))
    own = simulate(trace, f"{__name__}:Strict", 3, keep_events=True)
    assert own.path == "general"
    fifo = simulate(trace, "fifo", 3, keep_events=True)
    assert own.event_hits.tolist() == fifo.event_hits.tolist()  # type: ignore[union-attr]


def test_equal_sizes_are_counted_and_compiled() -> None:
    trace = trace_of([4, 4], [[[0], [1]], [[0], [1]]], nbytes=[10, 10])
    result = simulate(trace, "lru", "55B", scope="global")
    assert (result.path, result.capacity_experts, result.capacity_bytes) == ("fast", 5, 50)


def test_sizes_may_be_given() -> None:
    trace = trace_of([4, 4], [[[0], [1]], [[0], [2]]])
    assert simulate(trace, "lru", 1).bytes_moved is None
    assert simulate(trace, "lru", 1).capacity_bytes is None
    assert simulate(trace, "lru", 1, expert_bytes=7).bytes_moved == 21
    assert simulate(trace, "lru", 1, expert_bytes=[7, 100]).bytes_moved == 207
    with pytest.raises(ConfigError, match="does not say how large"):
        simulate(trace, "lru", "1GiB")
    for bad in (0, -1, [1], [1, 0]):
        with pytest.raises(ConfigError, match="expert_bytes"):
            simulate(trace, "lru", 1, expert_bytes=bad)


def test_layers_of_several_sizes_keep_the_same_share() -> None:
    trace = trace_of([4, 12], [[[0], [1]]])
    assert simulate(trace, "lru", "50%").layer_capacity.tolist() == [2, 6]
    assert simulate(trace, "lru", "50%", scope="global").layer_capacity.tolist() == [8]
    assert simulate(trace, "lru", 8).layer_capacity.tolist() == [4, 8]
    assert simulate(trace, "lru", 10**18).layer_capacity.tolist() == [4, 12]
    assert simulate(trace, "lru", "999TiB", expert_bytes=3).layer_capacity.tolist() == [4, 12]


@pytest.mark.parametrize("capacity", [0, -3, "0", "-5", "0%", "101%", "", "many", "nan", 2.5, True, None, "4 parrots"])
def test_capacities_that_are_none(capacity: Any) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        parse_capacity(capacity)


def test_less_than_one_expert() -> None:
    trace = trace_of([4, 40], [[[0], [1]]], nbytes=[10, 20])
    with pytest.raises(CapacityError, match=r'10% is less than one of the 4 experts of layers.0; give at least "25%"'):
        simulate(trace, "lru", "10%")
    with pytest.raises(CapacityError, match=r"15 B \(15 bytes\) for one cache .* at least 20 B \(20 bytes\)$"):
        simulate(trace, "lru", "15B", scope="global")
    assert simulate(trace, "lru", "20B", scope="global").capacity_bytes == 20
    with pytest.raises(CapacityError, match=r"29 B \(29 bytes\) for 2 layers .* at least 30 B \(30 bytes\)$"):
        simulate(trace, "lru", "29B")
    sizes = expert_sizes(trace.header.layers)
    assert plan_caches(parse_capacity("30B"), trace.header.layers, "layer", sizes).capacity.tolist() == [1, 1]


def test_nothing_to_count() -> None:
    prompt = Trace(header_of([4]), [sequence_of([[[0]], [[1]]], num_prompt=2)])
    with pytest.raises(ConfigError, match=r'nothing counts in small.*count="all"'):
        simulate(prompt, "lru", 2)
    assert simulate(prompt, "lru", 2, count="all").accesses == 2
    with pytest.raises(ConfigError, match="0 sequences"):
        simulate(Trace(header_of([4]), []), "lru", 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "clairvoyant"}, "clairvoyant"),
        ({"policy": "ema,alpha=7"}, "alpha"),
        ({"policy": "ema,beta=7"}, "beta"),
        ({"scope": "model"}, "scope"),
        ({"reset": "often"}, "reset"),
        ({"count": "none"}, "count"),
        ({"batch": 0}, "batch"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(**{"trace": toy(), "policy": "lru", "capacity": 2, **options})


def test_intervals_hold_the_true_rate_about_as_often_as_they_say() -> None:
    """Sequences of a known hit rate: in 200 draws, a 90 % interval must hold it in about 180."""
    rng = np.random.default_rng(0)
    held = 0
    empty = simulate(toy(), "lru", 2)
    for _ in range(200):
        rates = rng.beta(8, 4, 40)
        accesses = np.full(40, 500)
        hits = rng.binomial(accesses, rates)
        result = Result(**{**vars(empty), "sequence_hits": hits, "sequence_accesses": accesses})
        low, high = result.interval(0.9, resamples=400)  # type: ignore[misc]
        held += low <= 8 / 12 <= high
    assert 165 <= held <= 195
    assert result.interval(0.9) == result.interval(0.9), "the seed is the same"
    assert result.interval(0.9) != result.interval(0.9, seed=1)


def test_intervals_that_say_nothing() -> None:
    empty = simulate(toy(), "lru", 2)
    assert empty.interval() is None, "one sequence says nothing about others"

    def of(hits: list[int], accesses: list[int]) -> Result:
        return Result(**{**vars(empty), "sequence_hits": np.array(hits), "sequence_accesses": np.array(accesses)})

    assert of([1, 2], [2, 4]).interval() == (0.5, 0.5)
    assert of([1, 0], [2, 0]).interval() is None
    low, high = of([0, 9], [9, 9]).interval()  # type: ignore[misc]
    assert 0 <= low < high <= 1
