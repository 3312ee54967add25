"""Replay in time: what a token takes on a machine with a scheduler, a policy and background promotion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moert.errors import CapacityError, ConfigError
from moert.policies import Policy, make_policy
from moert.predictors._ahead import Chances
from moert.schedule import Costs, Item, Place, Promotion, Schedule, Scheduler, make_scheduler, makespan
from moert.simulate.ahead import look_ahead
from moert.simulate.bound import bounds
from moert.simulate.capacity import expert_sizes, parse_capacity, plan_caches
from moert.simulate.events import Count, Reading, TraceSource, open_trace
from moert.simulate.link import Link
from moert.simulate.run import EventSource, scores_matter
from moert.simulate.steps import Event, read_steps
from moert.trace.sequence import TraceHeader
from moert.turnover import turn_over
from moert.types import ExpertId


@dataclass(frozen=True)
class Timed:
    """One replay in time. All counts and seconds are of the counted events."""

    scheduler: str
    policy: str
    has_promotion: bool
    tokens: int
    seconds: float
    accesses: int
    hits: int
    fetched: int
    """Misses that were moved to the device for their event; on a machine without one, read from disk."""
    on_cpu: int
    """Uses that the CPU computed, hits among them too."""
    promoted: int
    """Experts that became resident in the background."""
    link_s: float
    """How long the link was busy; the disk, on a machine without a device."""
    bound_s: float
    """No policy and no schedule takes less (`moert.simulate.bound.least_seconds`)."""
    own_bound_s: float
    """The same with this replay's own misses, and what it has read ahead of time: what is above it is lost to
    scheduling, what is below to the policy."""
    event_hits: tuple[int, ...]
    """Of each event, in order."""
    forwarded: int = 0
    """Misses whose read had been asked for before their event, or that were on their way to the device as promotions:
    the event waited for the rest."""
    read_ahead: int = 0
    """Records that were asked for before anybody needed them."""
    predict_s: float = 0.0
    """Of the seconds, what predicting took."""

    @property
    def hit_rate(self) -> float:
        """Hits over accesses."""
        return self.hits / self.accesses

    @property
    def seconds_per_token(self) -> float:
        """Experts and the layers' other work."""
        return self.seconds / self.tokens

    @property
    def share_of_bound(self) -> float:
        """1: as fast as possible."""
        return self.bound_s / self.seconds if self.seconds else 1.0


class _Run(NamedTuple):
    """A plan for an event, by places in its hits and misses."""

    fetch: tuple[int, ...]
    """Places among the misses."""
    on_cpu: int
    cpu_s: float
    device_s: float
    run_s: float
    """Of one expert on the device."""
    on_device: int


def simulate_time(
    trace: TraceSource,
    policy: str,
    capacity: int | str,
    costs: Costs | Sequence[Costs],
    *,
    layer_s: float = 0.0,
    scheduler: str = "exact",
    promotion: Promotion | None = None,
    count: Count = "decode",
    batch: int = 1,
    expert_bytes: int | Sequence[int] | None = None,
    residents: Iterable[ExpertId] | None = None,
    predictor: str | None = None,
) -> Timed:
    """Replay a trace event by event on a machine whose times are `costs`.

    Each event begins when the layer's other work is done. Hits are what the cache has then; the scheduler says what
    runs where, and `moert.schedule.makespan` how long that takes. Misses that were fetched are admitted afterwards as
    far as the policy wants them, those that the CPU computed are not. On a machine without a device the cache is host
    memory: every miss is read from disk, and admitted as the engine does it (`moert.turnover`). Events that do not
    count take no time: their misses are admitted, and so they warm the cache.

    Blocks; some 10000 events a second.

    Args:
        costs: of every layer's experts, or of each layer's.
        layer_s: what a layer takes besides its experts, in each step.
        scheduler: a file in `moert/schedule`, or `"package.module:Class"`.
        promotion: fresh, and used up afterwards; None: the link carries only what events wait for.
        capacity: experts of each layer, a share of them, or bytes for all (`moert.simulate.simulate`).
        residents: what is cached when the first event begins that counts, such as a profile's hottest experts; None:
            what the events before it left.
        predictor: what a policy that looks ahead is told by; it takes no time itself. None: it is told nothing.

    Raises:
        ConfigError: an option that makes no sense, or nothing counts.
        CapacityError, CorruptFileError: as `simulate`.
    """
    if not layer_s >= 0 or layer_s == float("inf"):
        raise ConfigError(f"layer_s={layer_s} must be finite and not negative")
    source = EventSource(trace, Reading(count, batch))
    header = source.header
    sizes = expert_sizes(header.layers, expert_bytes)
    caches = plan_caches(parse_capacity(capacity), header.layers, "layer", sizes)
    by_layer = [costs] * len(header.layers) if isinstance(costs, Costs) else list(costs)
    if len(by_layer) != len(header.layers):
        raise ConfigError(f"{len(by_layer)} costs do not fit {len(header.layers)} layers")
    with open_trace(trace) as opened:
        has_scores = scores_matter(source, policy.partition(",")[0].strip())
        events = list(read_steps(opened, Reading(count, batch, scores=has_scores)))
    replay = _Replay(header, events, policy, [int(n) for n in caches.capacity], by_layer, scheduler, layer_s, promotion)
    if predictor is not None and (ahead := replay.tokens_ahead):
        replay.ahead = look_ahead(trace, source.reading, predictor, ahead)
    for event in events:
        if event.is_counted and residents is not None:
            replay.put(residents)
            residents = None
        replay.step(event)
    if not replay.accesses:
        raise ConfigError(f"nothing counts in {source.name}, so there is nothing to time")
    tokens = sum(chunk.tokens for chunk in source)
    bound_s, own_bound_s = bounds(
        source,
        capacity,
        by_layer,
        layer_s * replay.counted,
        replay.accesses,
        replay.accesses - replay.hits,
        expert_bytes=expert_bytes,
    )
    return Timed(
        scheduler=scheduler,
        policy=policy,
        has_promotion=promotion is not None,
        tokens=tokens,
        seconds=replay.seconds,
        accesses=replay.accesses,
        hits=replay.hits,
        fetched=replay.fetched,
        on_cpu=replay.on_cpu,
        promoted=replay.promoted,
        link_s=replay.link.busy_s,
        bound_s=bound_s,
        own_bound_s=own_bound_s,
        event_hits=tuple(replay.event_hits),
        forwarded=replay.forwarded,
    )


