"""The interface of a scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from moert.schedule._costs import Costs
from moert.types import ExpertId


class Place(IntEnum):
    """Where an expert's weights are when its event begins; the nearest tier that has them."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Item(NamedTuple):
    """One expert of an event."""

    expert: ExpertId
    tokens: int
    """How many tokens chose it."""
    place: Place
    value: float = 0.0
    """What having it on the device afterwards is worth: of experts that cost the same the most valuable are fetched."""


class Schedule(NamedTuple):
    """What each part of a machine does for an event, in its order. Each expert is in `device` or in `cpu`."""

    device: tuple[Item, ...]
    """Run on the device: those that are there already, then those of `fetch`."""
    fetch: tuple[Item, ...]
    """Moved to the device, all of them in `device` too."""
    cpu: tuple[Item, ...]
    """Run on the CPU."""
    read: tuple[Item, ...] = ()
    """Read from disk: every one that is there."""


class Scheduler(ABC):
    """Decides where an event's experts run. It owns nothing, moves nothing, and knows no clock."""

    @abstractmethod
    def plan(self, items: Sequence[Item], costs: Costs) -> Schedule:
        """A schedule for an event of these experts, each once.

        On a machine without a device everything runs on the CPU.
        """


def arrange(cpu: Sequence[Item], device: Sequence[Item], costs: Costs) -> Schedule:
    """The best order for experts of which is known where they run.

    What waits for nothing comes first. Of those on disk the one is read first that has most to be done after it
    (Jackson's rule), with longer work before shorter on the CPU.
    """
    resident = [item for item in device if item.place is Place.DEVICE]
    fetch = sorted((item for item in device if item.place is not Place.DEVICE), key=lambda item: item.place)
    on_cpu = sorted(cpu, key=lambda item: (item.place is Place.DISK, -item.tokens))
    from_disk = [item for item in on_cpu if item.place is Place.DISK]
    tails = []
    rest = 0.0
    for item in reversed(from_disk):
        rest += costs.cpu_s(item.tokens)
        tails.append((rest + costs.merge_s, item))
    to_device = [item for item in fetch if item.place is Place.DISK]
    if to_device:
        run_s = costs.device_s([item.tokens for item in device])
        for behind, item in enumerate(reversed(to_device), start=1):
            tails.append((max(costs.move_s * behind + run_s, costs.move_s + run_s * behind), item))
    read = tuple(item for _, item in sorted(tails, key=lambda tail: -tail[0]))
    return Schedule((*resident, *fetch), tuple(fetch), tuple(on_cpu), read)
