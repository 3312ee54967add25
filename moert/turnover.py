"""Who leaves for the misses of an event: the one rule that the engine and the simulator share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice

from moert.policies.base import Policy
from moert.types import ExpertId

PASSING = 8
"""Misses of an event larger than its cache that stay for being the last ones: through their slots, until they come, the
others stream, in whatever order reads end."""


def turn_over(
    policy: Policy,
    residents: set[ExpertId],
    event: Collection[ExpertId],
    misses: Sequence[ExpertId],
    capacity: int,
    arriving: AbstractSet[ExpertId] = frozenset(),
    used: int | None = None,
) -> list[ExpertId]:
    """Admit the misses of an event to a policy, one after the other, each in place of a victim if the cache is full.

    All of it is decided before anything moves, so no decision depends on which read ends first. While a resident is
    left that the event does not need, the policy chooses among those. In an event larger than the cache none may be:
    then it chooses among all residents but the last `PASSING` - 1 that were admitted for this event.

    Args:
        policy: has been told of the event by `access`.
        residents: what the policy takes for resident; changed in place. Those that the event finds are hits.
        event: all experts of the event.
        misses: those of them that are to be admitted, ascending, none in `residents`; each no larger than the cache.
        capacity: experts, or bytes where the policy has `sizes`.
        arriving: residents whose reads are under way: they leave only if no other can.
        used: what the residents take of `capacity`; None: their sizes are added up.

    Returns:
        The victims, in order. An expert of `misses` may be among them: it is computed, and does not stay.
    """
    locked = {expert for expert in event if expert in residents}
    locked.update(arriving)
    others = len(residents) - len(locked)
    sized = policy.sizes is not None
    if used is None:
        used = sum(map(policy.size, residents)) if sized else len(residents)
    admitted: dict[ExpertId, None] = {}
    victims = []
    for miss in misses:
        size = policy.size(miss) if sized else 1
        while used + size > capacity:
            victim = policy.victim_for(miss, locked if others else _passing(residents, admitted, arriving))
            assert victim in residents, f"{policy} evicts {victim}"
            if others:
                assert victim not in locked, f"{policy} evicts {victim}, which the event needs"
                others -= 1
            policy.evict(victim)
            residents.remove(victim)
            admitted.pop(victim, None)
            used -= policy.size(victim) if sized else 1
            victims.append(victim)
        policy.admit(miss)
        residents.add(miss)
        locked.add(miss)
        admitted[miss] = None
        used += size
    return victims


def _passing(
    residents: set[ExpertId], admitted: dict[ExpertId, None], arriving: AbstractSet[ExpertId]
) -> set[ExpertId]:
    """Those that stay while an event that does not fit passes through; at least one resident is not among them."""
    fixed = arriving if len(arriving) < len(residents) else frozenset[ExpertId]()
    last = islice(reversed(admitted), min(PASSING - 1, len(residents) - len(fixed) - 1))
    return {*fixed, *last}
