"""What `moert simulate --machine` adds to each row: the time that a token takes there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moert.cli.replay import Asked, Replayed
from moert.config import parse_budget
from moert.errors import ConfigError

if TYPE_CHECKING:
    from moert.planning.machine import Machine

TOKENS = 500
SCHEDULER = "exact"


@dataclass(frozen=True)
class Timing:
    """The machine that was asked for, and how events run on it."""

    machine: Machine
    scheduler: str
    promotes: bool
    dense_bytes: int
    tokens: int


def read_timing(
    machine: str | None,
    *,
    scheduler: str | None,
    promote: bool | None,
    dense_bytes: str | None,
    tokens: int | None,
    asked: Asked,
) -> Timing | None:
    """The options of the command line, checked, None being one that was not given; None: no machine is named.

    Raises:
        ConfigError: one of them is no such thing, does not go with a machine, or says nothing without one.
    """
    if machine is None:
        options = {"--scheduler": scheduler, "--promote": promote, "--dense-bytes": dense_bytes, "--tokens": tokens}
        given = ["--no-promote" if value is False else option for option, value in options.items() if value is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)} without --machine: there is nothing to time; give --machine this|NAME|FILE, "
                f"or leave {'it' if len(given) == 1 else 'them'} out"
            )
        return None
    scheduler = SCHEDULER if scheduler is None else scheduler
    promotes = promote is not False
    tokens = TOKENS if tokens is None else tokens
    from moert.planning.machine import load_machine
    from moert.schedule import make_scheduler

    if asked.scope != "layer" or asked.reset != "never":
        raise ConfigError("--machine times caches of each layer that stay warm: leave --scope layer and --reset never")
    make_scheduler(scheduler)
    nbytes = 0 if dense_bytes is None else parse_budget(dense_bytes, "--dense-bytes").nbytes
    if nbytes is None:
        raise ConfigError(f"--dense-bytes={dense_bytes!r} must be a number of bytes, such as 2GiB")
    if machine == "this":
        from moert.cli.this_machine import this_machine

        return Timing(this_machine(), scheduler, promotes, nbytes, tokens)
    return Timing(load_machine(machine), scheduler, promotes, nbytes, tokens)


def add_times(replayed: Replayed, timing: Timing, asked: Asked, progress: Callable[[int, int], None]) -> None:
    """Time every row but those of another scope, and write what comes of it into them. Blocks.

    Raises:
        ConfigError: the bytes of an expert are unknown.
    """
    from moert.simulate.capacity import expert_sizes
    from moert.simulate.steps import first_tokens
    from moert.simulate.timed import simulate_time
    from moert.trace import Trace

    header = replayed.trace.header
    sizes = expert_sizes(header.layers, asked.expert_bytes)
    if sizes is None:
        raise ConfigError(
            f"{replayed.name} does not say how large an expert is, and so not how long it takes; give --expert-bytes"
        )
    machine = timing.machine
    if machine.name == "this":
        from moert.cli.calibration import calibrated_for

        machine = calibrated_for(machine, int(sizes[0]))
    costs = {size: machine.costs(size) for size in set(sizes.tolist())}
    layers = len(header.layers)
    layer_s = sum(machine.forward_s(timing.dense_bytes, layers)) / layers
    trace = Trace(header, first_tokens(replayed.trace, timing.tokens))
    rows = [row for row in replayed.rows if not row["aside"]]
    for done, row in enumerate(rows):
        progress(done, len(rows))
        found = simulate_time(
            trace,
            row["policy"],
            row["capacity"],
            [costs[size] for size in sizes.tolist()],
            layer_s=layer_s,
            scheduler=timing.scheduler,
            promotion=_promotion() if timing.promotes and machine.has_device else None,
            count="decode" if asked.count == "decode" else "all",
            batch=asked.batch,
            predictor=asked.predictor,
            expert_bytes=asked.expert_bytes,
        )
        row.update(
            machine=machine.name,
            scheduler=timing.scheduler,
            timed_tokens=found.tokens,
            timed_hit_rate=found.hit_rate,
            ms_per_token=1e3 * found.seconds_per_token,
            bound_ms_per_token=1e3 * found.bound_s / found.tokens,
            share_of_bound=found.share_of_bound,
            own_bound_ms_per_token=1e3 * found.own_bound_s / found.tokens,
            promoted_per_token=found.promoted / found.tokens,
        )


def _promotion() -> Any:
    from moert.schedule import Promotion

    return Promotion()


def timing_notes(timing: Timing, rows: list[dict[str, Any]]) -> list[str]:
    """How the times were made, in words."""
    machine = timing.machine
    tokens = max((row["timed_tokens"] for row in rows if "timed_tokens" in row), default=0)
    if machine.has_device:
        how = f"experts are on the device, the others in host memory; schedule {timing.scheduler}" + (
            ", the idle link promotes" if timing.promotes else ""
        )
    else:
        how = "experts are in host memory, the others on disk"
    dense = "" if timing.dense_bytes else " Weights besides experts are not in them: --dense-bytes."
    return [
        (
            f"Times on {machine.name}, of the first {tokens:,} tokens: {how}. They follow from the numbers of its "
            f"description, most of which are assumed.{dense}"
        ),
        "“Of the bound” is the share of the speed that no policy and no schedule can pass.",
    ]
