"""What `moert simulate` was asked for, and the replays that this takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from moert.config import parse_budget
from moert.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from moert.simulate import Result
    from moert.trace import TraceLike

Scope = Literal["layer", "global"]

POLICIES = "lru,lfu,s3fifo,ema"
CAPACITIES = "12.5%,25%,50%"
SCOPES = ("layer", "global")
RESETS = ("never", "sequence")
COUNTS = ("decode", "all")

ASIDE = "lru"
"""The policy that is also shown with one cache for all layers, where the others have one each."""


@dataclass(frozen=True)
class Asked:
    """What holds for every replay."""

    policies: list[str]
    """Those that were named and the bound, in this order."""
    bounds: list[str]
    """Those among them that know the future."""
    capacities: list[str]
    scope: Scope
    reset: str
    count: str
    batch: int
    bypass: bool
    predictor: str | None
    expert_bytes: int | None
    jobs: int

    @property
    def rules(self) -> dict[str, Any]:
        """For `moert.simulate.sweep`."""
        return {
            "reset": self.reset,
            "count": self.count,
            "batch": self.batch,
            "bypass": self.bypass,
            "predictor": self.predictor,
            "expert_bytes": self.expert_bytes,
        }


def read_asked(
    *,
    policy: str,
    capacity: str | None,
    budget: str | None,
    scope: str,
    reset: str,
    count: str,
    batch: int,
    bypass: bool,
    predictor: str | None,
    expert_bytes: str | None,
    jobs: int,
    is_timed: bool = False,
) -> Asked:
    """The options of the command line, checked.

    Args:
        is_timed: times are asked for too, which a predictor also matters for where no policy looks ahead.

    Raises:
        ConfigError: one of them is no such thing.
    """
    for option, value, known in (("scope", scope, SCOPES), ("reset", reset, RESETS), ("count", count, COUNTS)):
        if value not in known:
            raise ConfigError(f"--{option}={value!r} must be one of {', '.join(known)}")
    policies, bounds = _read_policies(policy, "min_bypass" if bypass else "belady")
    return Asked(
        policies=policies,
        bounds=bounds,
        capacities=_read_capacities(capacity, budget),
        scope=cast("Scope", scope),
        reset=reset,
        count=count,
        batch=batch,
        bypass=bypass,
        predictor=None if predictor is None else _read_predictor(predictor, policies, is_timed=is_timed),
        expert_bytes=None if expert_bytes is None else _read_bytes(expert_bytes, "--expert-bytes"),
        # A process takes a second to start and its own copy of the events: beyond one a core they only cost.
        jobs=min(jobs, os.cpu_count() or 1),
    )


def _read_policies(text: str, bound: str) -> tuple[list[str], list[str]]:
    from moert.plugins import load_plugin, read_choice
    from moert.policies import Policy, make_policy, split_policies

    package = Policy.__module__.rpartition(".")[0]
    policies, bounds = list(dict.fromkeys(split_policies(text))), []
    for policy in policies:
        name, _ = read_choice(package, policy, Policy)  # type: ignore[type-abstract]  # only looked up
        if load_plugin(package, name, Policy).needs_future:  # type: ignore[type-abstract]  # only looked up
            bounds.append(policy)
        make_policy(policy, 1, future=())  # refuses values that make no sense
    if bound not in policies:
        policies.append(bound)
        bounds.append(bound)
    return policies, bounds


def _read_predictor(text: str, policies: Sequence[str], *, is_timed: bool) -> str:
    from moert.policies import make_policy
    from moert.predictors._choice import read_predictor

    kind, _ = read_predictor(text)
    looks = any(make_policy(policy, 1, future=()).tokens_ahead for policy in policies)
    if not kind.gives_probabilities and (looks or not is_timed):
        raise ConfigError(f"--predictor={text!r} gives no probabilities, so eviction cannot weigh them")
    if not looks and not is_timed:
        raise ConfigError(
            f"--predictor={text!r}: no policy of {', '.join(policies)} looks ahead; ema_ahead does, and --machine says "
            "what reading ahead gains"
        )
    return text


def _read_capacities(capacity: str | None, budget: str | None) -> list[str]:
    from moert.simulate import parse_capacity

    found = [parse_capacity(part).text for part in ([] if capacity is None else capacity.split(","))]
    for part in [] if budget is None else budget.split(","):
        nbytes = _read_bytes(part, "--budget")
        found.append(f"{nbytes}B" if part.strip().isdigit() else part.strip())
    return list(dict.fromkeys(found)) or CAPACITIES.split(",")


def _read_bytes(text: str, option: str) -> int:
    try:
        nbytes = parse_budget(text, option).nbytes
    except ConfigError:
        nbytes = None
    if nbytes is None:
        raise ConfigError(f"{option}={text!r} must be a number of bytes above 0, such as 4GiB")
    return nbytes


@dataclass(frozen=True)
class Replayed:
    """What came of one trace."""

    trace: TraceLike
    name: str
    rows: list[dict[str, Any]]
    """Of the table, in its order."""
    results: list[Result]
    curves: list[Result]
    """Empty unless they are to be drawn."""
    error: Exception | None
    """What ended it before it was complete."""


def replay(
    traces: Sequence[TraceLike],
    names: Sequence[str],
    asked: Asked,
    *,
    draw: bool,
    progress: Callable[[int, int], None],
) -> list[Replayed]:
    """Replay every trace. Blocks; `progress` is called after each replay with how many are done, of how many.

    The first error ends it; what was finished before is in the last of those returned, beside the error.

    Args:
        draw: also make what curves and heat maps are drawn from.
    """
    asides = [ASIDE] if asked.scope == "layer" and ASIDE in asked.policies else []
    marks = [_shares(trace, asked) if draw else [] for trace in traces]
    policies = len(asked.policies)
    total = sum(len(asked.capacities) * (policies + len(asides)) + len(shares) * policies for shares in marks)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    found: list[Replayed] = []
    for trace, name, shares in zip(traces, names, marks, strict=True):
        found.append(_replay(trace, name, asked, asides, shares, one_more))
        if found[-1].error is not None:
            break
    return found


def _replay(
    trace: TraceLike,
    name: str,
    asked: Asked,
    asides: Sequence[str],
    shares: Sequence[str],
    one_more: Callable[[], None],
) -> Replayed:
    from moert.simulate import sweep

    def sweep_into(found: list[Result], policies: Sequence[str], capacities: Sequence[str], **how: Any) -> None:
        def keep(done: int, total: int, result: Result) -> None:
            found.append(result)
            one_more()

        sweep([trace], policies, capacities, **asked.rules, n_jobs=asked.jobs, progress=keep, **how)

    results: list[Result] = []
    aside: list[Result] = []
    curves: list[Result] = []
    failed: Exception | None = None
    try:
        sweep_into(results, asked.policies, asked.capacities, scopes=(asked.scope,))
        if asides:
            slots = {result.capacity: result.capacity_experts for result in results}
            same = [_same(slots, text) for text in asked.capacities]
            sweep_into(aside, asides, same, scopes=("global",), bounds=False)
        if shares:
            sweep_into(curves, asked.policies, shares, scopes=(asked.scope,), bounds=False)
    except (ConfigError, CapacityError) as error:
        failed = type(error)(f"{name}: {error}")
        failed.__cause__ = error
    except Exception as error:
        failed = error
    rows = []
    for place, text in enumerate(asked.capacities):
        own = [_row(result, name, asked) for result in results if result.capacity == text]
        own += [_row(result, name, asked, of=text) for result in aside[place : place + 1]]
        rows += sorted(own, key=lambda row: (not row["bound"], -row["hit_rate"]))
    return Replayed(trace, name, rows, results, curves, failed)


def _same(slots: dict[str, int], text: str) -> str:
    """A capacity of one cache for all layers that holds as much as `text` does in a cache for each."""
    return str(slots[text]) if text.isdigit() else text


def _row(result: Result, name: str, asked: Asked, of: str | None = None) -> dict[str, Any]:
    """A result as the table and `--json` have it.

    Args:
        of: the capacity beside which it is shown, if its scope is not that of the others.
    """
    row = {**result.row(interval=True), "trace": name}
    row.setdefault("hit_rate_low", None)
    row.setdefault("hit_rate_high", None)
    row.update(bound=result.policy in asked.bounds, aside=of is not None)
    if of is not None:
        # Its own bound is another one: that of one cache.
        row.update(capacity=of, min_misses=None, gap_misses=None, gap_closed=None)
    return row


def _shares(trace: TraceLike, asked: Asked) -> list[str]:
    """The capacities of the trace's curves."""
    from moert.report.collect import curve_shares
    from moert.simulate.capacity import expert_sizes, parse_capacity, plan_caches

    header = trace.header
    sizes = expert_sizes(header.layers, asked.expert_bytes)
    n_experts = sum(layer.num_experts for layer in header.layers)
    wanted = [
        plan_caches(parse_capacity(text), header.layers, asked.scope, sizes).total_experts / n_experts
        for text in asked.capacities
    ]
    # A little more, so that rounding takes no expert away.
    return [f"{min(100, 100 * share + 1e-5):.9g}%" for share in curve_shares(header, wanted)]
