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


def makespan(schedule: Schedule, costs: Costs, room: int | None = None) -> Timing:
    """Follow a schedule step by step.

    Whatever is to be done to an expert waits for what comes before it, and for its turn: read from disk, moved, run.
    Without a device, disk and CPU also slow each other down as far as the costs say.

    Args:
        room: slots that the event's reads can go to from the beginning, on a machine without a device; further reads
            wait for experts of the event that have been computed. None: for all of them.
    """
    if costs.device is None:
        return _disk_and_cpu(schedule, costs, len(schedule.read) if room is None else room)
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


def _disk_and_cpu(schedule: Schedule, costs: Costs, room: int) -> Timing:
    """Both work at once, each at the pace that the other leaves it, until there is nothing left to do."""
    arrived: set[ExpertId] = set()
    from_disk = {item.expert for item in schedule.read}
    read_s = costs.each_read_s(len(from_disk))
    now = costs.lead_s(len(from_disk))
    disk_s = 0.0
    reads, runs = iter(schedule.read), iter(schedule.cpu)
    read, run = next(reads, None), next(runs, None)
    read_left = costs.read_start_s + read_s
    wait_left = costs.cpu_start_s
    run_left = costs.cpu_s(run.tokens) if run is not None else 0.0
    while read is not None or run is not None:
        can_run = run is not None and (run.expert not in from_disk or run.expert in arrived)
        # There is always something to do: if nothing can run, what is needed next is read whatever the room.
        can_read = read is not None and (room > 0 or not can_run)
        is_busy = can_run and not wait_left
        read_pace = costs.read_slowdown if is_busy else 1.0
        run_pace = costs.cpu_slowdown if is_busy and can_read else 1.0
        until = [read_left * read_pace] if can_read else []
        until += [wait_left or run_left * run_pace] if wait_left or can_run else []
        passed = min(until)
        now += passed
        # What is done first has nothing left, whatever rounding says.
        if can_read and read is not None:
            if read_left * read_pace <= passed:
                arrived.add(read.expert)
                room -= 1
                read, read_left, disk_s = next(reads, None), read_s, now
            else:
                read_left -= passed / read_pace
        if wait_left:
            wait_left = max(0.0, wait_left - passed)
        elif can_run and run_left * run_pace <= passed:
            room += 1
            run = next(runs, None)
            run_left = costs.cpu_s(run.tokens) if run is not None else 0.0
        elif can_run:
            run_left -= passed / run_pace
    return Timing(0.0, now + costs.merge_s if schedule.cpu else 0.0, 0.0, disk_s)


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
