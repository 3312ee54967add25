"""What `moert simulate --machine` adds to each row: the time that a token takes there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moert.cli.replay import Asked, Replayed
from moert.config import parse_budget
from moert.errors import ConfigError

if TYPE_CHECKING:
    from moert.planning.machine import Machine
    from moert.schedule import Costs

TOKENS = 500
SCHEDULER = "exact"
WIDE = 1.15
"""A range whose most is so many times its least is told."""


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
    if asked.predictor is not None and asked.batch != 1:
        raise ConfigError("--predictor is told of one sequence at a time: leave out --batch, or --predictor")
    nbytes = 0 if dense_bytes is None else parse_budget(dense_bytes, "--dense-bytes").nbytes
    if nbytes is None:
        raise ConfigError(f"--dense-bytes={dense_bytes!r} must be a number of bytes, such as 2GiB")
    if machine == "this":
        from moert.cli.this_machine import this_machine

        found = this_machine()
    else:
        found = load_machine(machine)
    if found.has_device and asked.predictor is not None and not _looks_ahead(asked):
        raise ConfigError(
            f"--predictor with --machine {machine}: what is read ahead is simulated between disk and host memory only, "
            f"{found.name} has a device, and no policy of {', '.join(asked.policies)} looks ahead; ema_ahead does"
        )
    return Timing(found, scheduler, promotes, nbytes, tokens)


def _looks_ahead(asked: Asked) -> bool:
    from moert.policies import make_policy

    return any(make_policy(policy, 1, future=()).tokens_ahead for policy in asked.policies)


def add_times(replayed: Replayed, timing: Timing, asked: Asked, progress: Callable[[int, int], None]) -> None:
    """Time every row but those of another scope, and write what comes of it into them. Blocks.

    Raises:
        ConfigError: the bytes of an expert are unknown.
    """
    from moert.simulate.capacity import expert_sizes
    from moert.simulate.steps import first_tokens
    from moert.simulate.timed import simulate_time
    from moert.trace import Trace

    count: Literal["decode", "all"] = "decode" if asked.count == "decode" else "all"
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
    layers = len(header.layers)

    def layer_s(machine: Machine) -> float:
        return sum(machine.forward_s(timing.dense_bytes, layers)) / layers

    def by_layer(machine: Machine) -> list[Costs]:
        costs = {size: machine.costs(size) for size in set(sizes.tolist())}
        return [costs[size] for size in sizes.tolist()]

    trace = Trace(header, first_tokens(replayed.trace, timing.tokens))
    reads_ahead = asked.predictor is not None and not machine.has_device and not asked.bypass
    rows = [row for row in replayed.rows if not row["aside"]]
    for done, row in enumerate(rows):
        progress(done, len(rows))
        found, *ends = (
            simulate_time(
                trace,
                row["policy"],
                row["capacity"],
                by_layer(one),
                layer_s=layer_s(one),
                scheduler=timing.scheduler,
                promotion=_promotion() if timing.promotes and machine.has_device else None,
                count=count,
                batch=asked.batch,
                predictor=None if reads_ahead else asked.predictor,
                expert_bytes=asked.expert_bytes,
            )
            for one in (machine, *(machine.ends() or ()))
        )
        spread = sorted(end.seconds / found.seconds for end in ends)
        row.update(machine=machine.name, scheduler=timing.scheduler)
        if reads_ahead and row["policy"] not in asked.bounds:
            from moert.runtime.simulated import simulate_live

            row.update(unpredicted_ms_per_token=1e3 * found.seconds_per_token)
            found = simulate_live(
                trace,
                row["policy"],
                row["capacity"],
                by_layer(machine),
                layer_s=layer_s(machine),
                predictor=asked.predictor,
                count=count,
                expert_bytes=asked.expert_bytes,
            )
            row.update(
                predictor=asked.predictor,
                forwarded_per_token=found.forwarded / found.tokens,
                read_ahead_per_token=found.read_ahead / found.tokens,
                predict_ms_per_token=1e3 * found.predict_s / found.tokens,
            )
        row.update(
            timed_tokens=found.tokens,
            timed_hit_rate=found.hit_rate,
            ms_per_token=1e3 * found.seconds_per_token,
            range_ms_per_token=[1e3 * found.seconds_per_token * part for part in spread] or None,
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
    notes = []
    ends = [end / row["ms_per_token"] for row in rows for end in row.get("range_ms_per_token") or ()]
    if ends and max(ends) > WIDE * min(ends):
        notes.append(
            f"What was measured of this machine has varied: tokens may take {min(ends):.2f} to {max(ends):.2f} times "
            "as long."
        )
    ahead = [row["predict_ms_per_token"] for row in rows if "predict_ms_per_token" in row]
    if ahead:
        notes.append(
            "“Alone” is without the predictor; with it a time is that of the engine's own steps in simulated time: "
            "what it reads in the disk's idle time, and when it leaves that off. Predicting takes up to "
            f"{max(ahead):.2f} ms of it on this machine."
        )
    dense = "" if timing.dense_bytes else " Weights besides experts are not in them: --dense-bytes."
    return [
        (
            f"Times on {machine.name}, of the first {tokens:,} tokens: {how}. They follow from the numbers of its "
            f"description, most of which are assumed.{dense}"
        ),
        *notes,
        "“Of the bound” is the share of the speed that no policy and no schedule can pass.",
    ]
