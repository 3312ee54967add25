"""Sweeps: the same results in the same order, whatever runs them."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib.parallel import ThreadingBackend
from simulate_support import random_trace

from moert.errors import CapacityError, ConfigError
from moert.policies.lru import LRU
from moert.simulate import Result, simulate, sweep
from moert.trace import Trace, TraceWriter

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

POLICIES = ["ema,alpha=0.1", "lru", "activation_matrix", "belady"]
CAPACITIES: list[int | str] = ["50%", 2]


def make_traces() -> list[Trace]:
    return [random_trace(np.random.default_rng(seed), max_tokens=60) for seed in (11, 12)]


def rows(results: list[Result]) -> list[dict[str, Any]]:
    return [result.row(interval=True) for result in results]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("traces")
    for number, trace in enumerate(make_traces()):
        with TraceWriter(folder / f"trace-{number}.moert", trace.header) as writer:
            for sequence in trace.sequences:
                writer.add(sequence)
    return sorted(folder.iterdir())


def test_a_sweep_is_every_combination_in_order() -> None:
    traces = make_traces()
    seen: list[tuple[int, int, str]] = []
    found = sweep(
        traces,
        POLICIES,
        CAPACITIES,
        scopes=("layer", "global"),
        progress=lambda done, total, result: seen.append((done, total, result.policy)),
    )
    combinations = list(itertools.product(traces, ("layer", "global"), CAPACITIES, POLICIES))
    assert seen == [(i + 1, 32, policy) for i, (*_, policy) in enumerate(combinations)]
    for result, (trace, scope, capacity, policy) in zip(found, combinations, strict=True):
        alone = simulate(trace, policy, capacity, scope=scope)  # type: ignore[arg-type]
        bounds = ("min_misses", "gap_misses", "gap_closed")
        assert {**result.row(), **dict.fromkeys(bounds)} == alone.row()
        assert result.layer_hits.tolist() == alone.layer_hits.tolist()
        assert result.gap_misses is not None
        assert result.gap_misses >= 0
        if policy == "lru":
            assert result.gap_closed in (0.0, None)


def test_gap_closed_is_one_at_the_bound_and_none_without_a_gap() -> None:
    (trace, _) = make_traces()
    (result,) = sweep([trace], ["belady"], ["100%"], count="all")
    assert (result.gap_misses, result.gap_closed) == (0, None)
    assert all(result.min_misses is None for result in sweep([trace], ["lru"], [3], bounds=False))


@pytest.mark.parametrize("backend", ["loky", "threading"])
@pytest.mark.parametrize("as_files", [True, False])
def test_other_backends_find_the_same(backend: str, as_files: bool, files: list[Path]) -> None:
    traces: list[Any] = list(files) if as_files else make_traces()
    alone = sweep(traces, POLICIES, CAPACITIES)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert rows(sweep(traces, POLICIES, CAPACITIES)) == rows(alone)


def test_n_jobs_is_joblibs(files: list[Path]) -> None:
    assert rows(sweep(files, ["lru"], [3], n_jobs=2)) == rows(sweep(files, ["lru"], [3], n_jobs=1))


class Grows(LRU):
    """Each replay leaves more behind than joblib lets a worker grow by, and takes longer than joblib looks away."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        kept.append(np.ones(40_000_000))
        time.sleep(1.1)


kept: list[Any] = []


def test_a_worker_that_grows_is_replaced_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    (trace, _) = make_traces()
    ways: dict[str, Any] = {"capacities": [3, 4, 5, 6, 7], "scopes": ["global"], "bounds": False}
    found = sweep([trace], ["test_simulate_sweep:Grows"], n_jobs=2, **ways)
    assert [result.hits for result in found] == [result.hits for result in sweep([trace], ["lru"], **ways)]
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.slow
def test_a_cluster_of_dask_finds_the_same(files: list[Path]) -> None:
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    alone = sweep(files, POLICIES, CAPACITIES)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        assert rows(sweep(files, POLICIES, CAPACITIES)) == rows(alone)


@pytest.mark.slow
def test_ray_finds_the_same(files: list[Path]) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.util.joblib").register_ray()
    alone = sweep(files, POLICIES, CAPACITIES)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        with joblib.parallel_config(backend="ray", n_jobs=2):
            assert rows(sweep(files, POLICIES, CAPACITIES)) == rows(alone)
    finally:
        ray.shutdown()


class AllAtOnce(ThreadingBackend):  # type: ignore[misc]  # joblib is not typed
    """Like Ray's, it returns nothing before all is done."""

    supports_return_generator = False


def test_a_backend_that_returns_everything_at_once_does_too() -> None:
    traces = make_traces()
    seen: list[str] = []
    joblib.register_parallel_backend("all-at-once", AllAtOnce)
    with joblib.parallel_config(backend="all-at-once", n_jobs=2):
        found = sweep(traces, POLICIES, CAPACITIES, progress=lambda done, total, result: seen.append(result.policy))
    assert rows(found) == rows(sweep(traces, POLICIES, CAPACITIES))
    assert seen == [result.policy for result in found]


def test_a_trace_that_changes_is_read_anew(tmp_path: Path) -> None:
    first, second = make_traces()
    path = tmp_path / "trace.moert"
    found = []
    for trace in (first, second):
        with TraceWriter(path, trace.header) as writer:
            for sequence in trace.sequences:
                writer.add(sequence)
        found.append(sweep([path], ["lru"], [3])[0].hits)
    assert found == [simulate(trace, "lru", 3).hits for trace in (first, second)]


@pytest.mark.parametrize("left_out", ["traces", "policies", "capacities", "scopes"])
def test_nothing_to_do(left_out: str) -> None:
    given: dict[str, Any] = {"traces": make_traces(), "policies": ["lru"], "capacities": [2], "scopes": ["layer"]}
    with pytest.raises(ConfigError, match=left_out):
        sweep(**{**given, left_out: []})
    with pytest.raises(ConfigError, match=left_out):
        sweep(**{**given, left_out: "lru"})


def test_what_cannot_work_is_said_before_anything_runs() -> None:
    seen: list[Result] = []

    def note(done: int, total: int, result: Result) -> None:
        seen.append(result)

    with pytest.raises(ConfigError, match="capacity"):
        sweep(make_traces(), ["lru"], [2, "nothing"], progress=note)
    with pytest.raises(ConfigError, match="psychic"):
        sweep(make_traces(), ["lru", "psychic"], [2], progress=note)
    with pytest.raises(CapacityError, match="less than one"):
        sweep(make_traces(), ["lru"], [2, "1%"], progress=note)
    assert seen == []
