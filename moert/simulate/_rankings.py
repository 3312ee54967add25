"""Policies whose victim is the resident with the lowest rank, compiled: what they do is what `moert.policies` does.

A layer's residents stand together, each with its rank, and a victim costs a look at all of them: there are few, and
they are next to each other. The rank of a locked one is taken as infinite.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moert.simulate._compile import compiled

DECAYED, BELADY, STATIC, LFRU, RANDOM, LAST = range(6)
"""LAST ranks by the last event, which is LRU where each event is one expert; in stacks only."""

NEVER = np.iinfo(np.int64).max
"""Number of the next event of an expert that has none."""


class RankState(NamedTuple):
    """N experts of L layers in C caches; every array is changed in place."""

    place: np.ndarray
    """[N] int32 where in `held` an expert is, -1 if it is not resident."""
    held: np.ndarray
    """[N] int32 residents, those of each layer (RANDOM: of each cache) from its base on."""
    ranks: np.ndarray
    """[N] float64 of those in `held`; infinite while locked."""
    ties: np.ndarray
    """[N] int64, by expert: of equal ranks the lower one leaves, then the lower id."""
    count: np.ndarray
    """[L] int64 residents by layer (RANDOM: by cache)."""
    sums: np.ndarray
    """[N] float64 decayed sums, or counts."""
    last: np.ndarray
    """[N] int64 the event (DECAYED: of its layer) of an expert's last use."""
    locked: np.ndarray
    """[N] int64 the event for which an expert is locked."""
    rank_of: np.ndarray
    """[N] float64 a resident's rank, locked or not."""
    events: np.ndarray
    """[L] int64 events of each layer."""
    cache_events: np.ndarray
    """[C] int64; RANDOM: evictions."""
    capacity: np.ndarray
    """[C] int64"""
    bases: np.ndarray
    """[L + 1] int64 where each layer's experts begin."""
    spans: np.ndarray
    """[C + 1] int64 where each cache's layers begin."""
    order: np.ndarray
    """[2] int64: uses so far; events so far."""


class Rule(NamedTuple):
    """What does not change."""

    kind: int
    factor: float
    amount: float
    """What a use adds."""
    burst: float
    """Of `amount`, 1 - `burst`^g counts, where g events of the layer have been since the use before."""
    is_shared: bool
    """`amount` is for an event's experts together (MRS)."""
    in_cache: bool
    """Uses before an expert was last evicted do not count."""
    warm_up: int
    """Events of a layer that STATIC counts."""
    seed: int
    bypass: bool
    """MIN with bypass, where misses pass by."""


def make_state(bases: np.ndarray, spans: np.ndarray, capacity: np.ndarray) -> RankState:
    """Empty caches."""
    n_experts, n_layers, n_caches = int(bases[-1]), len(bases) - 1, len(capacity)
    return RankState(
        np.full(n_experts, -1, np.int32),
        np.zeros(n_experts, np.int32),
        np.zeros(n_experts),
        np.zeros(n_experts, np.int64),
        np.zeros(n_layers, np.int64),
        np.zeros(n_experts),
        np.zeros(n_experts, np.int64),
        np.zeros(n_experts, np.int64),
        np.zeros(n_experts),
        np.zeros(n_layers, np.int64),
        np.zeros(n_caches, np.int64),
        capacity.astype(np.int64),
        bases.astype(np.int64),
        spans.astype(np.int64),
        np.zeros(2, np.int64),
    )


@compiled
def run(rule, s, caches, layers, offsets, ids, next_use, n_passing, hits, transfers, misses, at):
    """Replay events; `hits` [N] and `transfers` [N] are written, and `misses` and `at` [experts] used.

    `next_use` is as long as `ids`, or empty. `n_passing` is `moert.turnover.PASSING`.
    """
    for event in range(len(caches)):
        cache, layer = caches[event], layers[event]
        capacity = s.capacity[cache]
        begin, end = offsets[event], offsets[event + 1]
        s.order[1] += 1
        now = s.order[1]
        n_residents = 0
        for one in range(s.spans[cache], s.spans[cache + 1]):
            n_residents += s.count[one]
        n_misses = 0
        for i in range(begin, end):
            x = ids[i]
            if s.place[x] >= 0:
                s.locked[x] = now
            else:
                misses[n_misses] = x
                at[n_misses] = i
                n_misses += 1
        n_members = end - begin - n_misses
        hits[event] = n_members
        _access(rule, s, cache, layer, begin, end, ids, next_use)
        if rule.bypass:
            for i in range(begin, end):
                _unlock(s, ids[i])
            transfers[event] = _admit_wanted(rule, s, cache, layer, misses[:n_misses], at, next_use, n_residents)
            continue
        transfers[event] = n_misses
        passing = False
        n_kept = min(n_passing - 1, capacity - 1)
        for j in range(n_misses):
            x = misses[j]
            if n_residents == capacity:
                if passing:
                    if j > n_kept:
                        _unlock(s, misses[j - n_kept - 1])
                elif n_members == capacity:
                    passing = True
                    for i in range(begin, end):
                        _unlock(s, ids[i])
                    for i in range(max(0, j - n_kept), j):
                        _lock(s, misses[i], now)
                _evict(rule, s, cache, _victim(rule, s, cache, now))
                n_residents -= 1
                if passing:
                    n_members -= 1
            _admit(rule, s, cache, layer, x, next_use[at[j]] if rule.kind == BELADY else 0)
            _lock(s, x, now)
            n_residents += 1
            n_members += 1
        for i in range(begin, end):
            _unlock(s, ids[i])


