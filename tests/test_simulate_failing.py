"""A replay that fails late: what was finished before it is not lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from simulate_support import random_trace

from moert.cli import main
from moert.errors import PolicyError
from moert.simulate import Result, simulate, sweep
from moert.trace import TraceWriter

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

POLICY = '''
import time

from moert.policies.lru import LRU

class Late(LRU):
    """LRU that fails where its cache has `at` experts."""

    def __init__(self, capacity, at=3):
        super().__init__(capacity)
        self._at = at

    def victim(self, locked):
        if self.capacity == self._at:
            raise RuntimeError("out of ideas")
        return super().victim(locked)


class Slow(LRU):
    """LRU that takes its time."""

    def victim(self, locked):
        if not hasattr(self, "has_slept"):
            self.has_slept = time.sleep(0.3) or True
        return super().victim(locked)
'''


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "late_failure.py").write_text(POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # joblib's workers look there
    made = random_trace(np.random.default_rng(11), max_tokens=60)
    with TraceWriter(tmp_path / "trace.moert", made.header) as writer:
        for sequence in made.sequences:
            writer.add(sequence)
    return tmp_path / "trace.moert"


@pytest.mark.parametrize("backend", ["sequential", "threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_results_before_an_error_have_been_told(trace: Path, backend: str) -> None:
    seen: list[Result] = []
    with joblib.parallel_config(backend=backend, n_jobs=2), pytest.raises(PolicyError, match="ideas") as raised:
        sweep(
            [trace],
            ["lru", "late_failure:Late,at=3", "fifo"],
            [2, 3, 4],
            progress=lambda done, total, result: seen.append(result),
        )
    assert [(one.policy, one.capacity) for one in seen] == [
        ("lru", "2"),
        ("late_failure:Late,at=3", "2"),
        ("fifo", "2"),
        ("lru", "3"),
    ]
    assert seen[2].misses == simulate(trace, "fifo", 2).misses
    assert seen[2].min_misses is not None
    assert seen[3].min_misses is None, "its bounds were to come after the one that failed"
    parts = (raised.value, raised.value.__cause__)
    assert any("late_failure.py" in str(part) or part.__traceback__ is not None for part in parts if part is not None)


def test_an_error_does_not_outrun_the_results_before_it(trace: Path) -> None:
    seen: list[str] = []
    policies = ["late_failure:Slow", "late_failure:Late,at=2"]
    with joblib.parallel_config(backend="threading", n_jobs=2), pytest.raises(PolicyError, match="ideas"):
        sweep([trace], policies, [2], bounds=False, progress=lambda done, total, result: seen.append(result.policy))
    assert seen == ["late_failure:Slow"]


@pytest.mark.parametrize("as_json", [False, True])
def test_finished_rows_are_printed_before_the_error(
    trace: Path, as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    html = trace.with_suffix(".html")
    command: list[Any] = ["simulate", trace, "--policy", "lru,late_failure:Late,at=3", "--capacity", "2,3"]
    code = main([*map(str, command), "--html", str(html), *(["--json"] if as_json else [])])
    ran = capsys.readouterr()
    assert code == 2
    assert ran.err.startswith("moert: error: ")
    assert "out of ideas" in ran.err
    assert ran.err.count("\n") == 1
    assert not html.exists(), "a report would lack what has failed"
    if as_json:
        document = json.loads(ran.out)
        shown = [(row["policy"], row["capacity"]) for row in document["results"]]
        assert sorted(shown) == [("belady", "2"), ("late_failure:Late,at=3", "2"), ("lru", "2"), ("lru", "3")]
        assert "out of ideas" in document["error"]
    else:
        lines = [line.split() for line in ran.out.splitlines() if line]
        assert [line[0] for line in lines if line[0] == "lru"] == ["lru", "lru"]
        assert any(line[0] == "late_failure:Late,at=3" for line in lines)


def test_where_nothing_was_finished_only_the_error_is_printed(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["simulate", str(trace), "--policy", "late_failure:Late,at=3", "--capacity", "3", "--json"])
    ran = capsys.readouterr()
    assert (code, ran.out) == (2, "")
    assert "out of ideas" in ran.err
