"""One replay: a trace, a policy, a capacity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from moert.errors import ConfigError
from moert.plugins import load_plugin
from moert.policies import Policy, make_policy
from moert.simulate._rankings import NEVER
from moert.simulate.ahead import look_ahead
from moert.simulate.capacity import Caches, Scope, expert_sizes, parse_capacity, plan_caches
from moert.simulate.events import (
    Count,
    Events,
    Ints,
    Reading,
    TraceSource,
    first_ids,
    open_trace,
    read_events,
)
from moert.simulate.fast import FastReplay, read_policy
from moert.simulate.future import Future, next_uses
from moert.simulate.general import GeneralReplay
from moert.simulate.results import Result, Tally

Reset = Literal["sequence", "never"]

HELD_IDS = 1 << 25
"""Events with no more experts than this together are kept for the next replay of the same trace."""


class EventSource:
    """A trace's events, as often as they are asked for: from memory if they are few, else read anew."""

    def __init__(self, source: TraceSource, reading: Reading, name: str | None = None) -> None:
        """Reads what the trace says of itself; a file is open only while its events are read."""
        self.source = source
        with open_trace(source) as trace:
            self.header = trace.header
            self.n_sequences = len(trace)
            first = next(iter(trace), None)
            self.has_scores = first is not None and first.scores is not None
        self.reading = reading
        self.name = name or (Path(source).stem if isinstance(source, (str, Path)) else self.header.model) or "trace"
        self._held: list[Events] | None = None

    def __iter__(self) -> Iterator[Events]:
        if self._held is not None:
            yield from self._held
            return
        held: list[Events] | None = []
        n_ids = 0
        with open_trace(self.source) as trace:
            for chunk in read_events(trace, self.reading):
                n_ids += len(chunk.ids)
                if held is not None:
                    held = [*held, chunk] if n_ids <= HELD_IDS else None
                yield chunk
        self._held = held


@dataclass(frozen=True)
class Setup:
    """How a replay is done, but for the policy and the capacity."""

    scope: Scope = "layer"
    """One cache for each layer, or one for all experts."""
    reset: Reset = "never"
    """Whether caches and policies start anew with each sequence, or batch of sequences that run together."""
    bypass: bool = False
    """Misses that the policy does not want are computed without a slot, and the others admitted after the event."""
    predictor: str | None = None
    """What a policy that looks ahead is told by: `"joint"`, `"oracle,accept=0.7"`. None: it is told nothing."""

    def __post_init__(self) -> None:
        for option, known in (("scope", ("layer", "global")), ("reset", ("sequence", "never"))):
            if getattr(self, option) not in known:
                raise ConfigError(f'{option}={getattr(self, option)!r} must be "{known[0]}" or "{known[1]}"')


def simulate(
    trace: TraceSource,
    policy: str,
    capacity: int | str,
    *,
    scope: Scope = "layer",
    reset: Reset = "never",
    count: Count = "decode",
    batch: int = 1,
    atomic: bool = True,
    bypass: bool = False,
    predictor: str | None = None,
    expert_bytes: int | Sequence[int] | None = None,
    name: str | None = None,
    keep_events: bool = False,
    fast: bool = True,
) -> Result:
    """Replay a trace as the engine would run it: a layer's step is one event, and who leaves is decided as it is there.

    Blocks. Memory is bounded by the longest sequence, however many there are; a policy that knows the future also needs
    eight bytes for each access, on disk where those are many.

    Args:
        trace: a trace, or the path of a trace file.
        policy: as everywhere: `"ema,alpha=0.05"`, `"package.module:Class"`.
        capacity: `"25%"`; 16 or `"16"` experts, of each layer or of the one cache; or `"4GiB"` for the whole model,
            divided among the layers as the engine does it.
        scope, reset, bypass, predictor: see `Setup`.
        count, batch, atomic: see `moert.simulate.events.Reading`.
        expert_bytes: of one expert, or [L]; None: as the trace says.
        name: of the trace in the result.
        keep_events: whether to keep the hits of every event.
        fast: whether compiled code may stand for the policy objects. The results are the same.

    Raises:
        ConfigError: an option that makes no sense, a trace in which nothing counts, sizes that are unknown, or a
            predictor that cannot be told what it needs.
        CapacityError: a cache of less than one expert.
        CorruptFileError: the trace contradicts itself.
    """
    source = EventSource(trace, Reading(count, batch, atomic), name)
    setup = Setup(scope, reset, bypass, predictor)
    return replay(source, policy, capacity, setup, expert_bytes=expert_bytes, keep_events=keep_events, fast=fast)


