"""Misses at every capacity, in one pass over the trace where the policy allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.simulate import _rankings
from moert.simulate._rankings import NEVER
from moert.simulate.capacity import Scope, parse_capacity
from moert.simulate.events import Count, Events, Ints, Reading, TraceSource, first_ids
from moert.simulate.fast import make_rule, read_policy
from moert.simulate.future import Future, next_uses
from moert.simulate.run import EventSource, Reset, Setup, replay, scores_matter

POINTS = 32
"""Capacities of a curve that needs a replay for each, if none are asked for."""

_BY_LAYER = ("lfu", "ema", "mrs", "lfru", "static")


@dataclass(frozen=True, eq=False)
class Curve:
    """What a policy hits at many capacities."""

    trace: str
    policy: str
    scope: str
    capacities: Ints
    """[C] experts, of each layer's cache (no more than the layer has) or of the one cache."""
    accesses: int
    hits: Ints
    """[C]"""
    n_experts: int
    """Of the largest layer, or of all: the capacity at which nothing leaves."""
    method: str
    """"stack": one pass for all; "replay": one replay for each; "both": replays where some event does not fit. All of
    them are exact."""

    @property
    def hit_rate(self) -> npt.NDArray[np.float64]:
        """[C]"""
        return self.hits / self.accesses

    @property
    def miss_ratio(self) -> npt.NDArray[np.float64]:
        """[C]"""
        return 1 - self.hit_rate


