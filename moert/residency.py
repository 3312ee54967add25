"""Which experts are resident, which slot each one holds, and who leaves: pure bookkeeping, event by event."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from moert.errors import CapacityError
from moert.policies.base import Policy
from moert.turnover import turn_over
from moert.types import ExpertId

MOST_LATE = 64
"""Events that a policy may be told of at once."""


class Admission(NamedTuple):
    """A slot given to an expert, and the expert that had to leave it (None if the slot was free)."""

    slot: int
    victim: ExpertId | None


class Move(NamedTuple):
    """A resident whose bytes go from one slot to another."""

    expert: ExpertId
    from_slot: int
    to_slot: int


class Resize(NamedTuple):
    """What a new number of slots means for the residents: who left, and who lives elsewhere now, each by ascending id.

    The slots moved to were free, so the moves may be carried out in any order.
    """

    victims: tuple[ExpertId, ...]
    moves: tuple[Move, ...]


class Split(NamedTuple):
    """An event's experts, in ascending order, split by where they are when the step begins."""

    hits: tuple[ExpertId, ...]
    misses: tuple[ExpertId, ...]
    """Those that are not resident, whether they are on their way or not."""
    arriving: tuple[ExpertId, ...]
    """The misses that have a slot already, and whose records are on their way into it."""


