"""Curves in one pass, against a replay at each capacity."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_support import header_of, random_traces, sequence_of, trace_of

from moert.errors import ConfigError
from moert.simulate import miss_curve, simulate
from moert.simulate.capacity import Scope
from moert.trace import Trace

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

IN_ONE_PASS = ["belady", "ema", "ema,alpha=0.5", "lfu", "lfu,decay=0.5", "lfru", "mrs", "static,warm_up_events=3"]


@pytest.mark.parametrize("policy", [*IN_ONE_PASS, "lru", "sieve", "lfu,in_cache=true"])
@settings(max_examples=25, deadline=None)
@given(
    trace=random_traces(),
    scope=st.sampled_from(["layer", "global"]),
    reset=st.sampled_from(["never", "sequence"]),
    atomic=st.booleans(),
)
def test_curves_are_the_replays_at_each_capacity(
    policy: str, trace: Trace, scope: Scope, reset: str, atomic: bool
) -> None:
    curve = miss_curve(trace, policy, scope=scope, reset=reset, atomic=atomic)  # type: ignore[arg-type]
    for capacity, hits in zip(curve.capacities.tolist(), curve.hits.tolist(), strict=True):
        result = simulate(trace, policy, capacity, scope=scope, reset=reset, atomic=atomic)  # type: ignore[arg-type]
        assert hits == result.hits, capacity
        assert curve.accesses == result.accesses
    assert curve.capacities[-1] == curve.n_experts
    if policy in IN_ONE_PASS and (scope == "layer" or policy == "belady"):
        assert curve.method in ("stack", "both")
        assert (curve.hits[1:] >= curve.hits[:-1]).all() or curve.method == "both"


def test_lru_is_one_pass_for_single_accesses_only() -> None:
    trace = trace_of([5], [[[0, 1]], [[2]], [[0]]])
    assert miss_curve(trace, "lru", atomic=False).method == "stack"
    assert miss_curve(trace, "lru").method == "replay"


def test_the_engines_lru_may_hit_less_with_more() -> None:
    """Of an event, what was hit is older than what was missed; so what a larger cache hits may leave it earlier.

    Before 0123 comes, four slots hold 1, 2, 3 of it and five hold all. So 0 is the newest in the smaller cache and the
    oldest in the larger one. Then three others come, and 0 again.
    """
    tokens = [[one] for one in ([0, 1], [2, 3, 4], [0, 1, 2, 3], [5, 6, 7], [0])]
    trace = Trace(header_of([9], 4), [sequence_of(tokens, width=4)])
    small, large = (simulate(trace, "lru", n, keep_events=True).event_hits for n in (4, 5))
    assert small is not None
    assert large is not None
    assert small.tolist() == [0, 0, 3, 0, 1]
    assert large.tolist() == [0, 0, 4, 0, 0]


def test_capacities_that_are_asked_for() -> None:
    trace = trace_of([8, 4], [[[0, 1], [2]], [[2], [3]], [[0], [2]]])
    curve = miss_curve(trace, "lfu", capacities=["50%", 1, 100])
    assert curve.capacities.tolist() == [4, 1, 8]
    assert curve.hits.tolist() == [simulate(trace, "lfu", n).hits for n in (4, 1, 8)]
    assert curve.hit_rate.tolist() == [hits / 7 for hits in curve.hits.tolist()]
    for bad in ("4GiB", "0%", 0, "1%"):
        with pytest.raises(ConfigError, match="capacity"):
            miss_curve(trace, "lfu", capacities=[bad])
