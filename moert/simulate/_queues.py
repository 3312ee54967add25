"""Policies made of queues, compiled: what they do to the last expert is what `moert.policies` does.

A queue is a ring of links through a node of its own, so that nothing is a special case. Lists 0 to 2 of a cache hold
residents, 3 and 4 ghosts. An expert is in one of them at most.

It stays one file: numba compiles a function that it keeps on disk anew when that function's own file has changed, and
does not look at the files of the functions that it calls.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moert.simulate._compile import compiled

FIFO, LRU, LEAST_STALE, SIEVE, SLRU, S3FIFO, ARC, WTINYLFU = range(8)

LISTS = 5
N_RESIDENT_LISTS = 3
MOST_USES = 3
"""S3-FIFO counts so far."""


class QueueState(NamedTuple):
    """N experts in C caches; every array is changed in place."""

    older: np.ndarray
    """[N + C * LISTS] int32; of a list's own node: its newest."""
    newer: np.ndarray
    """[N + C * LISTS] int32; of a list's own node: its oldest."""
    where: np.ndarray
    """[N] int8 list that an expert is in, -1 for none."""
    used: np.ndarray
    """[C, LISTS] int64 lengths."""
    uses: np.ndarray
    """[N] int64 counts, marks, or passes, as the policy has them."""
    locked: np.ndarray
    """[N] int64 the event for which an expert is locked."""
    returning: np.ndarray
    """[N] int64 the event at whose begin a miss had a ghost (S3-FIFO)."""
    memory: np.ndarray
    """[C, 2] int64: SIEVE's hand; whether S3-FIFO has evicted; Least-Stale's pass and layer; W-TinyLFU's uses."""
    target: np.ndarray
    """[C] float64: what ARC's first list should take."""
    capacity: np.ndarray
    """[C] int64"""
    limits: np.ndarray
    """[C, 3] int64, as `moert.simulate.fast` works them out of the policy's parameters."""
    bases: np.ndarray
    """[C + 1] int64 where each cache's experts begin."""
    clock: np.ndarray
    """[1] int64 events so far."""


def make_state(bases: np.ndarray, capacity: np.ndarray, limits: np.ndarray) -> QueueState:
    """Empty caches."""
    n_caches, n_experts = len(capacity), int(bases[-1])
    nodes = np.arange(n_experts + n_caches * LISTS, dtype=np.int32)
    memory = np.full((n_caches, 2), -1, np.int64)
    memory[:, 0] = 0
    return QueueState(
        nodes,
        nodes.copy(),
        np.full(n_experts, -1, np.int8),
        np.zeros((n_caches, LISTS), np.int64),
        np.zeros(n_experts, np.int64),
        np.zeros(n_experts, np.int64),
        np.zeros(n_experts, np.int64),
        memory,
        np.zeros(n_caches),
        capacity.astype(np.int64),
        limits.astype(np.int64),
        bases.astype(np.int64),
        np.zeros(1, np.int64),
    )


@compiled
def run(kind, s, caches, layers, offsets, ids, n_passing, hits, misses):
    """Replay events; `hits` [N] is written, and `misses` [experts] used. `n_passing` is `moert.turnover.PASSING`."""
    for event in range(len(caches)):
        cache = caches[event]
        capacity = s.capacity[cache]
        begin, end = offsets[event], offsets[event + 1]
        s.clock[0] += 1
        now = s.clock[0]
        n_misses = 0
        for i in range(begin, end):
            x = ids[i]
            if _is_resident(s, x):
                s.locked[x] = now
            else:
                misses[n_misses] = x
                n_misses += 1
        n_members = end - begin - n_misses
        hits[event] = n_members
        _access(kind, s, cache, layers[event], ids[begin:end], now)
        n_residents = s.used[cache, 0] + s.used[cache, 1] + s.used[cache, 2]
        passing = False
        n_kept = min(n_passing - 1, capacity - 1)
        for j in range(n_misses):
            x = misses[j]
            if n_residents == capacity:
                if passing:
                    if j > n_kept:
                        s.locked[misses[j - n_kept - 1]] = 0
                elif n_members == capacity:
                    passing = True
                    for i in range(begin, end):
                        s.locked[ids[i]] = 0
                    for i in range(max(0, j - n_kept), j):
                        s.locked[misses[i]] = now
                _evict(kind, s, cache, _victim(kind, s, cache, x, now))
                n_residents -= 1
                if passing:
                    n_members -= 1
            _admit(kind, s, cache, x, now)
            s.locked[x] = now
            n_residents += 1
            n_members += 1