def replay(
    source: EventSource,
    policy: str,
    capacity: int | str,
    setup: Setup,
    *,
    expert_bytes: int | Sequence[int] | None = None,
    keep_events: bool = False,
    fast: bool = True,
    counted_future: bool = False,
) -> Result:
    """As `simulate`. `counted_future`: see `Future`; only for compiled policies that know the future."""
    layers = source.header.layers
    if not layers:
        raise ConfigError(f"{source.name} has no layers, so there is nothing to replay")
    asked = parse_capacity(capacity)
    sizes = expert_sizes(layers, expert_bytes)
    caches = plan_caches(asked, layers, setup.scope, sizes)
    replayer, chunks = _replayer(source, policy, caches, setup, sizes, fast=fast)
    bases = first_ids(layers)
    resets = setup.reset == "sequence"
    tally = Tally(len(layers), int(bases[-1]), caches, sizes, resets=resets)
    kept = []
    with ExitStack() as stack:
        futures: Iterable[Ints | None] | None = None
        if replayer.needs_future and not resets:
            if isinstance(replayer, FastReplay):
                futures = Future(chunks, int(bases[-1]), counted_only=counted_future)
                stack.callback(futures.close)
            else:
                replayer.restart(chunks)
        uses = iter(futures) if futures is not None else None
        for chunk in chunks:
            if resets:
                hits, transfers = _replay_anew(replayer, chunk, int(bases[-1]), counted_future=counted_future)
            else:
                hits, transfers = replayer.run(chunk, None if uses is None else next(uses))
            tally.add(chunk, hits, transfers)
            if keep_events:
                kept.append(hits)
    if not tally.layer_accesses.sum():
        hint = '; count="all" counts every step' if source.reading.count == "decode" and source.n_sequences else ""
        raise ConfigError(f"nothing counts in {source.name}: {source.n_sequences} sequences without a step of it{hint}")
    return _result(
        source, policy, asked.text, setup, caches, tally, sizes, replayer.path, kept if keep_events else None
    )


def fewest_misses(
    source: EventSource,
    capacity: int | str,
    setup: Setup,
    *,
    expert_bytes: int | Sequence[int] | None = None,
) -> int | None:
    """The least counted misses that any policy can have, whatever it knows; None where experts differ in size.

    This is MIN (Belady, 1966) where only counted uses are worth having an expert for; with bypass if some event does
    not fit, as the misses of one that passes through depend on more than who leaves.
    """
    layers = source.header.layers
    caches = plan_caches(parse_capacity(capacity), layers, setup.scope, expert_sizes(layers, expert_bytes))
    if caches.in_bytes:
        return None
    fits = all(_fits(chunk, caches, setup.scope) for chunk in source)
    bypass = setup.bypass or not fits
    policy = "min_bypass" if bypass else "belady"
    found = replay(
        source, policy, capacity, replace(setup, bypass=bypass), expert_bytes=expert_bytes, counted_future=True
    )
    return found.misses


def _fits(events: Events, caches: Caches, scope: Scope) -> bool:
    room = caches.capacity[events.layer] if scope == "layer" else caches.capacity[0]
    return bool(np.all(events.sizes <= room))


