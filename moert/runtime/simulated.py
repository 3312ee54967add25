"""Replay in time with the engine's own steps: what predictions gain on a machine without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch

from moert.errors import ConfigError
from moert.policies import Policy, make_policy
from moert.predict.recorded import model_of
from moert.predictors._choice import make_predictor
from moert.predictors.base import MOST_TOKENS, Floats, Ints, Need, Predictor
from moert.residency import Residency
from moert.runtime.look_ahead import LookAhead
from moert.runtime.pipeline import Pipeline
from moert.runtime.runtime import MAX_BYTES_IN_FLIGHT
from moert.runtime.step import run_step
from moert.runtime.virtual import VirtualLayer, VirtualMachine
from moert.schedule import Costs
from moert.simulate.ahead import by_pass
from moert.simulate.bound import bounds, least_read_s
from moert.simulate.capacity import expert_sizes, parse_capacity, plan_caches
from moert.simulate.events import Count, Reading, TraceSource, open_trace
from moert.simulate.run import EventSource, scores_matter
from moert.simulate.timed import Timed
from moert.tiers.depth import START_DEPTH
from moert.trace.sequence import Phase, Sequence
from moert.trace.sequence import TraceHeader as Header
from moert.types import ExpertId

UNKNOWN_BYTES = 4 << 20
"""Of an expert whose size a trace does not say: reads are weighed against each other by it."""


def simulate_live(
    trace: TraceSource,
    policy: str,
    capacity: int | str,
    costs: Costs | Items[Costs],
    *,
    layer_s: float = 0.0,
    predictor: str | None = None,
    prefetch: bool = True,
    predict_s: float | None = None,
    count: Count = "decode",
    expert_bytes: int | Items[int] | None = None,
    lanes: int = START_DEPTH,
) -> Timed:
    """Run the engine's steps over a trace on a machine of numbers: a CPU, and a disk that experts are read from.

    `moert.simulate.timed.simulate_time` says what a schedule takes. Here it is the engine itself that runs: its step
    of a layer, its pipeline, and what it does with predictions (`moert.runtime.look_ahead`: what is read ahead, how
    often expectations come true, when prefetches are left off), with a clock that follows the costs in the place of
    time. Without a predictor both agree, as long as events fit their caches and one token chooses each of their
    experts: the engine computes experts in another order where some have more tokens. All passes take time, but only
    those that count are in the result. Work besides experts uses the memory as they do: while reads go on beside it,
    both slow each other down alike.

    Blocks; some 5000 events a second. For one sequence after another.

    Args:
        predictor: told what it would be live; one that needs the future is given it. None: nothing is predicted.
        prefetch: whether predictions become reads; without, only policies are told.
        predict_s: what the engine takes for predicting at each call; None: what its own code takes here and now, which
            differs from one run to the next.
        lanes: of the disk.
        trace, policy, capacity, costs, layer_s, count, expert_bytes: as for `simulate_time`.

    Raises:
        ConfigError: as `simulate_time`; also for costs of a device, a policy that knows the future, or a predictor that
            needs what a trace does not have.
        CapacityError, CorruptFileError: as `simulate_time`.
    """
    for name, seconds in (("layer_s", layer_s), ("predict_s", predict_s)):
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise ConfigError(f"{name}={seconds} must be finite and not negative")
    if lanes < 1:
        raise ConfigError(f"lanes={lanes} must be at least 1")
    source = EventSource(trace, Reading(count))
    header = source.header
    by_layer = [costs] * len(header.layers) if isinstance(costs, Costs) else list(costs)
    if len(by_layer) != len(header.layers):
        raise ConfigError(f"{len(by_layer)} costs do not fit {len(header.layers)} layers")
    if any(one.device is not None for one in by_layer):
        raise ConfigError("the engine's steps are simulated on a CPU and a disk; these costs have a device")
    sizes = expert_sizes(header.layers, expert_bytes)
    caches = plan_caches(parse_capacity(capacity), header.layers, "layer", sizes)
    if not sum(events.tokens for events in source):
        raise ConfigError(f"nothing counts in {source.name}, so there is nothing to time")
    with open_trace(trace) as opened:
        sequences = list(opened)
    run = _Run(header, [int(n) for n in caches.capacity], policy, by_layer, layer_s, lanes, sizes)
    run.shows_scores = scores_matter(source, policy.partition(",")[0].strip())
    if predictor is not None:
        run.predict(predictor, _at_hand(sequences), prefetch=prefetch, predict_s=predict_s)
    last = -1
    for number, sequence in enumerate(sequences):
        if not len(sequence.steps):
            continue
        if sequence.steps.min() <= last:
            raise ConfigError(f"sequence {number} runs beside the one before it; one after another can be simulated")
        last = int(sequence.steps.max())
        run.sequence(sequence, count)
    accesses = run.hits + run.misses
    bound_s, own_bound_s = bounds(
        source, capacity, by_layer, run.events * layer_s, accesses, run.misses, expert_bytes=expert_bytes
    )
    if run.records > run.misses:
        # A read that ends in what counts may have begun before it.
        own_bound_s = max(own_bound_s, min(run.seconds, least_read_s(by_layer) * run.records))
    return Timed(
        scheduler="exact",
        policy=policy,
        has_promotion=False,
        tokens=run.tokens,
        seconds=run.seconds,
        accesses=accesses,
        hits=run.hits,
        fetched=run.misses,
        on_cpu=accesses,
        promoted=0,
        link_s=run.disk_s,
        bound_s=bound_s,
        own_bound_s=own_bound_s,
        event_hits=tuple(run.event_hits),
        forwarded=run.forwarded,
        read_ahead=run.reads - (run.misses - run.forwarded),
        predict_s=run.thought_s,
    )


def at_hand_in(trace: TraceSource) -> set[Need]:
    """What predictors can be told of a trace."""
    with open_trace(trace) as opened:
        return _at_hand(list(opened))


def _at_hand(sequences: Items[Sequence]) -> set[Need]:
    knows_ids = bool(sequences) and all(one.token_ids is not None for one in sequences)
    return {Need.FUTURE, Need.TOKEN_IDS} if knows_ids else {Need.FUTURE}


class _Pass(NamedTuple):
    """A forward pass of T tokens."""

    experts: Ints
    """[T, L, K]"""
    weights: Floats
    scores: Floats | None
    ids: Ints | None
    known: Ints
    """The tokens of the prompt that come after it, as far as anybody wants to know."""
    counted: int
    """Tokens that count; all of them if any."""


def _passes(sequence: Sequence, count: Count) -> Iterator[_Pass]:
    order = np.argsort(sequence.steps, kind="stable")
    phases = sequence.phases[order]
    counts = phases == Phase.DECODE if count == "decode" else phases != Phase.PADDING
    experts, ids = sequence.experts[order], None if sequence.token_ids is None else sequence.token_ids[order]
    if sequence.weights is None:
        weights = (experts >= 0) / np.maximum((experts >= 0).sum(-1, keepdims=True), 1)
    else:
        weights = sequence.weights[order]
    scores = None if sequence.scores is None else sequence.scores[order]
    begins = np.flatnonzero(np.diff(sequence.steps[order], prepend=-1)).tolist()
    for begin, end in zip(begins, [*begins[1:], len(order)], strict=True):
        coming = slice(end, end + MOST_TOKENS)
        known = np.zeros(0, np.int64) if ids is None else ids[coming][phases[coming] == Phase.PREFILL]
        yield _Pass(
            experts[begin:end],
            np.asarray(weights[begin:end], np.float32),
            None if scores is None else scores[begin:end],
            None if ids is None else ids[begin:end],
            known,
            int(counts[begin:end].sum()),
        )


class _Thinking(LookAhead):
    """A `LookAhead` whose own time passes on the machine's clock."""

    def __init__(
        self,
        predictor: Predictor,
        layers: Items[VirtualLayer],
        pipeline: Pipeline,
        machine: VirtualMachine,
        predict_s: float | None,
        *,
        prefetch: bool,
    ) -> None:
        super().__init__(predictor, layers, pipeline, machine.clock, prefetch=prefetch)
        self._machine = machine
        self._predict_s = predict_s

    def _thinks(self) -> AbstractContextManager[None]:
        return self._machine.thinking(None if self._predict_s is None else 0.0)

    def begin(self, layer: int, needed: Items[ExpertId], n_tokens: int = 1) -> None:  # type: ignore[override]
        with self._thinks():
            super().begin(layer, needed, n_tokens)

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        with self._thinks():
            super().begin_pass(n_tokens, token_ids, rows)

    def observe(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None:
        with self._thinks():
            super().observe(layer, top_k_index, top_k_weights)

    def tell(self, layer: int, event: Items[ExpertId]) -> None:
        with self._thinks():
            super().tell(layer, event)

    def step(self, layer: int, hidden: torch.Tensor) -> None:
        seconds = self._predict_s
        with self._machine.thinking(0.0 if seconds is not None and self.rests(layer) else seconds):
            super().step(layer, hidden)


class _Run:
    """The engine in the middle of a trace."""

    def __init__(
        self,
        header: Header,
        capacity: Items[int],
        policy: str,
        costs: Items[Costs],
        layer_s: float,
        lanes: int,
        sizes: Ints | None,
    ) -> None:
        self._machine = VirtualMachine(lanes)
        self._header = header
        self._layer_s = layer_s
        self.layers = [
            VirtualLayer(
                index,
                layer.name,
                layer.num_experts,
                layer.top_k,
                Residency(capacity[index], _live_policy(policy, capacity[index])),
                self._machine,
                costs[index],
                UNKNOWN_BYTES if sizes is None else int(sizes[index]),
            )
            for index, layer in enumerate(header.layers)
        ]
        self._pipeline = Pipeline(self.layers, 2 * lanes, MAX_BYTES_IN_FLIGHT, self._machine.clock)
        self._look_ahead: LookAhead | None = None
        self._foresees: Callable[[Ints], None] | None = None
        self.shows_scores = False
        """Whether policies are shown the router's scores."""
        self.tokens = self.events = self.hits = self.misses = self.forwarded = self.reads = 0
        self.records = 0.0
        """Read while tokens counted, for whoever waited and ahead of time; what was begun of one is its part."""
        self.seconds = self.disk_s = self.thought_s = 0.0
        self.event_hits: list[int] = []

    def predict(self, predictor: str, at_hand: set[Need], *, prefetch: bool, predict_s: float | None) -> None:
        """Predict from here on."""
        driven = make_predictor(predictor, model_of(self._header), at_hand, "in this trace")
        if Need.FUTURE in driven.needs:
            self._foresees = driven.foresee
        self._look_ahead = _Thinking(driven, self.layers, self._pipeline, self._machine, predict_s, prefetch=prefetch)

    def sequence(self, sequence: Sequence, count: Count) -> None:
        """Run a sequence."""
        for layer in self.layers:
            layer.residency.policy.begin_sequence()
        ahead = self._look_ahead
        if ahead is not None:
            ahead.begin_sequence()
        if self._foresees is not None:
            order = np.argsort(sequence.steps, kind="stable")
            begins = np.flatnonzero(np.diff(sequence.steps[order], prepend=-1))
            self._foresees(by_pass(sequence.experts[order], begins))
        for one in _passes(sequence, count):
            if ahead is not None:
                if self._foresees is not None:
                    ahead.begin_pass(1)
                else:
                    if one.known.size:
                        ahead.hint(one.known)
                    ahead.begin_pass(len(one.experts), one.ids)
            machine = self._machine
            before = (machine.now, machine.disk_s, machine.thought_s, *self._sums())
            for index in range(len(self.layers)):
                self._step(index, one)
            if one.counted:
                after = (machine.now, machine.disk_s, machine.thought_s, *self._sums())
                seconds, disk_s, thought_s, records, *counts = (b - a for a, b in zip(before, after, strict=True))
                self.seconds += seconds
                self.disk_s += disk_s
                self.thought_s += thought_s
                self.records += records
                hits, misses, forwarded, reads = map(int, counts)
                self.hits += hits
                self.misses += misses
                self.forwarded += forwarded
                self.reads += reads
                self.tokens += one.counted

    def _sums(self) -> tuple[float, int, int, int, int]:
        """Records, hits, misses, those that had been asked for before, and reads asked for, so far."""
        stats = [layer.stats for layer in self.layers]
        return (
            sum(layer.stats.bytes_read / layer.read_bytes(0) for layer in self.layers),
            sum(one.hits for one in stats),
            sum(one.misses for one in stats),
            sum(one.forwarded for one in stats),
            sum(layer.reads for layer in self.layers),
        )

    def _step(self, index: int, one: _Pass) -> None:
        layer, experts = self.layers[index], one.experts[:, index]
        is_there = experts >= 0
        if not is_there.any():
            return
        machine, costs = self._machine, layer.costs
        machine.work(self._layer_s, costs.cpu_slowdown, costs.read_slowdown)
        needed = [layer.ids[expert] for expert in np.unique(experts[is_there]).tolist()]
        missing = [expert for expert in needed if expert not in layer.residency]
        if one.counted:
            self.events += 1
            self.event_hits.append(len(needed) - len(missing))
        hidden = torch.zeros(len(experts), 1)
        ids = torch.from_numpy(np.where(is_there, experts, layer.spec.num_experts).astype(np.int64))
        weights = torch.from_numpy(np.where(is_there, np.maximum(one.weights[:, index], 1e-9), 0))
        scores = None
        if self.shows_scores and one.scores is not None:
            scores = one.scores[:, index].mean(0, dtype=np.float64).tolist()
        layer.step(
            missing,
            lambda: run_step(
                layer,
                lambda rows, _: rows,
                hidden,
                ids,
                weights,
                pipeline=self._pipeline,
                look_ahead=self._look_ahead,
                scores=scores,
            ),
        )


def _live_policy(policy: str, capacity: int) -> Policy:
    found = make_policy(policy, capacity, future=())
    if type(found).needs_future:
        raise ConfigError(f"policy {policy!r} knows the future, which the engine's steps do not")
    return found