@compiled
def run_lru(s, caches, layers, offsets, ids, n_passing, hits, misses):
    """As `run` for LRU, faster: where an event fits its members are the newest, so that none has to be locked."""
    older, newer, where, used, capacities = s.older, s.newer, s.where, s.used, s.capacity
    first_head = len(where)
    for event in range(len(caches)):
        cache = caches[event]
        capacity = capacities[cache]
        begin, end = offsets[event], offsets[event + 1]
        if end - begin > capacity:
            one, at = slice(event, event + 1), slice(event, event + 2)
            run(LRU, s, caches[one], layers[one], offsets[at], ids, n_passing, hits[one], misses)
            continue
        head = first_head + cache * LISTS
        n_hits = 0
        for i in range(begin, end):
            x = ids[i]
            if where[x] == 0:
                n_hits += 1
                older_x, newer_x = older[x], newer[x]
                newer[older_x] = newer_x
                older[newer_x] = older_x
                newest = older[head]
                newer[newest] = x
                older[x] = newest
                newer[x] = head
                older[head] = x
        hits[event] = n_hits
        if n_hits == end - begin:
            continue
        n_residents = used[cache, 0]
        for i in range(begin, end):
            x = ids[i]
            if where[x] < 0:
                if n_residents == capacity:
                    gone = newer[head]
                    oldest = newer[gone]
                    newer[head] = oldest
                    older[oldest] = head
                    where[gone] = -1
                else:
                    n_residents += 1
                newest = older[head]
                newer[newest] = x
                older[x] = newest
                newer[x] = head
                older[head] = x
                where[x] = 0
        used[cache, 0] = n_residents


@compiled
def _is_resident(s, x):
    return 0 <= s.where[x] < N_RESIDENT_LISTS


@compiled
def _head(s, cache, which):
    return len(s.where) + cache * LISTS + which


@compiled
def _remove(s, cache, x):
    older, newer = s.older[x], s.newer[x]
    s.newer[older] = newer
    s.older[newer] = older
    s.used[cache, s.where[x]] -= 1
    s.where[x] = -1


@compiled
def _push(s, cache, which, x):
    head = _head(s, cache, which)
    newest = s.older[head]
    s.newer[newest] = x
    s.older[x] = newest
    s.newer[x] = head
    s.older[head] = x
    s.used[cache, which] += 1
    s.where[x] = which


@compiled
def _move(s, cache, which, x):
    _remove(s, cache, x)
    _push(s, cache, which, x)


@compiled
def _oldest(s, cache, which, now):
    """The oldest of a list that is not locked, or -1."""
    head = _head(s, cache, which)
    x = s.newer[head]
    while x != head:
        if s.locked[x] != now:
            return x
        x = s.newer[x]
    return -1


@compiled
def _access(kind, s, cache, layer, event, now):
    if kind == LRU:
        for x in event:
            if s.where[x] == 0:
                _move(s, cache, 0, x)
    elif kind == LEAST_STALE:
        if layer <= s.memory[cache, 1]:
            s.memory[cache, 0] += 1
        s.memory[cache, 1] = layer
        for x in event:
            if s.where[x] == 0 and s.uses[x] < s.memory[cache, 0]:
                _move(s, cache, 0, x)
                s.uses[x] = s.memory[cache, 0]
    elif kind == SIEVE:
        for x in event:
            if s.where[x] == 0:
                s.uses[x] = 1
    elif kind == SLRU:
        for x in event:
            if s.where[x] >= 0:
                _protect(s, cache, x, 0, 1, s.limits[cache, 0])
    elif kind == S3FIFO:
        for x in event:
            if s.where[x] == 3:
                _remove(s, cache, x)
                s.returning[x] = now
            elif s.where[x] >= 0:
                s.uses[x] = min(s.uses[x] + 1, MOST_USES)
    elif kind == ARC:
        _access_arc(s, cache, event)
    elif kind == WTINYLFU:
        for x in event:
            _count(s, cache, x)
            if s.where[x] == 0:
                _move(s, cache, 0, x)
            elif s.where[x] > 0:
                _protect(s, cache, x, 1, 2, s.limits[cache, 1])


@compiled
def _protect(s, cache, x, probation, protected, limit):
    was_protected = s.where[x] == protected
    _move(s, cache, protected, x)
    if not was_protected:
        while s.used[cache, protected] > limit:
            _move(s, cache, probation, s.newer[_head(s, cache, protected)])


@compiled
def _access_arc(s, cache, event):
    for x in event:
        ghosts1, ghosts2 = s.used[cache, 3], s.used[cache, 4]
        if 0 <= s.where[x] <= 1:
            _move(s, cache, 1, x)
        elif s.where[x] == 3:
            s.target[cache] = min(s.target[cache] + max(1.0, ghosts2 / ghosts1), float(s.capacity[cache]))
        elif s.where[x] == 4:
            s.target[cache] = max(s.target[cache] - max(1.0, ghosts1 / ghosts2), 0.0)


@compiled
def _count(s, cache, x):
    sample = s.limits[cache, 2]
    s.uses[x] = min(s.uses[x] + 1, sample)
    s.memory[cache, 0] += 1
    if s.memory[cache, 0] >= sample * s.capacity[cache]:
        s.memory[cache, 0] //= 2
        for y in range(s.bases[cache], s.bases[cache + 1]):
            s.uses[y] //= 2