def miss_curve(
    trace: TraceSource,
    policy: str,
    *,
    scope: Scope = "layer",
    capacities: Sequence[int | str] | None = None,
    reset: Reset = "never",
    count: Count = "decode",
    batch: int = 1,
    atomic: bool = True,
    name: str | None = None,
) -> Curve:
    """Hits of `policy` at all capacities, or at those asked for (numbers or shares of the experts). Blocks.

    One pass does where the policy evicts by an order that does not depend on the capacity: `belady`; within layers also
    `lfu`, `ema`, `lfru`, `static`, and `mrs` without scores; and `lru` where each event is one expert. The engine's LRU
    takes those of an event that it missed as more recent than those that it hit, and that depends on the capacity: a
    larger cache may even miss more. Everything else is replayed at each capacity, by default at 32 of them.

    Raises:
        as `simulate`; ConfigError also for capacities in bytes.
    """
    source = EventSource(trace, Reading(count, batch, atomic), name)
    layers = source.header.layers
    counts = np.array([layer.num_experts for layer in layers], dtype=np.int64)
    n_experts = int(counts.max() if scope == "layer" else counts.sum())
    asked = None if capacities is None else _asked(capacities, n_experts)
    largest, accesses = _sizes(source)
    if not accesses:
        raise ConfigError(f'nothing counts in {source.name}; count="all" counts every step')
    setup = Setup(scope, reset)
    if not _has_order(source, policy, scope, largest):
        chosen = np.unique(np.linspace(1, n_experts, POINTS).round().astype(np.int64)) if asked is None else asked
        hits = np.array([replay(source, policy, int(one), setup).hits for one in chosen])
        return Curve(source.name, policy, scope, chosen, accesses, hits, n_experts, "replay")
    chosen = np.arange(1, n_experts + 1) if asked is None else asked
    by_capacity = _stack(source, policy, setup, counts)
    least = min(largest, n_experts)
    few = chosen < least
    hits = by_capacity[chosen]
    if few.any() and asked is None:
        # Only a few of those in which some event does not fit, as for any curve that needs replays.
        small = np.unique(np.linspace(1, least - 1, min(least - 1, POINTS // 4)).round().astype(np.int64))
        chosen = np.concatenate([small, np.arange(least, n_experts + 1)])
        few, hits = chosen < least, by_capacity[chosen]
    hits[few] = [replay(source, policy, int(one), setup).hits for one in chosen[few]]
    return Curve(source.name, policy, scope, chosen, accesses, hits, n_experts, "both" if few.any() else "stack")


def _asked(capacities: Sequence[int | str], n_experts: int) -> Ints:
    found = []
    for one in capacities:
        capacity = parse_capacity(one)
        if capacity.experts is not None:
            found.append(min(capacity.experts, n_experts))
        elif capacity.budget is not None and capacity.budget.share is not None:
            found.append(int(capacity.budget.share * n_experts + 1e-9))
        else:
            raise ConfigError(f"capacity {capacity.text} is in bytes; a curve is over numbers or shares of the experts")
        if found[-1] < 1:
            raise ConfigError(f"capacity {capacity.text} is less than one of {n_experts} experts")
    return np.array(found, dtype=np.int64)


def _sizes(source: EventSource) -> tuple[int, int]:
    """The largest event, and the counted accesses."""
    largest = accesses = 0
    for chunk in source:
        largest = max(largest, int(chunk.sizes.max(initial=0)))
        accesses += int(chunk.sizes[chunk.counted].sum())
    return largest, accesses


def _has_order(source: EventSource, policy: str, scope: Scope, largest: int) -> bool:
    name, parameters = read_policy(policy)
    if name == "lru":
        return largest == 1
    if name in ("belady", "min_bypass"):
        return True
    if scope == "global" or name not in _BY_LAYER or scores_matter(source, name):
        return False
    return not parameters.get("in_cache", False)


def _stack(source: EventSource, policy: str, setup: Setup, counts: Ints) -> Ints:
    """[capacity] hits, for 0 to the largest capacity."""
    name, parameters = read_policy(policy)
    bases = first_ids(source.header.layers)
    is_layered = setup.scope == "layer"
    n_all = int(bases[-1])
    spans = np.arange(len(counts) + 1) if is_layered else np.array([0, len(counts)])
    room = counts if is_layered else np.array([n_all])
    rule = make_rule(name, parameters)
    if name == "lru":
        rule = rule._replace(kind=_rankings.LAST)
    needs_future = rule.kind == _rankings.BELADY
    found = np.zeros((len(room), int(room.max()) + 1), np.int64)
    resets = setup.reset == "sequence"

    def fresh() -> tuple[_rankings.RankState, npt.NDArray[np.int32], npt.NDArray[np.int32], Ints]:
        state = _rankings.make_state(bases, spans, room)
        return state, np.zeros(n_all, np.int32), np.zeros(n_all, np.int32), np.zeros(len(room), np.int64)

    state = fresh()
    future = Future(source, n_all) if needs_future and not resets else None
    uses = iter(future) if future is not None else None
    for chunk in source:
        for begin, end in chunk.spans() if resets else [(0, len(chunk))]:
            part = chunk.part(begin, end)
            next_use = np.zeros(0, np.int64) if uses is None else next(uses)
            if resets:
                state = fresh()
                if needs_future:
                    nothing = np.full(n_all, NEVER, np.int64)
                    next_use = next_uses(part.offsets, part.ids, np.zeros(0, np.bool_), 0, nothing)
            _add_depths(rule, state, part, next_use, found, is_layered=is_layered)
    if future is not None:
        future.close()
    # A cache of one layer is no larger than the layer, so that beyond it hits stay the same.
    hits: Ints = np.cumsum(found, axis=1).sum(axis=0)
    return hits


def _add_depths(
    rule: _rankings.Rule,
    state: tuple[_rankings.RankState, npt.NDArray[np.int32], npt.NDArray[np.int32], Ints],
    events: Events,
    next_use: Ints,
    found: Ints,
    *,
    is_layered: bool,
) -> None:
    ranks, stack, depth, length = state
    caches = events.layer if is_layered else np.zeros_like(events.layer)
    at = (caches, events.layer, events.offsets, events.ids)
    _rankings.run_stack(rule, ranks, *at, next_use, events.counted, stack, depth, length, found)