class _Replay:
    """A machine in the middle of a replay."""

    def __init__(
        self,
        header: TraceHeader,
        events: Sequence[Event],
        policy: str,
        capacity: list[int],
        costs: list[Costs],
        scheduler: str,
        layer_s: float,
        promotion: Promotion | None,
    ) -> None:
        self._costs = costs
        self._scheduler: Scheduler = make_scheduler(scheduler)
        self._has_device = costs[0].device is not None
        self._promotion = promotion if self._has_device else None
        self._layer_s = layer_s
        self._capacity = capacity
        self.policies: list[Policy] = []
        for layer, n in enumerate(capacity):
            future = ([*event.experts] for event in events if event.layer == layer)
            self.policies.append(make_policy(policy, n, future=future))
        self.tokens_ahead = max((one.tokens_ahead for one in self.policies), default=0)
        if self._promotion is not None:
            self._promotion.rate.worth = lambda expert: self.policies[expert.layer].worth(expert)
        self.ahead: Iterator[Chances] | None = None
        """Of each event to come, what is predicted for those after it."""
        self._residents: list[set[ExpertId]] = [set() for _ in header.layers]
        self._known: dict[tuple[int, int, int], _Run] = {}
        self._same_costs = [costs.index(one) for one in costs]
        self.link = Link(costs, self._promotion)
        """The disk, on a machine without a device."""
        self.seconds = 0.0
        self.accesses = self.hits = self.fetched = self.forwarded = self.on_cpu = self.promoted = self.counted = 0
        self.event_hits: list[int] = []

    def step(self, event: Event) -> None:
        """One event."""
        policy, residents = self.policies[event.layer], self._residents[event.layer]
        if event.scores is not None:
            policy.observe_scores(event.layer, event.scores)
        if self.ahead is not None and (chances := next(self.ahead)):
            policy.observe_ahead(event.layer, chances)
        policy.access(event.experts)
        if self._promotion is not None:
            self._promotion.observe(event.experts)
        misses = [expert for expert in event.experts if expert not in residents]
        if event.is_counted:
            self._time(event, misses, policy, residents)
        else:
            turn_over(policy, residents, event.experts, misses, self._capacity[event.layer])
            if self._promotion is not None:
                self.link.drop(residents.intersection(misses))

    def put(self, experts: Iterable[ExpertId]) -> None:
        """Have these in the caches and no others.

        Raises:
            CapacityError: they are too many.
        """
        for policy, residents in zip(self.policies, self._residents, strict=True):
            for expert in residents:
                policy.evict(expert)
            residents.clear()
        for expert in sorted(set(experts)):
            if len(self._residents[expert.layer]) == self._capacity[expert.layer]:
                raise CapacityError(f"layer {expert.layer} has {self._capacity[expert.layer]} slots for its residents")
            self.policies[expert.layer].admit(expert)
            self._residents[expert.layer].add(expert)

    def _time(self, event: Event, misses: list[ExpertId], policy: Policy, residents: set[ExpertId]) -> None:
        begin = self.seconds + self._layer_s
        self.link.promote_until(begin)
        costs = self._costs[event.layer]
        known = {} if self._promotion is None else self._promotion.coming
        coming = [expert for expert in misses if expert in known]
        run, others = self._plan(event, misses, coming)
        fetched = [others[place] for place in run.fetch]
        # A whole expert that waits for its place is there at once.
        arrivals = [there - begin for there in self.link.take_over(coming, begin)] if coming else []
        delay = max(0.0, self.link.free_s - begin)
        device_s = run.device_s
        if self._has_device and (arrivals or (fetched and delay)):
            arrivals += [delay + n * costs.move_s for n in range(1, len(fetched) + 1)]
            # Each is followed by its own run and those of the ones behind it.
            runs = (at + n * run.run_s for n, at in enumerate(reversed(arrivals), start=1))
            device_s = max(run.on_device * run.run_s, *runs)
        end = begin + max(device_s, run.cpu_s)
        if fetched:
            step_s = costs.move_s if self._has_device else costs.each_read_s(len(fetched))
            self.link.carry(begin, len(fetched) * step_s)
        self.counted += 1
        self.accesses += len(event.experts)
        self.hits += len(event.experts) - len(misses)
        self.event_hits.append(len(event.experts) - len(misses))
        self.fetched += len(fetched)
        self.forwarded += len(coming)
        self.on_cpu += run.on_cpu
        self.seconds = end
        if not self._has_device:
            turn_over(policy, residents, event.experts, sorted(misses), self._capacity[event.layer])
            return
        for expert in sorted([*fetched, *coming]):
            self._admit(expert, policy, residents)
        if self._promotion is not None:
            left = [expert for expert in misses if expert not in residents]
            self._promotion.offer(event.layer, left, self._weakest(event.layer))
            self.link.promote_until(end)
            self._install()

    def _plan(self, event: Event, misses: list[ExpertId], coming: Sequence[ExpertId]) -> tuple[_Run, list[ExpertId]]:
        """What to do, and the misses that are not `coming` in the order that its places mean: the most valuable first.

        What is on its way to the device counts as there, and the CPU computes none of it.
        """
        others = [expert for expert in misses if expert not in coming]
        if self._promotion is not None:
            others.sort(key=self._promotion.rate, reverse=True)
        n_here = len(event.experts) - len(others)
        key = (self._same_costs[event.layer], n_here, len(others))
        is_usual = not coming and all(n == 1 for n in event.tokens)
        if is_usual and key in self._known:
            return self._known[key], others
        tokens = dict(zip(event.experts, event.tokens, strict=True))
        away = Place.HOST if self._has_device else Place.DISK
        here = Place.DEVICE if self._has_device else Place.HOST
        places = {expert: place for place, expert in enumerate(others)}
        # The values of those that are there decide nothing but who of them is computed by the CPU.
        worth = self._promotion.rate if self._promotion is not None and coming else lambda _: 0.0
        items = [Item(e, tokens[e], here, worth(e)) for e in event.experts if e not in places]
        items += [Item(e, tokens[e], away, -place) for e, place in places.items()]
        costs = self._costs[event.layer]
        schedule: Schedule = self._scheduler.plan(items, costs)
        if stays := tuple(item for item in schedule.cpu if item.expert in coming):
            rest = tuple(item for item in schedule.cpu if item.expert not in coming)
            schedule = schedule._replace(device=stays + schedule.device, cpu=rest)
        room = None if self._has_device else self._capacity[event.layer] - n_here
        timing = makespan(schedule, costs, room)
        moved = schedule.fetch if self._has_device else schedule.read
        run = _Run(
            tuple(places[item.expert] for item in moved),
            len(schedule.cpu),
            timing.cpu_s,
            timing.device_s,
            costs.device_s([item.tokens for item in schedule.device]) if schedule.device else 0.0,
            len(schedule.device),
        )
        if is_usual:
            self._known[key] = run
        return run, others

    def _admit(self, expert: ExpertId, policy: Policy, residents: set[ExpertId]) -> None:
        if len(residents) >= self._capacity[expert.layer]:
            if not policy.wants(expert, frozenset()):
                return
            victim = policy.victim_for(expert, frozenset())
            policy.evict(victim)
            residents.remove(victim)
        policy.admit(expert)
        residents.add(expert)

    def _weakest(self, layer: int) -> ExpertId | None:
        if len(self._residents[layer]) < self._capacity[layer]:
            return None
        return self.policies[layer].victim(frozenset())

    def _install(self) -> None:
        assert self._promotion is not None
        for expert, victim in self._promotion.install(lambda expert: self._weakest(expert.layer)):
            policy, residents = self.policies[expert.layer], self._residents[expert.layer]
            if victim is not None:
                policy.evict(victim)
                residents.remove(victim)
            policy.admit(expert)
            residents.add(expert)
            self.promoted += 1