@compiled
def _admit(kind, s, cache, x, now):
    if kind == S3FIFO:
        returns = s.returning[x] == now or s.where[x] == 3
        if s.where[x] == 3:
            _remove(s, cache, x)
        fills = s.memory[cache, 0] == 0 and s.used[cache, 0] >= s.limits[cache, 0]
        _push(s, cache, 1 if returns or fills else 0, x)
        s.uses[x] = 0
    elif kind == ARC:
        _admit_arc(s, cache, x)
    else:
        _push(s, cache, 0, x)
        if kind == LEAST_STALE:
            s.uses[x] = s.memory[cache, 0]
        elif kind == SIEVE:
            s.uses[x] = 0
        elif kind == WTINYLFU:
            while s.used[cache, 0] > 1 and s.used[cache, 0] > s.limits[cache, 0]:
                _move(s, cache, 1, s.newer[_head(s, cache, 0)])


@compiled
def _admit_arc(s, cache, x):
    if s.where[x] >= 0:
        _move(s, cache, 1, x)
        return
    capacity = s.capacity[cache]
    while s.used[cache, 3] > 0 and s.used[cache, 0] + s.used[cache, 3] + 1 > capacity:
        _remove(s, cache, s.newer[_head(s, cache, 3)])
    others = s.used[cache, 0] + s.used[cache, 3] + s.used[cache, 1] + 1
    while s.used[cache, 4] > 0 and others + s.used[cache, 4] > 2 * capacity:
        _remove(s, cache, s.newer[_head(s, cache, 4)])
    _push(s, cache, 0, x)


@compiled
def _evict(kind, s, cache, x):
    if kind == S3FIFO:
        s.memory[cache, 0] = 1
        was_small = s.where[x] == 0
        _remove(s, cache, x)
        if was_small:
            _push(s, cache, 3, x)
            while s.used[cache, 3] > s.limits[cache, 1]:
                _remove(s, cache, s.newer[_head(s, cache, 3)])
    elif kind == ARC:
        _move(s, cache, 3 + s.where[x], x)
    else:
        if kind == SIEVE:
            s.memory[cache, 0] = _next(s, cache, x)
        _remove(s, cache, x)


@compiled
def _next(s, cache, x):
    """1 more than the next newer expert of list 0; 0 after the newest."""
    newer = s.newer[x]
    return 0 if newer == _head(s, cache, 0) else newer + 1


@compiled
def _victim(kind, s, cache, x, now):
    if kind == SIEVE:
        return _victim_sieve(s, cache, now)
    if kind == S3FIFO:
        return _victim_s3fifo(s, cache, now)
    if kind == SLRU:
        return _first_of(s, cache, 0, 1, now)
    if kind == ARC:
        taken = float(s.used[cache, 0])
        from_t1 = taken > s.target[cache] or (taken == s.target[cache] and s.where[x] == 4)
        return _first_of(s, cache, 0, 1, now) if from_t1 else _first_of(s, cache, 1, 0, now)
    if kind == WTINYLFU:
        candidate, resident = _oldest(s, cache, 0, now), _first_of(s, cache, 1, 2, now)
        if candidate == -1 or resident == -1:
            return max(candidate, resident)
        if s.used[cache, 0] < s.limits[cache, 0] or s.uses[candidate] > s.uses[resident]:
            return resident
        return candidate
    return _oldest(s, cache, 0, now)


@compiled
def _first_of(s, cache, first, second, now):
    x = _oldest(s, cache, first, now)
    return x if x != -1 else _oldest(s, cache, second, now)


@compiled
def _victim_sieve(s, cache, now):
    head = _head(s, cache, 0)
    x = s.memory[cache, 0] - 1 if s.memory[cache, 0] > 0 else s.newer[head]
    while s.locked[x] == now or s.uses[x] == 1:
        if s.locked[x] != now:
            s.uses[x] = 0
        x = s.newer[x]
        if x == head:
            x = s.newer[head]
    return x


@compiled
def _victim_s3fifo(s, cache, now):
    """The victim; those that are passed on the way have got their second chances when it is known."""
    threshold = s.limits[cache, 2]
    if s.used[cache, 1] > s.capacity[cache] - s.limits[cache, 0]:
        x = _scan_main(s, cache, now)
        if x != -1:
            return x
    head = _head(s, cache, 0)
    x = s.newer[head]
    while x != head:
        newer = s.newer[x]
        if s.locked[x] != now:
            if s.uses[x] < threshold:
                return x
            _move(s, cache, 1, x)
            s.uses[x] = 0
        x = newer
    return _scan_main(s, cache, now)


@compiled
def _scan_main(s, cache, now):
    head = _head(s, cache, 1)
    x = s.newer[head]
    while x != head:
        newer = s.newer[x]
        if s.locked[x] != now:
            if s.uses[x] == 0:
                return x
            s.uses[x] -= 1
            _move(s, cache, 1, x)
            if newer == head:
                newer = x
        x = newer
    return -1
