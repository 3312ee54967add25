"""The least time that any policy and any schedule could take, from the least misses that are possible."""

from __future__ import annotations

from collections.abc import Sequence

from moert.errors import ConfigError
from moert.schedule import Costs
from moert.simulate.run import EventSource, Setup, fewest_misses


def bounds(
    source: EventSource,
    capacity: int | str,
    costs: Sequence[Costs],
    other_s: float,
    accesses: int,
    misses: int,
    *,
    expert_bytes: int | Sequence[int] | None = None,
) -> tuple[float, float]:
    """(what no policy can beat on a trace, what none can that has so many misses), both by `least_seconds`.

    Args:
        costs: of each layer; the least of each kind are taken.
    """
    fewest = fewest_misses(source, capacity, Setup(bypass=True), expert_bytes=expert_bytes) or 0
    least = Costs(
        min((one.cpu for one in costs), key=lambda curve: curve(1)),
        None if costs[0].device is None else min((one.device for one in costs if one.device), key=lambda c: c(1)),
        move_s=min(one.move_s for one in costs),
        read_s=least_read_s(costs),
    )
    return (
        least_seconds(accesses=accesses, misses=fewest, other_s=other_s, costs=least),
        least_seconds(accesses=accesses, misses=misses, other_s=other_s, costs=least),
    )


def least_read_s(costs: Sequence[Costs]) -> float:
    """The least that a record takes the disk, of any layer, in events with few reads or many."""
    return min(one.read_s if one.read_few is None else min(one.read_s, one.read_many_s) for one in costs)


def least_seconds(*, accesses: int, misses: int, other_s: float, costs: Costs) -> float:
    """A bound on the seconds that events with so many expert uses take, whoever decides.

    Of `accesses` uses at least `misses` are not served from what an earlier use left on the device: each of them takes
    the link once (in whatever order, also long before) or runs on the CPU. With y of all uses on the CPU, the time is
    no less than the link's, move_s (misses - y); the device's, other_s + device_s (accesses - y); and the CPU's,
    other_s + cpu_s y, as `other_s` runs before each event's experts and so beside none of them. The least of the
    largest of the three over all y, in closed form: where the rising line meets the higher of the two falling ones.

    It knows no barrier between layers and no start-up, so it cannot be reached. Without a device, every miss is read
    from disk and every use runs on the CPU.

    Args:
        accesses: experts that events needed, each once an event.
        misses: the least that any policy can have with so much room; a policy's own, for the bound of that policy.
        other_s: of all layers' other work.
        costs: taken for one token, which is the least an expert can take.

    Raises:
        ConfigError: counts or seconds below 0, or more misses than accesses.
    """
    if not 0 <= misses <= accesses or other_s < 0:
        raise ConfigError(f"there is no bound for {misses} misses of {accesses} accesses and {other_s} s besides")
    cpu_s = costs.cpu_s(1)
    if costs.device is None:
        return max(other_s + cpu_s * accesses, costs.read_s * misses)
    device_s, move_s = costs.device_s(1), costs.move_s

    def seconds(on_cpu: float) -> float:
        return max(
            other_s + device_s * (accesses - on_cpu), move_s * max(0.0, misses - on_cpu), other_s + cpu_s * on_cpu
        )

    crossings = [0.0]
    if cpu_s + device_s > 0:
        crossings.append(device_s * accesses / (cpu_s + device_s))
    if cpu_s + move_s > 0:
        crossings.append((move_s * misses - other_s) / (cpu_s + move_s))
    return seconds(min(max(crossings), float(accesses)))