def _replayer(
    source: EventSource, policy: str, caches: Caches, setup: Setup, sizes: Ints | None, *, fast: bool
) -> tuple[FastReplay | GeneralReplay, Iterable[Events]]:
    """What replays, and the events as it wants them: with the router's scores for those whose policy looks at them."""
    plugin, parameters = read_policy(policy)
    bases = first_ids(source.header.layers)
    kind = _class_of(plugin)
    chunks: Iterable[Events] = source
    has_scores = scores_matter(source, plugin)
    if has_scores:
        chunks = EventSource(source.source, replace(source.reading, scores=True))
    ahead = None
    if setup.predictor is not None and (tokens := make_policy(policy, 1, future=()).tokens_ahead):
        resets = setup.reset == "sequence"
        ahead = look_ahead(source.source, source.reading, setup.predictor, tokens, anew=resets)
    fast = fast and ahead is None
    if fast and not caches.in_bytes and FastReplay.serves(plugin, has_scores=has_scores, bypass=setup.bypass):
        return FastReplay(plugin, parameters, caches.capacity, bases, setup.scope, bypass=setup.bypass), source
    return (
        GeneralReplay(
            policy,
            caches.capacity,
            bases,
            setup.scope,
            needs_future=kind.needs_future,
            sizes=sizes if caches.in_bytes else None,
            bypass=setup.bypass,
            ahead=ahead,
        ),
        chunks,
    )


def _class_of(plugin: str) -> type[Policy]:
    return load_plugin("moert.policies", plugin, Policy)  # type: ignore[type-abstract]  # only looked up


def scores_matter(source: EventSource, plugin: str) -> bool:
    """Whether the policy looks at router scores and the trace has some."""
    looks = _class_of(plugin).observe_scores is not Policy.observe_scores
    return looks and source.has_scores and source.reading.atomic


def _replay_anew(
    replayer: FastReplay | GeneralReplay, chunk: Events, n_experts: int, *, counted_future: bool
) -> tuple[Ints, Ints]:
    """Each sequence of the chunk in empty caches, with policies that have seen nothing."""
    hits = np.empty(len(chunk), np.int64)
    transfers = np.empty(len(chunk), np.int64)
    for begin, end in chunk.spans():
        part = chunk.part(begin, end)
        uses = None
        if isinstance(replayer, GeneralReplay):
            replayer.restart([part])
        else:
            replayer.restart()
            if replayer.needs_future:
                counted = part.counted if counted_future else np.zeros(0, np.bool_)
                uses = next_uses(part.offsets, part.ids, counted, 0, np.full(n_experts, NEVER, np.int64))
        hits[begin:end], transfers[begin:end] = replayer.run(part, uses)
    return hits, transfers


def _result(
    source: EventSource,
    policy: str,
    capacity: str,
    setup: Setup,
    caches: Caches,
    tally: Tally,
    sizes: Ints | None,
    path: str,
    kept: list[Ints] | None,
) -> Result:
    accesses, hits = int(tally.layer_accesses.sum()), int(tally.layer_hits.sum())
    missed = tally.layer_accesses - tally.layer_hits
    weights = np.ones(len(missed), np.int64) if sizes is None else sizes
    return Result(
        trace=source.name,
        policy=policy,
        scope=setup.scope,
        reset=setup.reset,
        count=source.reading.count,
        batch=source.reading.batch,
        capacity=capacity,
        capacity_experts=caches.total_experts,
        capacity_bytes=caches.total_bytes,
        accesses=accesses,
        hits=hits,
        misses=accesses - hits,
        tokens=tally.tokens,
        events=tally.events,
        picks=tally.picks,
        bytes_moved=None if sizes is None else int(tally.layer_transfers @ sizes),
        byte_miss_ratio=float(missed @ weights) / float(tally.layer_accesses @ weights),
        transfers=int(tally.layer_transfers.sum()),
        compulsory_misses=tally.compulsory,
        forced_misses=tally.forced,
        path=path,
        layers=tuple(layer.name for layer in source.header.layers),
        layer_capacity=caches.capacity,
        layer_hits=tally.layer_hits,
        layer_accesses=tally.layer_accesses,
        sequence_hits=np.concatenate(tally.sequence_hits),
        sequence_accesses=np.concatenate(tally.sequence_accesses),
        event_hits=np.concatenate(kept) if kept is not None else None,
    )
