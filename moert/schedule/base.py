"""The interface of a scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate
from operator import attrgetter, itemgetter
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


_HERE, _HOST, _DISK = Place
_tokens, _tail = attrgetter("tokens"), itemgetter(0)


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
    resident = [item for item in device if item.place is _HERE]
    to_device = [item for item in device if item.place is _DISK]
    fetch = [item for item in device if item.place is _HOST] + to_device
    from_disk = sorted([item for item in cpu if item.place is _DISK], key=_tokens, reverse=True)
    on_cpu = sorted([item for item in cpu if item.place is not _DISK], key=_tokens, reverse=True) + from_disk
    tails = []
    if from_disk:
        from_disk.reverse()
        times, merge_s = costs.cpu_times, costs.merge_s
        rests = accumulate([times[item.tokens] for item in from_disk])
        tails += [(rest + merge_s, item) for rest, item in zip(rests, from_disk, strict=True)]
    if to_device:
        to_device.reverse()
        # Moving and running overlap: the longer of the two sets the pace, and the other comes once.
        once_s, pace_s = sorted((costs.move_s, costs.device_s([item.tokens for item in device])))
        tails += [(n * pace_s + once_s, item) for n, item in enumerate(to_device, start=1)]
    tails.sort(key=_tail, reverse=True)
    return Schedule((*resident, *fetch), tuple(fetch), tuple(on_cpu), tuple([item for _, item in tails]))