class Residency:
    """The table expert -> slot of one cache of `capacity` equal slots.

    A step is `begin`, then `admit` and, when its record is there, `arrive` for each miss, then `release` once for each
    expert of the event when it has been computed. An expert of the event is locked while it is resident and not yet
    released, and any expert is between `admit` and `arrive`: it is never a victim. An event may be larger than the
    cache; `admit` then returns None until something has been released. Experts may also be admitted and arrive outside
    a step, or in one that does not need them.

    A step that will admit every miss says so with `promise`. Who leaves is then decided before anything moves, by
    `turn_over`, and what is resident after the step does not depend on the order in which reads end. The policy knows
    of all of it at once; slots follow as experts are computed.

    Not thread-safe: one step at a time.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        """An empty cache.

        Raises:
            CapacityError: `capacity` is less than one slot.
        """
        _check_capacity(capacity)
        self.capacity = capacity
        self._policy = policy
        self._late: list[Sequence[ExpertId]] = []
        """Events that the policy has not been told of."""
        self._slot_of: dict[ExpertId, int] = {}
        self._stay: set[ExpertId] = set()
        """What the policy takes for resident: who has a slot or is promised one, and is not leaving."""
        self._free = list(range(capacity - 1, -1, -1))
        self._locked: set[ExpertId] = set()
        self._arriving: set[ExpertId] = set()
        self._event: frozenset[ExpertId] = frozenset()
        self._expected: frozenset[ExpertId] = frozenset()
        self._promised: set[ExpertId] = set()
        self._leaving: set[ExpertId] = set()
        self._given_up: set[ExpertId] = set()
        """Those that leave because they will not arrive."""

    @property
    def policy(self) -> Policy:
        """Who decides, and knows of every event so far."""
        if self._late:
            self._catch_up()
        return self._policy

    def _catch_up(self) -> None:
        late, self._late = self._late, []
        for event in late:
            self._policy.access(event)

    def __len__(self) -> int:
        return len(self._slot_of) - len(self._arriving)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._slot_of and expert not in self._arriving

    @property
    def arriving(self) -> AbstractSet[ExpertId]:
        """Every expert that has a slot and whose record is on its way into it."""
        return self._arriving

    def slot_of(self, expert: ExpertId) -> int | None:
        """The slot `expert` holds, resident or arriving, or None."""
        return self._slot_of.get(expert)

    def slots_of(self, experts: Iterable[ExpertId]) -> list[int]:
        """The slots that these hold, resident or arriving all of them."""
        slot_of = self._slot_of
        return [slot_of[expert] for expert in experts]

    def slots(self) -> dict[ExpertId, int]:
        """The slot of every resident expert; new."""
        if not self._arriving:
            return dict(self._slot_of)
        return {expert: slot for expert, slot in self._slot_of.items() if expert not in self._arriving}

    @property
    def n_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def residents(self) -> tuple[ExpertId, ...]:
        """Every resident expert, ascending."""
        return tuple(sorted(self._slot_of.keys() - self._arriving))

    def begin(self, event: Sequence[ExpertId]) -> Split:
        """Start a step that needs `event` (each expert once, ascending); its residents are locked from here on."""
        assert not self._event, f"the step over {sorted(self._event)} has not ended"
        self._event = frozenset(event)
        assert len(self._event) == len(event), f"an expert stands twice in the event {event}"
        slot_of, arriving = self._slot_of, self._arriving
        hits, misses, coming = [], [], []
        for expert in event:
            if expert not in slot_of:
                misses.append(expert)
            elif expert in arriving:
                misses.append(expert)
                coming.append(expert)
            else:
                hits.append(expert)
        self._locked.update(hits)
        self._expected = frozenset()
        self.policy.access(event)
        return Split(tuple(hits), tuple(misses), tuple(coming))

    def begin_hits(self, event: Sequence[ExpertId]) -> bool:
        """`begin` if all of `event` (each expert once, ascending) is resident; else nothing has happened."""
        slot_of, arriving = self._slot_of, self._arriving
        for expert in event:
            if expert not in slot_of or expert in arriving:
                return False
        assert not self._event, f"the step over {sorted(self._event)} has not ended"
        self._event = frozenset(event)
        self._locked.update(event)
        self._expected = frozenset()
        self.policy.access(event)
        return True

    def hit(self, event: Sequence[ExpertId]) -> None:
        """A step over `event` (each expert once, ascending), all of it resident, has begun and ended.

        The policy hears of it when it is next asked for anything: many at once take a fraction of the time.
        """
        assert not self._event, f"the step over {sorted(self._event)} has not ended"
        self._expected = frozenset()
        self._late.append(event)
        if len(self._late) >= MOST_LATE:
            self._catch_up()

    def expect(self, experts: Iterable[ExpertId]) -> None:
        """The next step is expected to need these experts: until it begins, nothing that is admitted displaces one."""
        assert not self._event, f"the step over {sorted(self._event)} has not ended"
        self._expected = frozenset(experts)

    def promise(self) -> None:
        """The step will admit all misses of its event that have no slot: decide who leaves for them.

        Experts that the event does not need leave at once; those that it needs, if it is larger than the cache, when
        they are released.
        """
        stay, arriving = self._stay, self._arriving
        if self._given_up and len(self._event.union(arriving & stay)) > self.capacity:
            # Their slots are not for those that only pass through, who might find none.
            for expert in sorted(self._event & self._given_up):
                self.take_up(expert)
        misses = sorted(self._event - stay)
        victims = turn_over(self.policy, stay, self._event, misses, self.capacity, arriving and arriving & stay)
        self._leaving.difference_update(misses)
        self._given_up.difference_update(misses)
        self._promised.update([expert for expert in misses if expert not in self._slot_of])
        for victim in victims:
            if victim in self._event or victim in self._arriving:
                self._leaving.add(victim)
            else:
                self._free_slot_of(victim)

    def is_leaving(self, expert: ExpertId) -> bool:
        """Whether `expert` gives up its slot when it is released."""
        return expert in self._leaving

    def can_admit(self) -> bool:
        """Whether `admit` would give a slot now."""
        return bool(self._free) or (not self._promised and len(self._held()) < len(self._slot_of))

    def wants(self, expert: ExpertId) -> bool:
        """Whether `expert`, which has no slot, is worth one: a free one, or that of who would leave for it.

        For whoever can compute it without a slot. False too where `admit` would give None.
        """
        if self._free:
            return True
        return self.can_admit() and self.policy.wants(expert, self._held())

    def admit(self, expert: ExpertId) -> Admission | None:
        """Give `expert` a slot, locked until it has arrived; its record may be written there from now on.

        Returns:
            None when every slot is held by a locked expert: one must `arrive` or be computed and released first.
        """
        assert expert not in self._slot_of, f"{expert} has a slot already"
        if self._promised:
            return self._admit_promised(expert)
        victim = None
        if not self._free:
            held = self._held()
            if len(held) == len(self._slot_of):
                return None
            victim = self.policy.victim_for(expert, held)
            assert victim in self._slot_of and victim not in self._locked, f"{self.policy} evicts {victim}"
            self._remove(victim)
        # In this order: wherever an interrupt comes, what is in the table and not arriving is resident; see `recover`.
        self._arriving.add(expert)
        self._locked.add(expert)
        slot = self._slot_of[expert] = self._free.pop()
        self._admit_to_policy(expert)
        return Admission(slot, victim)

    def _admit_promised(self, expert: ExpertId) -> Admission | None:
        """The policy knows of it already; until all that is promised has come, free slots are for nothing else."""
        if not self._free or expert not in self._promised:
            return None
        self._promised.remove(expert)
        self._arriving.add(expert)
        self._locked.add(expert)
        slot = self._slot_of[expert] = self._free.pop()
        return Admission(slot, None)

    def _held(self) -> AbstractSet[ExpertId]:
        """Who has a slot and must keep it."""
        return self._locked | (self._expected & self._slot_of.keys()) if self._expected else self._locked

    def arrive(self, expert: ExpertId) -> None:
        """`expert`'s record is whole in its slot: it is resident, and locked if the step needs it."""
        self._arriving.remove(expert)
        if expert not in self._event:
            self.release(expert)

    def release(self, expert: ExpertId) -> None:
        """`expert` has been computed: it may be evicted, and stays resident unless it is to leave."""
        self._locked.remove(expert)
        if expert in self._leaving:
            self._free_slot_of(expert)

    def give_up(self, expert: ExpertId) -> None:
        """An arriving expert will not arrive: its slot is as good as free, and is when it is abandoned. Idempotent."""
        assert expert in self._arriving, f"{expert} is not arriving"
        if expert not in self._leaving:
            self._evict_from_policy(expert)
            self._leaving.add(expert)
            self._given_up.add(expert)

    def take_up(self, expert: ExpertId) -> None:
        """A given up expert will arrive after all. Idempotent."""
        if expert in self._given_up:
            self._given_up.remove(expert)
            self._leaving.remove(expert)
            self._admit_to_policy(expert)

    def abandon(self, expert: ExpertId) -> None:
        """`expert`'s record did not arrive whole: its slot is free again."""
        self._remove(expert)
        self._locked.remove(expert)
        self._arriving.remove(expert)

    def end(self) -> None:
        """The step is over, computed or not: nothing is locked any more but what is arriving."""
        if self._promised or self._leaving:
            self._end_promises()
        self._locked = set(self._arriving)
        self._event = frozenset()

    def _end_promises(self) -> None:
        for expert in sorted(self._promised - self._leaving):
            self._evict_from_policy(expert)
        self._leaving -= self._promised
        self._promised = set()
        for expert in sorted(self._leaving - self._arriving):
            self._free_slot_of(expert)

    def resize(self, capacity: int) -> Resize:
        """Have `capacity` slots from now on, between steps and with nothing arriving, at the high end more or fewer.

        The policy chooses who leaves if the residents become too many. A resident of a slot that is taken away moves to
        a free one; the table says so at once, and the caller moves the bytes.

        Raises:
            CapacityError: `capacity` is less than one slot; nothing has changed.
        """
        assert not self._event, f"the step over {sorted(self._event)} has not ended"
        assert not self._arriving, f"{sorted(self._arriving)} have not arrived"
        _check_capacity(capacity)
        victims: set[ExpertId] = set()
        while len(self._slot_of) - len(victims) > capacity:
            victim = self.policy.victim(victims)
            assert victim in self._slot_of and victim not in victims, f"{self.policy} evicts {victim}"
            victims.add(victim)
        for victim in sorted(victims):
            self._remove(victim)
        held = set(self._slot_of.values())
        free = [slot for slot in range(capacity - 1, -1, -1) if slot not in held]
        moves = []
        for expert, slot in sorted(self._slot_of.items()):
            if slot >= capacity:
                moves.append(Move(expert, slot, free.pop()))
                self._slot_of[expert] = moves[-1].to_slot
        self._free = free
        self.capacity = self.policy.capacity = capacity
        return Resize(tuple(sorted(victims)), tuple(moves))

    def recover(self, capacity: int, *, keep: bool) -> None:
        """Put the table in order after a step, or a `resize`, that was cut short anywhere; nothing is read any more.

        What was arriving has lost its slot. Residents stay if `keep`, which they cannot where a resize was cut short:
        their bytes may be anywhere. The policy starts anew.
        """
        kept = {expert: slot for expert, slot in self._slot_of.items() if keep and expert not in self._arriving}
        self._slot_of = kept
        self._locked, self._arriving = set(), set()
        self._event = self._expected = frozenset()
        self._promised, self._leaving, self._given_up = set(), set(), set()
        held = set(kept.values())
        self._free = [slot for slot in range(capacity - 1, -1, -1) if slot not in held]
        self.capacity = capacity
        self._late = []
        self._policy = self._policy.fresh(capacity)
        self._stay = set()
        for expert in sorted(kept):
            self._admit_to_policy(expert)

    def drop(self, expert: ExpertId) -> None:
        """`expert` is resident no longer, between steps: its bytes are lost."""
        assert expert not in self._locked, f"{expert} is locked"
        self._remove(expert)

    def _remove(self, expert: ExpertId) -> None:
        if expert not in self._leaving:
            self._evict_from_policy(expert)
        self._free_slot_of(expert)

    def _admit_to_policy(self, expert: ExpertId) -> None:
        self.policy.admit(expert)
        self._stay.add(expert)

    def _evict_from_policy(self, expert: ExpertId) -> None:
        self.policy.evict(expert)
        self._stay.discard(expert)

    def _free_slot_of(self, expert: ExpertId) -> None:
        self._leaving.discard(expert)
        self._given_up.discard(expert)
        self._free.append(self._slot_of.pop(expert))

    def check_integrity(self) -> None:
        """Assert that no slot is held twice or lost and that locks are residents."""
        held = list(self._slot_of.values())
        assert sorted(held + self._free) == list(range(self.capacity)), f"slots held {held}, free {self._free}"
        assert self.policy.capacity == self.capacity, (
            f"{self.policy} has {self.policy.capacity} of {self.capacity} slots"
        )
        assert self._locked <= self._slot_of.keys(), f"locked but absent: {self._locked - self._slot_of.keys()}"
        assert self._arriving <= self._locked, f"arriving but not locked: {self._arriving - self._locked}"
        assert self._given_up <= self._leaving & self._arriving, f"given up and to arrive: {self._given_up}"
        unslotted = self._leaving - self._slot_of.keys() - self._promised
        assert not unslotted, f"leaving without having come: {unslotted}"
        assert not self._promised & self._slot_of.keys(), f"promised and admitted: {self._promised}"
        stay = (self._slot_of.keys() | self._promised) - self._leaving
        assert self._stay == stay, f"the policy knows of {self._stay}, {stay} are to stay"
        assert len(stay) <= self.capacity, f"{len(stay)} are to stay in {self.capacity} slots"


def _check_capacity(capacity: int) -> None:
    if capacity < 1:
        raise CapacityError(f"a cache needs at least 1 slot, not {capacity}")
