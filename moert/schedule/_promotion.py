"""Background promotion: what the link carries while no event waits for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moert.errors import ConfigError
from moert.types import ExpertId


class Swap(NamedTuple):
    """A promoted expert that becomes resident, and the one that leaves for it; None: a slot is free."""

    expert: ExpertId
    victim: ExpertId | None


@dataclass
class _Flight:
    expert: ExpertId
    chunks: int = 0


class Rates:
    """In what share of its layer's latest events each expert was, as an exponential moving average."""

    def __init__(self, alpha: float) -> None:
        self._keep = 1 - alpha
        self._alpha = alpha
        self.worth: Callable[[ExpertId], float | None] | None = None
        """What knows better, such as policies that look ahead (`Policy.worth`); None from it: it does not."""
        self._events: dict[int, int] = {}
        self._known: dict[ExpertId, tuple[float, int]] = {}

    def observe(self, event: Sequence[ExpertId]) -> None:
        """The experts that one step of a layer needs, each once."""
        if not event:
            return
        layer = event[0].layer
        now = self._events[layer] = self._events.get(layer, 0) + 1
        for expert in event:
            rate, then = self._known.get(expert, (0.0, now))
            self._known[expert] = (rate * self._keep ** (now - then) + self._alpha, now)

    def __call__(self, expert: ExpertId) -> float:
        """From 0 to 1."""
        if self.worth is not None and (worth := self.worth(expert)) is not None:
            return worth
        rate, then = self._known.get(expert, (0.0, 0))
        return rate * self._keep ** (self._events.get(expert.layer, 0) - then) if rate else 0.0


class Promotion:
    """Brings missing experts to the device over a link that would be idle, a chunk at a time.

    A scheduler that only minimises an event's time fetches nothing where the CPU is faster than the link, and then its
    cache never changes. Here an expert that an event missed and did not fetch is a candidate if the moving average of
    its use is above that of its layer's weakest resident by more than `hysteresis`. The one with the most gain moves
    when nothing else does; an event's own fetches come first and wait for one chunk at most. It takes its place
    between two events.

    It holds no weights and knows no clock, so the live engine and the simulator drive the same object: `observe` and
    `offer` for each event; `next_chunk` and `chunk_done` while the link is idle; `install` after an event. One thread
    at a time.

    The idea is that of no paper we know; as periodic re-ranking it is in KTransformers and DALI.
    """

    def __init__(self, *, alpha: float = 0.03, hysteresis: float = 0.02, chunks: int = 3, staged: int = 2) -> None:
        """`staged` slots hold what has arrived or is on its way until it is installed.

        Raises:
            ConfigError: a value that makes no sense.
        """
        if not 0 < alpha <= 1:
            raise ConfigError(f"alpha={alpha} must be above 0 and at most 1")
        if not 0 <= hysteresis < 1:
            raise ConfigError(f"hysteresis={hysteresis} must be at least 0 and below 1")
        if chunks < 1 or staged < 1:
            raise ConfigError(f"chunks={chunks} and staged={staged} must be at least 1")
        self.chunks = chunks
        self.rate = Rates(alpha)
        self.finished = 0
        """Experts that have arrived; those among them that were no longer worth their place count too."""
        self._hysteresis = hysteresis
        self._staged = staged
        self._flight: _Flight | None = None
        self._arrived: list[ExpertId] = []
        self._best: dict[int, tuple[float, ExpertId]] = {}
        """Of each layer's latest event the candidate with the most gain."""

    def observe(self, event: Sequence[ExpertId]) -> None:
        """The experts that one step of a layer needs, each once, before anything is decided for it."""
        self.rate.observe(event)

    def offer(self, layer: int, missed: Iterable[ExpertId], weakest: ExpertId | None) -> None:
        """What the layer's latest event missed and did not fetch, and the resident that would leave for one of them.

        Args:
            weakest: None if the layer has a free slot.
        """
        waiting = {*self._arrived, self._flight.expert} if self._flight else {*self._arrived}
        floor = 0.0 if weakest is None else self.rate(weakest) + self._hysteresis
        gains = [(self.rate(expert) - floor, expert) for expert in missed if expert not in waiting]
        best = max(gains, default=None, key=lambda gain: (gain[0], [-part for part in gain[1]]))
        if best is not None and best[0] > 0:
            self._best[layer] = best
        else:
            self._best.pop(layer, None)

    def next_chunk(self) -> ExpertId | None:
        """The expert of which a chunk should move now; None: there is none worth it. The answer stands until it has.

        The promotion that has begun goes on; a new one begins with the largest gain over all layers.
        """
        if self._flight is None and self._best and len(self._arrived) < self._staged:
            layer = max(self._best, key=lambda layer: (self._best[layer][0], -layer))
            self._flight = _Flight(self._best.pop(layer)[1])
        return None if self._flight is None else self._flight.expert

    def chunk_done(self) -> None:
        """A chunk of what `next_chunk` said has moved."""
        assert self._flight is not None, "nothing is being promoted"
        self._flight.chunks += 1
        if self._flight.chunks == self.chunks:
            self._arrived.append(self._flight.expert)
            self.finished += 1
            self._flight = None

    @property
    def coming(self) -> dict[ExpertId, int]:
        """The chunks that have not moved yet of each expert on its way, none of those that have arrived; the oldest
        first."""
        left = dict.fromkeys(self._arrived, 0)
        return left if self._flight is None else {**left, self._flight.expert: self.chunks - self._flight.chunks}

    def drop(self, experts: Collection[ExpertId]) -> None:
        """These have become resident by other ways, or cannot be read: whatever was under way for them is void."""
        if self._flight is not None and self._flight.expert in experts:
            self._flight = None
        self._arrived = [expert for expert in self._arrived if expert not in experts]
        for layer, (_, expert) in list(self._best.items()):
            if expert in experts:
                del self._best[layer]

    def install(
        self, victim_for: Callable[[ExpertId], ExpertId | None], locked: Collection[ExpertId] = frozenset()
    ) -> Iterator[Swap]:
        """What takes its place now, between two events; each swap is to be made before the next is asked for.

        What has arrived and is no longer worth more than who would leave is given up. What would need the place of a
        locked expert waits for the next time.

        Args:
            victim_for: the resident that leaves for an expert; None if its cache has a free slot.
            locked: residents that may not leave now.
        """
        arrived, self._arrived = self._arrived, []
        for expert in arrived:
            victim = victim_for(expert)
            if victim is not None and victim in locked:
                self._arrived.append(expert)
            elif victim is None or self.rate(expert) > self.rate(victim) + self._hysteresis:
                yield Swap(expert, victim)