@compiled
def _admit_wanted(rule, s, cache, layer, misses, at, next_use, n_residents):
    """Once the event is over: those misses that are needed again before who would leave; how many that are."""
    admitted = 0
    for j in range(len(misses)):
        x = misses[j]
        if n_residents == s.capacity[cache]:
            victim = _victim(rule, s, cache, s.order[1])
            if -_rank_of_next(next_use[at[j]]) >= -s.rank_of[victim]:
                continue
            _evict(rule, s, cache, victim)
            n_residents -= 1
        _admit(rule, s, cache, layer, x, next_use[at[j]])
        n_residents += 1
        admitted += 1
    return admitted


@compiled
def _rank_of_next(event):
    return -math.inf if event == NEVER else -float(event)


@compiled
def _lock(s, x, now):
    s.locked[x] = now
    if s.place[x] >= 0:
        s.ranks[s.place[x]] = math.inf


@compiled
def _unlock(s, x):
    s.locked[x] = 0
    if s.place[x] >= 0:
        s.ranks[s.place[x]] = s.rank_of[x]


@compiled
def _access(rule, s, cache, layer, begin, end, ids, next_use):
    s.events[layer] += 1
    n = end - begin
    if rule.kind == DECAYED:
        amount = rule.amount * (1.0 / n) if rule.is_shared else rule.amount
        for i in range(begin, end):
            x = ids[i]
            if s.place[x] < 0 and rule.in_cache:
                s.sums[x] = 0.0
            if s.sums[x] > 0.0:
                age = float(s.events[layer] - s.last[x])
                fresh = amount * (1.0 - math.pow(rule.burst, age))
                s.sums[x] = s.sums[x] * math.pow(rule.factor, age) + fresh
            else:
                s.sums[x] = amount
            s.last[x] = s.events[layer]
            s.order[0] += 1
            s.ties[x] = s.order[0]
            if s.place[x] >= 0:
                _rank(rule, s, x)
    elif rule.kind == BELADY:
        for i in range(begin, end):
            if s.place[ids[i]] >= 0:
                s.rank_of[ids[i]] = _rank_of_next(next_use[i])
    elif rule.kind == STATIC:
        if s.events[layer] <= rule.warm_up:
            for i in range(begin, end):
                s.sums[ids[i]] += 1.0
                s.rank_of[ids[i]] = s.sums[ids[i]]
    elif rule.kind == LFRU:
        s.cache_events[cache] += 1
        for i in range(begin, end):
            s.sums[ids[i]] += 1.0
            s.last[ids[i]] = s.cache_events[cache]
    elif rule.kind == LAST:
        s.cache_events[cache] += 1
        for i in range(begin, end):
            s.rank_of[ids[i]] = float(s.cache_events[cache])
    for i in range(begin, end):
        if s.place[ids[i]] >= 0:
            s.ranks[s.place[ids[i]]] = math.inf


@compiled
def _rank(rule, s, x):
    s.rank_of[x] = math.log(s.sums[x]) + -math.log(rule.factor) * s.last[x] if s.sums[x] > 0.0 else -math.inf


@compiled
def _admit(rule, s, cache, layer, x, next_event):
    group = cache if rule.kind == RANDOM else layer
    base = s.bases[s.spans[cache]] if rule.kind == RANDOM else s.bases[layer]
    if rule.kind == DECAYED:
        _rank(rule, s, x)
    elif rule.kind == BELADY:
        s.rank_of[x] = _rank_of_next(next_event)
    elif rule.kind == STATIC:
        s.rank_of[x] = s.sums[x]
    place = base + s.count[group]
    s.count[group] += 1
    s.held[place] = x
    s.place[x] = place
    s.ranks[place] = s.rank_of[x]


@compiled
def _evict(rule, s, cache, x):
    place = s.place[x]
    group = cache
    base = s.bases[s.spans[cache]]
    if rule.kind == RANDOM:
        s.cache_events[cache] += 1
    else:
        group = s.spans[cache]
        while place >= s.bases[group + 1]:
            group += 1
        base = s.bases[group]
    s.count[group] -= 1
    end = base + s.count[group]
    moved = s.held[end]
    s.held[place] = moved
    s.ranks[place] = s.ranks[end]
    s.place[moved] = place
    s.place[x] = -1
    if rule.in_cache:
        s.sums[x] = 0.0


