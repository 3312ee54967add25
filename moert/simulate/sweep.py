"""Policies x capacities x scopes x traces, through joblib."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from moert.errors import ConfigError
from moert.policies import make_policy
from moert.simulate.capacity import Scope, expert_sizes, parse_capacity, plan_caches
from moert.simulate.events import Count, Reading, TraceSource
from moert.simulate.results import Result
from moert.simulate.run import EventSource, Reset, Setup, fewest_misses, replay

Progress = Callable[[int, int, Result], None]


class _File(NamedTuple):
    """A trace file as it was when the sweep began; a worker that has read it need not read it again."""

    path: str
    size: int
    changed_ns: int
    reading: Reading


@dataclass(frozen=True)
class _Cell:
    source: _File | EventSource
    policy: str | None
    """None: the bounds, which are the misses of LRU and the fewest that there can be."""
    capacity: int | str
    setup: Setup
    expert_bytes: int | Sequence[int] | None


class _Failure(NamedTuple):
    """A cell's error, in its place among the results: as an error of joblib's it would outrun those before it."""

    error: Exception
    trace: str


class _Where(Exception):
    """Where in a worker an error was raised, as text; a traceback stays behind in its process."""


def sweep(
    traces: Sequence[TraceSource],
    policies: Sequence[str],
    capacities: Sequence[int | str],
    *,
    scopes: Sequence[Scope] = ("layer",),
    bounds: bool = True,
    reset: Reset = "never",
    count: Count = "decode",
    batch: int = 1,
    atomic: bool = True,
    bypass: bool = False,
    predictor: str | None = None,
    expert_bytes: int | Sequence[int] | None = None,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """`simulate` for every combination, by trace, then scope, then capacity, then policy, each in the order given.

    Runs on joblib, so `with joblib.parallel_config(backend="dask")` (or `"ray"`, after its registration) spreads it
    over a cluster; a trace that is given by its path must then have it on every machine. A worker keeps the events of
    the last traces that it has read. Blocks.

    Args:
        bounds: also find LRU's misses and the fewest possible, which fill `min_misses`, `gap_misses`, `gap_closed`.
        n_jobs: processes or threads at once; None: as `joblib.parallel_config` says, else one.
        progress: called in this thread with how many results there are, how many there will be, and the latest, in
            their order. Where the back-end cannot say before all is done, as Ray's, it is called then.

    Raises:
        as `simulate`, and what a policy raises; ConfigError also where there is nothing to do.
    """
    for kind, given in (("traces", traces), ("policies", policies), ("capacities", capacities), ("scopes", scopes)):
        if not given or isinstance(given, str):
            raise ConfigError(f"{kind}={given!r} must be a list with something in it")
    reading = Reading(count, batch, atomic)
    setups = [Setup(scope, reset, bypass, predictor) for scope in scopes]
    cells = []
    for policy in policies:
        make_policy(policy, 1, future=())
    for trace in traces:
        # What cannot work is said before anything runs.
        source, opened = _source_of(trace, reading)
        layers = opened.header.layers
        sizes = expert_sizes(layers, expert_bytes)
        for setup in setups:
            for capacity in capacities:
                plan_caches(parse_capacity(capacity), layers, setup.scope, sizes)
                cells += [
                    _Cell(source, policy, capacity, setup, expert_bytes)
                    for policy in ((*policies, None) if bounds else policies)
                ]
    outcomes = _outcomes(cells, n_jobs)
    try:
        with warnings.catch_warnings():
            # joblib replaces a worker that has grown by 300 MB, by a long trace or by compiling, and takes it for a
            # leak; no cell is lost by it.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            return list(_collected(cells, outcomes, progress))
    finally:
        with warnings.catch_warnings():
            # That what comes after an error is not asked for is no mistake, as joblib takes it to be.
            warnings.simplefilter("ignore", UserWarning)
            outcomes.close()


def _source_of(trace: TraceSource, reading: Reading) -> tuple[_File | EventSource, EventSource]:
    opened = EventSource(trace, reading)
    if isinstance(trace, (str, Path)):
        at = os.stat(trace)
        return _File(str(Path(trace).resolve()), at.st_size, at.st_mtime_ns, reading), opened
    return opened, opened


def _outcomes(cells: Sequence[_Cell], n_jobs: int | None) -> Generator[Any, None, None]:
    from joblib import Parallel, delayed

    try:
        parallel = Parallel(n_jobs=n_jobs, return_as="generator")
    except ValueError:
        # Not every back-end hands over what is done before all is; Ray's does not.
        parallel = Parallel(n_jobs=n_jobs)
    yield from parallel(delayed(_run)(cell) for cell in cells)


def _collected(cells: Sequence[_Cell], outcomes: Iterator[Any], progress: Progress | None) -> Iterator[Result]:
    """Results with their bounds, which come after the results that they are for."""
    total = sum(cell.policy is not None for cell in cells)
    has_bounds = len(cells) > total
    done = 0
    waiting: list[Result] = []

    def found(lru: int | None, fewest: int | None) -> Iterator[Result]:
        nonlocal done, waiting
        results, waiting = waiting, []
        for result in results:
            done += 1
            bounded = replace(result, lru_misses=lru, min_misses=fewest)
            if progress is not None:
                progress(done, total, bounded)
            yield bounded

    for cell in cells:
        try:
            outcome = next(outcomes)
            if isinstance(outcome, _Failure):
                raise outcome.error from (None if outcome.error.__traceback__ else _Where(outcome.trace))
        except Exception:
            for _ in found(None, None):
                pass
            raise
        if cell.policy is None:
            yield from found(*outcome)
            continue
        waiting.append(outcome)
        if not has_bounds:
            yield from found(None, None)


def _run(cell: _Cell) -> Any:
    try:
        return _outcome(cell)
    except Exception as error:
        return _Failure(error, traceback.format_exc())


def _outcome(cell: _Cell) -> Any:
    source = cell.source if isinstance(cell.source, EventSource) else _opened(cell.source)
    if cell.policy is not None:
        return replay(source, cell.policy, cell.capacity, cell.setup, expert_bytes=cell.expert_bytes)
    lru = replay(source, "lru", cell.capacity, replace(cell.setup, bypass=False), expert_bytes=cell.expert_bytes)
    return lru.misses, fewest_misses(source, cell.capacity, cell.setup, expert_bytes=cell.expert_bytes)


@lru_cache(maxsize=2)
def _opened(file: _File) -> EventSource:
    return EventSource(file.path, file.reading)
