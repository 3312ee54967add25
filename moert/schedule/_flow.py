"""What a schedule takes: the links, the device and the CPU, each doing one thing after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moert.schedule._costs import Costs
from moert.schedule.base import Item, Schedule
from moert.types import ExpertId


class Timing(NamedTuple):
    """When each part of the machine is done with an event, in seconds from its beginning; 0 if it does nothing."""

    device_s: float
    cpu_s: float
    link_s: float
    """Host to device."""
    disk_s: float

    @property
    def makespan_s(self) -> float:
        """Until the event's output is there."""
        return max(self.device_s, self.cpu_s)


def makespan(schedule: Schedule, costs: Costs) -> Timing:
    """Follow a schedule step by step.

    Whatever is to be done to an expert waits for what comes before it, and for its turn: read from disk, moved, run.
    """
    read, disk_s = _one_after_the_other(schedule.read, {}, lambda _: costs.read_s)
    moved, link_s = _one_after_the_other(schedule.fetch, read, lambda _: costs.move_s)
    device_s = 0.0
    if schedule.device:
        run_s = costs.device_s([item.tokens for item in schedule.device])
        _, device_s = _one_after_the_other(schedule.device, moved, lambda _: run_s)
    cpu_s = 0.0
    if schedule.cpu:
        _, cpu_s = _one_after_the_other(schedule.cpu, read, lambda item: costs.cpu_s(item.tokens), costs.cpu_start_s)
        cpu_s += costs.merge_s
    return Timing(device_s, cpu_s, link_s, disk_s)


def _one_after_the_other(
    items: tuple[Item, ...], ready: Mapping[ExpertId, float], seconds: object, start: float = 0.0
) -> tuple[dict[ExpertId, float], float]:
    """When each is done, and the last one, if none begins before it is `ready`."""
    assert callable(seconds)
    done, now = {}, start
    for item in items:
        now = max(now, ready.get(item.expert, 0.0)) + seconds(item)
        done[item.expert] = now
    return done, now if items else 0.0