@compiled
def _victim(rule, s, cache, now):
    if rule.kind == RANDOM:
        return _drawn(rule, s, cache, now)
    if rule.kind == LFRU:
        return _least_lfru(s, cache, now)
    best = -1
    best_rank, best_tie = math.inf, 0
    rate = -math.log(rule.factor)
    for layer in range(s.spans[cache], s.spans[cache + 1]):
        begin, end = s.bases[layer], s.bases[layer] + s.count[layer]
        lowest = math.inf
        for i in range(begin, end):
            lowest = min(lowest, s.ranks[i])
        if lowest == math.inf:
            continue
        x = -1
        for i in range(begin, end):
            if s.ranks[i] == lowest:
                y = s.held[i]
                if x == -1 or s.ties[y] < s.ties[x] or (s.ties[y] == s.ties[x] and y < x):
                    x = y
        if rule.kind == DECAYED:
            lowest -= rate * s.events[layer]
        if best == -1 or lowest < best_rank or (lowest == best_rank and s.ties[x] < best_tie):
            best, best_rank, best_tie = x, lowest, s.ties[x]
    return best


@compiled
def _least_lfru(s, cache, now):
    best = -1
    best_rank = math.inf
    for layer in range(s.spans[cache], s.spans[cache + 1]):
        for i in range(s.bases[layer], s.bases[layer] + s.count[layer]):
            x = s.held[i]
            if s.locked[x] == now:
                continue
            rank = s.sums[x] / float(s.cache_events[cache] - s.last[x] + 1)
            if (
                best == -1
                or rank < best_rank
                or (rank == best_rank and (s.last[x] < s.last[best] or (s.last[x] == s.last[best] and x < best)))
            ):
                best, best_rank = x, rank
    return best


@compiled
def _mix(state):
    state = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@compiled
def _drawn(rule, s, cache, now):
    n = np.uint64(s.count[cache])
    half = np.uint64(32)
    low = np.uint64(0xFFFFFFFF)
    state = _mix(_mix(np.uint64(rule.seed)) + np.uint64(s.cache_events[cache]))
    while True:
        state = _mix(state)
        place = ((state >> half) * n + (((state & low) * n) >> half)) >> half
        x = s.held[s.bases[s.spans[cache]] + np.int64(place)]
        if s.locked[x] != now:
            return x


@compiled
def run_stack(rule, s, caches, layers, offsets, ids, next_use, counted, stack, depth, length, found):
    """Add the depths at which events find their experts to `found` [C, N + 1]; a first use has none.

    The first n of a cache's stack are what a cache of n experts holds, for every n that fits all events: who leaves is
    the lowest by an order that does not depend on n (Mattson, Gecsei, Slutz, Traiger, 1970; here for an event's experts
    together).
    `stack` [N] has each cache's experts from its base on, `depth` [N] where in it each one is, from 1, 0 for none, and
    `length` [C]. `s` is of caches in which all experts fit.
    """
    for event in range(len(caches)):
        cache, layer = caches[event], layers[event]
        base = s.bases[s.spans[cache]]
        begin, end = offsets[event], offsets[event + 1]
        s.order[1] += 1
        now = s.order[1]
        _access(rule, s, cache, layer, begin, end, ids, next_use)
        for i in range(begin, end):
            x = ids[i]
            s.locked[x] = now
            if depth[x] > 0:
                if counted[event]:
                    found[cache, depth[x]] += 1
            else:
                _admit(rule, s, cache, layer, x, next_use[i] if rule.kind == BELADY else 0)
        for i in range(begin, end):
            x = ids[i]
            last = depth[x]
            if last == 0:
                length[cache] += 1
                last = length[cache]
            carried = x
            for d in range(1, last):
                y = stack[base + d - 1]
                if d == 1 or _leaves_after(rule, s, cache, carried, y, now):
                    stack[base + d - 1] = carried
                    depth[carried] = d
                    carried = y
            stack[base + last - 1] = carried
            depth[carried] = last


@compiled
def _leaves_after(rule, s, cache, x, y, now):
    """Whether y would leave a cache before x."""
    if s.locked[x] == now or s.locked[y] == now:
        return s.locked[x] == now
    rank_x, rank_y = s.rank_of[x], s.rank_of[y]
    tie_x, tie_y = s.ties[x], s.ties[y]
    if rule.kind == LFRU:
        rank_x = s.sums[x] / float(s.cache_events[cache] - s.last[x] + 1)
        rank_y = s.sums[y] / float(s.cache_events[cache] - s.last[y] + 1)
        tie_x, tie_y = s.last[x], s.last[y]
    if rank_x != rank_y:
        return rank_x > rank_y
    return tie_x > tie_y if tie_x != tie_y else x > y
