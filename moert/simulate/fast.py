"""Which policies have compiled replays, and how their parameters become numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moert.plugins import read_choice
from moert.policies import Policy, make_policy
from moert.simulate import _queues, _rankings
from moert.simulate.events import Events, Ints
from moert.turnover import PASSING

_QUEUES = {
    "fifo": _queues.FIFO,
    "lru": _queues.LRU,
    "least_stale": _queues.LEAST_STALE,
    "sieve": _queues.SIEVE,
    "slru": _queues.SLRU,
    "s3fifo": _queues.S3FIFO,
    "arc": _queues.ARC,
    "wtinylfu": _queues.WTINYLFU,
}
_RANKINGS = {
    "lfu": _rankings.DECAYED,
    "ema": _rankings.DECAYED,
    "mrs": _rankings.DECAYED,
    "belady": _rankings.BELADY,
    "min_bypass": _rankings.BELADY,
    "static": _rankings.STATIC,
    "lfru": _rankings.LFRU,
    "random": _rankings.RANDOM,
}
USES_SCORES = ("mrs",)
"""Compiled only for traces that have no router scores."""


def fast_policies() -> list[str]:
    """The names of the policies that are replayed by compiled code, sorted; the others are replayed in Python."""
    return sorted([*_QUEUES, *_RANKINGS])


class FastReplay:
    """Compiled caches, empty until `restart`. Chunks of events come in order."""

    path = "fast"

    def __init__(
        self, policy: str, parameters: dict[str, Any], capacity: Ints, bases: Ints, scope: str, *, bypass: bool
    ) -> None:
        """Caches of `capacity` experts [C], for the experts of layers that begin at `bases` [L + 1].

        Raises:
            ConfigError: the policy refuses a parameter.
        """
        self._name = policy
        self._parameters = parameters
        # What a parameter may be is for the policy itself to say.
        make_policy(",".join([policy, *(f"{key}={value}" for key, value in parameters.items())]), 1, future=[])
        self.needs_future = policy in ("belady", "min_bypass")
        self._capacity = capacity
        self._is_layered = scope == "layer"
        n_layers = len(bases) - 1
        self._bases = bases
        self._spans = np.arange(n_layers + 1) if self._is_layered else np.array([0, n_layers])
        self._bypass = bypass
        self.restart()

    @staticmethod
    def serves(policy: str, *, has_scores: bool, bypass: bool) -> bool:
        """Whether the plug-in of this name has a compiled replay for this."""
        if bypass:
            return policy == "min_bypass"
        return policy in _QUEUES or (policy in _RANKINGS and not (policy in USES_SCORES and has_scores))

    def restart(self) -> None:
        """Empty caches, and policies that have seen nothing."""
        if self._name in _QUEUES:
            limits = np.array([self._limits(int(one)) for one in self._capacity], dtype=np.int64)
            bases = self._bases if self._is_layered else self._bases[[0, -1]]
            self._queues = _queues.make_state(bases, self._capacity, limits)
        else:
            self._rule = make_rule(self._name, self._parameters)._replace(bypass=self._bypass)
            self._rankings = _rankings.make_state(self._bases, self._spans, self._capacity)

    def _limits(self, capacity: int) -> tuple[int, int, int]:
        p = self._parameters
        if self._name == "slru":
            return int(p["protected"] * capacity), 0, 0
        if self._name == "s3fifo":
            return max(1, int(p["small"] * capacity)), int(p["ghosts"] * capacity), p["threshold"]
        if self._name == "wtinylfu":
            window = max(1, int(p["window"] * capacity))
            return window, int(p["protected"] * (capacity - window)), p["sample"]
        return 0, 0, 0

    def run(self, events: Events, next_use: Ints | None = None) -> tuple[Ints, Ints]:
        """[N] hits and [N] experts brought into slots, for each event; `next_use` [ids] where it `needs_future`."""
        hits = np.empty(len(events), np.int64)
        caches: npt.NDArray[np.int32] = events.layer if self._is_layered else np.zeros_like(events.layer)
        at = (caches, events.layer, events.offsets, events.ids)
        misses = np.empty(self._bases[-1], np.int32)
        if self._name == "lru":
            _queues.run_lru(self._queues, *at, PASSING, hits, misses)
            return hits, events.sizes - hits
        if self._name in _QUEUES:
            _queues.run(_QUEUES[self._name], self._queues, *at, PASSING, hits, misses)
            return hits, events.sizes - hits
        uses = np.zeros(0, np.int64) if next_use is None else next_use
        transfers = np.empty(len(events), np.int64)
        places = np.empty(self._bases[-1], np.int64)
        _rankings.run(self._rule, self._rankings, *at, uses, PASSING, hits, transfers, misses, places)
        return hits, transfers


def make_rule(policy: str, parameters: dict[str, Any]) -> _rankings.Rule:
    """A policy of `_rankings`, or LRU, as numbers."""
    factor, amount = 1.0, 1.0
    if policy in ("ema", "mrs"):
        factor, amount = 1 - parameters["alpha"], parameters["alpha"]
    elif policy == "lfu":
        factor = parameters["decay"]
    return _rankings.Rule(
        kind=_RANKINGS.get(policy, _rankings.LAST),
        factor=factor,
        amount=amount,
        burst=parameters.get("burst", 0.0),
        is_shared=policy == "mrs",
        in_cache=policy == "lfu" and parameters["in_cache"],
        warm_up=parameters.get("warm_up_events", 0),
        seed=parameters.get("seed", 0),
        bypass=False,
    )


def read_policy(text: str) -> tuple[str, dict[str, Any]]:
    """The plug-in's name and all of its parameters.

    Raises:
        ConfigError: no such policy or parameter.
    """
    name, parameters = read_choice("moert.policies", text, Policy)  # type: ignore[type-abstract]  # only looked up
    return name, parameters
