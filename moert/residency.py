"""Which experts are resident, which slot each one holds, and who leaves: pure bookkeeping, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moert.errors import CapacityError
from moert.policies.base import Policy
from moert.types import ExpertId


class Admission(NamedTuple):
    """A slot given to an expert, and the expert that had to leave it (None if the slot was free)."""

    slot: int
    victim: ExpertId | None


class Split(NamedTuple):
    """An event's experts, in ascending order, split by where they are when the step begins."""

    hits: tuple[ExpertId, ...]
    misses: tuple[ExpertId, ...]


class Residency:
    """The table expert -> slot of one cache of `capacity` equal slots.

    A step is `begin`, then `admit` once for each miss, then `release` once for each expert of the event when it has
    been computed. From `begin` to `release` an expert that is resident is locked: it is never a victim. An event may
    be larger than the cache; `admit` then returns None until something has been released.

    Not thread-safe: one step at a time.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        """An empty cache.

        Raises:
            CapacityError: `capacity` is less than one slot.
        """
        if capacity < 1:
            raise CapacityError(f"a cache needs at least 1 slot, not {capacity}")
        self.capacity = capacity
        self.policy = policy
        self._slot_of: dict[ExpertId, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._locked: set[ExpertId] = set()
        self._event: frozenset[ExpertId] = frozenset()

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._slot_of

    def slot_of(self, expert: ExpertId) -> int | None:
        """The slot `expert` holds, or None if it is not resident."""
        return self._slot_of.get(expert)

    @property
    def residents(self) -> tuple[ExpertId, ...]:
        """Every resident expert, ascending."""
        return tuple(sorted(self._slot_of))

    def begin(self, event: Sequence[ExpertId]) -> Split:
        """Start a step that needs `event` (each expert once, ascending); its residents are locked from here on."""
        assert not self._event, f"the step over {sorted(self._event)} has not ended"
        self._event = frozenset(event)
        assert len(self._event) == len(event), f"an expert stands twice in the event {event}"
        hits = tuple(expert for expert in event if expert in self._slot_of)
        misses = tuple(expert for expert in event if expert not in self._slot_of)
        self._locked.update(hits)
        self.policy.access(event)
        return Split(hits, misses)

    def can_admit(self) -> bool:
        """Whether `admit` would give a slot now."""
        return bool(self._free) or len(self._locked) < len(self._slot_of)

    def admit(self, expert: ExpertId) -> Admission | None:
        """Give `expert` a slot and lock it; its record may be written there from now on.

        Returns:
            None when every slot is held by a locked expert: compute and `release` one first.
        """
        assert expert not in self._slot_of, f"{expert} is resident already"
        victim = None
        if not self._free:
            if len(self._locked) == len(self._slot_of):
                return None
            victim = self.policy.victim(self._locked)
            assert victim in self._slot_of and victim not in self._locked, f"{self.policy} evicts {victim}"
            self._remove(victim)
        slot = self._free.pop()
        self._slot_of[expert] = slot
        self._locked.add(expert)
        self.policy.admit(expert)
        return Admission(slot, victim)

    def release(self, expert: ExpertId) -> None:
        """`expert` has been computed: it stays resident and may be evicted."""
        self._locked.remove(expert)

    def abandon(self, expert: ExpertId) -> None:
        """`expert`'s record did not arrive whole: its slot is free again."""
        self._locked.remove(expert)
        self._remove(expert)

    def end(self) -> None:
        """The step is over, computed or not: nothing is locked any more."""
        self._locked.clear()
        self._event = frozenset()

    def _remove(self, expert: ExpertId) -> None:
        self.policy.evict(expert)
        self._free.append(self._slot_of.pop(expert))

    def check_integrity(self) -> None:
        """Assert that no slot is held twice or lost and that locks are residents."""
        held = list(self._slot_of.values())
        assert sorted(held + self._free) == list(range(self.capacity)), f"slots held {held}, free {self._free}"
        assert self._locked <= self._slot_of.keys(), f"locked but absent: {self._locked - self._slot_of.keys()}"
