"""The interface of a cache policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from moert.types import ExpertId


class Policy(ABC):
    """Decides which resident expert leaves. It owns no memory and moves nothing.

    One step of a MoE layer is one event, and the cache (`moert.residency.Residency`) drives a policy like this:

        access(event)                      # every expert of the event, hits and misses, before anything moves
        for each miss:
            if full: evict(victim(locked)) # never a member of the event that is still to be computed
            admit(miss)

    Between steps the cache may get another number of slots. Those that have to leave are asked for one by one, each
    with those before it locked, and evicted; then `capacity` changes.

    A policy whose rule is a score only has to keep the scores in `access`, `admit` and `evict`, and return the
    lowest resident in `victim`.
    """

    def __init__(self, capacity: int) -> None:
        """A policy for a cache of `capacity` experts, empty."""
        self.capacity = capacity

    @abstractmethod
    def access(self, event: Sequence[ExpertId]) -> None:
        """The experts that one step needs, each once, in ascending order; some are resident, some are not."""

    @abstractmethod
    def admit(self, expert: ExpertId) -> None:
        """`expert` has become resident."""

    @abstractmethod
    def evict(self, expert: ExpertId) -> None:
        """`expert` is resident no longer, because it was the victim or because reading it failed."""

    @abstractmethod
    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        """The resident expert to evict next. Asking changes nothing; the same answer may be asked for twice.

        Args:
            locked: residents that must stay; membership tests are O(1). At least one resident is not in it.
        """
