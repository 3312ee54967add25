"""Where each expert of a step runs: what a scheduler says of it, as far as it can be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_transfers import DeviceTransfers
from moert.schedule import Costs, Item, Place, Scheduler
from moert.types import ExpertId


@dataclass
class StepPlan:
    """A step's groups by what is done with them; numbers are places in the step's list of groups."""

    here: list[int] = field(default_factory=list)
    """On the device, where their experts are or to which they are on their way."""
    fetch: list[int] = field(default_factory=list)
    """On the device, once their experts have been brought there, in this order."""
    cpu: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    """Of the last two those that are on disk, in the order to read them."""


def plan_step(
    cache: DeviceCache,
    event: Sequence[ExpertId],
    tokens: Sequence[int],
    *,
    transfers: DeviceTransfers,
    scheduler: Scheduler,
    costs: Costs,
    value: Callable[[ExpertId], float],
) -> StepPlan:
    """Ask the scheduler; changes nothing.

    What is on its way to the device counts as there: nothing is gained by leaving it. A resident that the scheduler
    would have the CPU compute stays on the device if host memory has lost it.
    """
    turn_of = {expert: turn for turn, expert in enumerate(event)}
    items = []
    for expert, n in zip(event, tokens, strict=True):
        if expert in cache.residency or transfers.coming(expert) is not None:
            place = Place.DEVICE
        else:
            place = Place.HOST if cache.host.has(expert) else Place.DISK
        items.append(Item(expert, n, place, value(expert)))
    schedule = scheduler.plan(items, costs)
    plan = StepPlan(
        fetch=[turn_of[item.expert] for item in schedule.fetch],
        read=[turn_of[item.expert] for item in schedule.read],
    )
    for item in schedule.cpu:
        stays = item.place is Place.DEVICE and not (item.expert in cache.residency and cache.host.has(item.expert))
        (plan.here if stays else plan.cpu).append(turn_of[item.expert])
    plan.here += [turn_of[item.expert] for item in schedule.device if item.place is Place.DEVICE]
    # Where the schedule does not say, say because nothing is to be read from disk twice.
    known = set(plan.read)
    needed = [*plan.fetch, *plan.cpu]
    plan.read += [turn for turn in needed if turn not in known and not cache.host.has(event[turn])]
    # The least valuable first: whoever has been computed may make room for what comes up.
    plan.here.sort(key=lambda turn: (value(event[turn]), turn))
    return plan
