"""Reads ahead in simulated time, tick by tick, and what they can bring at most."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_support import header_of, trace_of

from moert.runtime.look_ahead import LookAhead
from moert.runtime.simulated import simulate_live
from moert.schedule import Costs, Curve
from moert.tiers.native_reads import PIECE_BYTES
from moert.trace import Phase, Sequence, Trace

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

TICK_S = 1 / 64
TOKENS = 12

halves = st.integers(1, 8).map(lambda n: n / 2)
slowdowns = st.sampled_from([1.0, 1.25, 1.5, 2.0])
machines = st.builds(
    lambda cpu, read, start, wait, merge, first, each, cpu_slowdown, read_slowdown: Costs(
        Curve.constant(cpu),
        read_s=read,
        read_start_s=start,
        cpu_start_s=wait,
        merge_s=merge,
        miss_start_s=first,
        miss_s=each,
        cpu_slowdown=cpu_slowdown,
        read_slowdown=read_slowdown,
    ),
    halves,
    halves,
    *[st.sampled_from([0.0, 0.5, 2.0])] * 5,
    slowdowns,
    slowdowns,
)


def never_twice(tokens: int) -> Trace:
    """Two layers of 8 experts that use one after another, and so never find one in a cache of two."""
    experts = np.array([[[token % 8], [(token + 4) % 8]] for token in range(tokens)], np.int32)
    phases = np.full(tokens, Phase.DECODE, np.uint8)
    return Trace(header_of([8, 8], top_k=1), [Sequence(experts, np.arange(tokens), phases)])


def ticked(events: int, costs: Costs, layer_s: float) -> float:
    """Every tick the CPU and the disk each do a little of what they are at, each event's read asked for in the one
    before; returns seconds."""
    queue: list[list[float]] = []
    """Of each read asked for: what is left of it."""

    def ask() -> None:
        queue.append([costs.read_s + (0 if any(left > 0 for (left,) in queue) else costs.read_start_s)])

    def program() -> Iterator[tuple[float, bool]]:
        """(seconds of work, whether the disk and it slow each other down); a wait is work of one tick, again."""
        for event in range(events):
            yield layer_s, True
            is_asked = len(queue) > event
            yield costs.miss_start_s + (0 if is_asked else costs.miss_s), True
            begun = now
            if not is_asked:
                ask()
            if event + 1 < events:
                yield costs.miss_s, True
                ask()
            while queue[event][0] > 0:
                yield TICK_S, False
            yield max(0.0, begun + costs.cpu_start_s - now), False
            yield costs.cpu_s(1), True
            yield costs.merge_s, False

    now = 0.0
    for seconds, slows in program():
        left = seconds
        while left > TICK_S / 2:
            reading = next((read for read in queue if read[0] > 0), None)
            left -= TICK_S / (costs.cpu_slowdown if slows and reading else 1)
            if reading:
                reading[0] -= TICK_S / (costs.read_slowdown if slows else 1)
            now += TICK_S
    return now


@settings(max_examples=30, deadline=None)
@given(costs=machines, layer_s=halves)
def test_reads_ahead_tick_by_tick(costs: Costs, layer_s: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # All that is expected is read: whether that is worth it is tested elsewhere.
        patch.setattr(LookAhead, "_choose", lambda self, chances, *_: list(chances))
        found = simulate_live(
            never_twice(TOKENS),
            "lru",
            2,
            costs,
            layer_s=layer_s,
            predictor="oracle",
            predict_s=0.0,
            expert_bytes=PIECE_BYTES,
        )
    events = 2 * TOKENS
    assert (found.forwarded, found.read_ahead) == (events - 1, events - 1)
    # What ends within a tick ends at its end, and holds the other up for as long.
    assert found.seconds == pytest.approx(ticked(events, costs, layer_s), abs=6 * TICK_S * events)


def test_asking_in_time_hides_what_a_miss_takes_the_cpu() -> None:
    """By hand: 3 s of the disk for each event, 1 of the layer, .25 to compute; .5 for an event that misses, and .5."""
    costs = Costs(Curve.constant(0.25), read_s=3.0, miss_start_s=0.5, miss_s=0.5)
    how = {"layer_s": 1.0, "expert_bytes": PIECE_BYTES}
    alone = simulate_live(never_twice(TOKENS), "lru", 2, costs, **how)
    events = 2 * TOKENS
    assert alone.seconds == pytest.approx(events * (1 + 1 + 3 + 0.25))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LookAhead, "_choose", lambda self, chances, *_: list(chances))
        ahead = simulate_live(never_twice(TOKENS), "lru", 2, costs, predictor="oracle", predict_s=0.0, **how)
    assert ahead.seconds == pytest.approx(1 + 0.5 + 0.5 + events * 3 + 0.25), "the disk never rests"


@settings(max_examples=15, deadline=None)
@given(costs=machines, layer_s=halves, seed=st.integers(0, 99), slots=st.integers(3, 6))
def test_nothing_read_ahead_passes_the_bound(costs: Costs, layer_s: float, seed: int, slots: int) -> None:
    draw = np.random.default_rng(seed)
    picks = [[draw.choice(8, draw.integers(1, 4), replace=False).tolist() for _ in range(2)] for _ in range(16)]
    trace = trace_of([8, 8], picks[:4], picks[4:])
    found = simulate_live(
        trace, "ema", slots, costs, layer_s=layer_s, predictor="oracle", predict_s=0.0, expert_bytes=PIECE_BYTES
    )
    assert found.bound_s <= found.seconds + 1e-9
