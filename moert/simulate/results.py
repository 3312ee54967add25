"""What a replay found: counts, rates, and how sure they are."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.simulate._compile import compiled
from moert.simulate.capacity import Caches
from moert.simulate.events import Events, Ints

_SCALARS = (
    "trace",
    "policy",
    "scope",
    "reset",
    "count",
    "batch",
    "capacity",
    "capacity_experts",
    "capacity_bytes",
    "accesses",
    "hits",
    "hit_rate",
    "misses",
    "misses_per_token",
    "tokens",
    "events",
    "picks",
    "bytes_moved",
    "byte_miss_ratio",
    "transfers",
    "compulsory_misses",
    "forced_misses",
    "min_misses",
    "gap_misses",
    "gap_closed",
    "path",
)


@dataclass(frozen=True, eq=False)
class Result:
    """One replay of one trace with one policy and capacity. All counts are of the counted events only."""

    trace: str
    policy: str
    scope: str
    reset: str
    count: str
    batch: int
    capacity: str
    """As it was asked for."""
    capacity_experts: int
    """Of all caches together; where experts differ in size, of average ones."""
    capacity_bytes: int | None
    """None where the size of an expert is unknown."""
    accesses: int
    """Experts that events needed, each once an event."""
    hits: int
    misses: int
    tokens: int
    """Without padding."""
    events: int
    picks: int
    """Accesses before those for the same expert in an event were merged."""
    bytes_moved: int | None
    """Of the transfers."""
    byte_miss_ratio: float
    """Share of the bytes that events needed which was missing; of the accesses where sizes are unknown."""
    transfers: int
    """Experts brought into slots: the misses, or with bypass those of them that were admitted."""
    compulsory_misses: int
    """Accesses to experts that nothing had needed before (since the caches were emptied)."""
    forced_misses: int
    """Misses for the only reason that an event needed more than its cache holds; no policy can avoid them."""
    path: str
    """"fast" (compiled) or "general" (the policy object itself)."""
    layers: tuple[str, ...] = ()
    """[L] names."""
    layer_capacity: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[C] experts, or bytes where they differ in size: of each layer's cache, or of the one."""
    layer_hits: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[L]"""
    layer_accesses: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[L]"""
    sequence_hits: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] of each sequence, or batch of sequences that ran together."""
    sequence_accesses: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S]"""
    event_hits: Ints | None = None
    """[all events, counted or not] if asked for."""
    min_misses: int | None = None
    """The fewest misses that any policy can have here; None where that is not known."""
    lru_misses: int | None = None

    @property
    def hit_rate(self) -> float:
        """Hits over accesses."""
        return self.hits / self.accesses

    @property
    def misses_per_token(self) -> float:
        """Misses over tokens."""
        return self.misses / self.tokens if self.tokens else math.nan

    @property
    def gap_misses(self) -> int | None:
        """Misses that a policy which knows the future would not have."""
        return None if self.min_misses is None else self.misses - self.min_misses

    @property
    def gap_closed(self) -> float | None:
        """Of the misses between LRU and the fewest: the share that this policy avoids; below 0 where LRU is better."""
        if self.min_misses is None or self.lru_misses is None or self.lru_misses == self.min_misses:
            return None
        return (self.lru_misses - self.misses) / (self.lru_misses - self.min_misses)

    def interval(self, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
        """Where the hit rate of other such sequences would lie: a BCa bootstrap over sequences, the same each time.

        Returns:
            None for less than two sequences with accesses, which say nothing about others.
        """
        from scipy.stats import bootstrap

        used = self.sequence_accesses > 0
        hits, accesses = self.sequence_hits[used], self.sequence_accesses[used]
        if len(hits) < 2:
            return None
        rates = hits / accesses
        if rates.min() == rates.max():
            return float(rates[0]), float(rates[0])

        def rate(hits: npt.NDArray[Any], accesses: npt.NDArray[Any], axis: int = -1) -> Any:
            return hits.sum(axis=axis) / accesses.sum(axis=axis)

        for method in ("BCa", "percentile"):
            with warnings.catch_warnings():
                # BCa has no answer for some degenerate samples and says so by NaN and a warning; percentiles have.
                warnings.simplefilter("ignore")
                found = bootstrap(
                    (hits, accesses),
                    rate,
                    paired=True,
                    vectorized=True,
                    confidence_level=confidence,
                    n_resamples=resamples,
                    method=method,
                    rng=np.random.default_rng(seed),
                    batch=max(1, (1 << 22) // len(hits)),
                ).confidence_interval
            if np.isfinite(found.low) and np.isfinite(found.high):
                break
        return float(found.low), float(found.high)

    def row(self, *, interval: bool = False) -> dict[str, Any]:
        """The numbers as plain values, without the arrays; with `interval` also its ends."""
        row = {name: getattr(self, name) for name in _SCALARS}
        row = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        if interval:
            row["hit_rate_low"], row["hit_rate_high"] = self.interval() or (None, None)
        return row


class Tally:
    """Adds up chunks of events and what became of them."""

    def __init__(self, n_layers: int, n_experts: int, caches: Caches, sizes: Ints | None, *, resets: bool) -> None:
        self.layer_hits = np.zeros(n_layers, np.int64)
        self.layer_accesses = np.zeros(n_layers, np.int64)
        self.layer_transfers = np.zeros(n_layers, np.int64)
        self.sequence_hits: list[Ints] = []
        self.sequence_accesses: list[Ints] = []
        self.tokens = self.picks = self.events = self.compulsory = self.forced = 0
        self.fits = True
        """Whether every event fits, counted or not."""
        self._first_sequence = 0
        self._seen = np.full(n_experts, -1, np.int64)
        self._resets = resets
        capacity = np.broadcast_to(caches.capacity, n_layers)
        room = capacity // sizes if caches.in_bytes and sizes is not None else capacity
        self._room = np.ascontiguousarray(room, dtype=np.int64)

    def add(self, events: Events, hits: Ints, transfers: Ints) -> None:
        """`hits` and `transfers` are [N]."""
        if not len(events):
            return
        n_sequences = int(events.sequence[-1]) + 1 - self._first_sequence
        by_sequence = np.zeros((2, n_sequences), np.int64)
        by_layer = np.zeros((3, len(self.layer_hits)), np.int64)
        at = (events.layer, events.counted, events.sequence, events.offsets, events.ids, hits, transfers)
        n_events, compulsory, forced, over = _add_up(
            *at, self._room, self._seen, self._resets, self._first_sequence, by_layer, by_sequence
        )
        self.layer_hits += by_layer[0]
        self.layer_accesses += by_layer[1]
        self.layer_transfers += by_layer[2]
        self.sequence_hits.append(by_sequence[0])
        self.sequence_accesses.append(by_sequence[1])
        self._first_sequence += n_sequences
        self.compulsory += int(compulsory)
        self.forced += int(forced)
        self.fits = self.fits and not over
        self.tokens += events.tokens
        self.picks += events.picks
        self.events += int(n_events)


@compiled
def _add_up(  # type: ignore[no-untyped-def]
    layers, counted, sequences, offsets, ids, hits, transfers, room, seen, resets, first_sequence, by_layer, by_sequence
):
    """Adds to `by_layer` [3, L] and `by_sequence` [2, S]; `seen` [experts] is the last sequence with each one."""
    events = compulsory = forced = over = 0
    for event in range(len(layers)):
        layer, sequence = layers[event], sequences[event]
        begin, end = offsets[event], offsets[event + 1]
        now = sequence if resets else 0
        new = 0
        for i in range(begin, end):
            x = ids[i]
            if seen[x] != now:
                seen[x] = now
                new += 1
        too_many = end - begin - room[layer]
        if too_many > 0:
            over += 1
        if counted[event]:
            events += 1
            compulsory += new
            if too_many > 0:
                forced += too_many
            by_layer[0, layer] += hits[event]
            by_layer[1, layer] += end - begin
            by_layer[2, layer] += transfers[event]
            by_sequence[0, sequence - first_sequence] += hits[event]
            by_sequence[1, sequence - first_sequence] += end - begin
    return events, compulsory, forced, over
