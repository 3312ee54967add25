"""The session for a machine with a GPU, as far as it can run without one: every step on tiny sizes, interpreted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu_session.sh"
STEPS = ("tests", "parity", "peaks", "decode", "offload", "grouped", "copies", "overlap", "model", "sanitizer", "sweep")
GOALS = {"G1", "G3", "G4", "G6", "G7", "G8", "G9", "offload", "end to end", "sanitizer"}
NOT_MEASURED = {"compute-sanitizer"}
"""Without a GPU."""

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="triton's interpreter is off: there is a GPU"
)


def session(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(SCRIPT), str(folder), *options], capture_output=True, text=True, env=environment, timeout=280
    )


def test_a_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    child = session(tmp_path / "out", "--dry-run")
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "gpu-session-dry-run.json").read_text())
    assert found["dry_run"] is True
    assert {name: step["ended"] for name, step in found["steps"].items()} == dict.fromkeys(STEPS, "well")
    rows = [row for step in found["steps"].values() for row in step["rows"]]
    assert {row["goal"] for row in rows} - {"", "sweep"} == GOALS
    assert not any(row.get("wrong") for row in rows)
    assert {row["what"] for row in rows if row["value"] is None} == NOT_MEASURED
    guarded = {"exact", "cpu_all", "fetch_all"}
    by = {
        "hybrid": guarded,
        "all fetched": {"fetch_all"},
        "all on the CPU": {"cpu_all"},
        "static split": {"static_split"},
        # What stands for a GPU has the CPU's kernels there, and leaves nothing to them alone.
        "the device alone": {"fetch_all"},
    }
    assert all(row["steps"].keys() <= by[row["way"]] for row in rows if row.get("kind") == "decode")
    ways = {(row["share"], row["way"]) for row in rows if row.get("kind") == "decode" and row["stored_as"] == "bf16"}
    assert ways == {(100, "all fetched"), *((share, way) for share in (50, 25, 10) for way in by)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gpu-session.log",
        "gpu-session-dry-run.json",
        *(f"gpu-session-dry-run-{name}.png" for name in ("decode", "grouped", "copies")),
    }
    # The table comes last, and says that it is none.
    last = child.stdout[child.stdout.rindex("Steps") :]
    assert "the times mean nothing" in last and "G8" in last and "yes" not in last


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_session.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert child.returncode == 2 and "there is no CUDA device" in child.stderr
    child = session(tmp_path, "--dry-run", "--only", "decode,nothing")
    assert child.returncode == 2 and "no step 'nothing'" in child.stdout
    child = session(tmp_path, "--dry-run", "--only", "offload", "--trace", "no/such")
    assert child.returncode == 2 and "there is no file no/such" in child.stdout


def test_a_step_that_fails_or_hangs_ends_alone(bench_on_path: None, capfd: pytest.CaptureFixture[str]) -> None:
    import gpu_layers  # noqa: F401  so that no step spends its time on it
    import gpu_session

    # Nobody else's, who may run the same test beside this one.
    hanging = f"1000.{os.getpid()}"

    def late(context: Any) -> None:
        context.rows.add("before", 1.0, "x")
        subprocess.run(["sleep", hanging], check=False)

    def bad(context: Any) -> None:
        context.rows.add("before", 1.0, "x")
        raise ValueError("no good")

    def dead(context: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrong(context: Any) -> None:
        context.rows.add("a kernel", None, "us", wrong=True)

    ends = {}
    for work in (late, bad, dead, wrong):
        begin = time.monotonic()
        step = gpu_session.Step(work.__name__, 4.0 if work is late else 120.0, work)
        ends[work.__name__] = gpu_session.run_step(step, {}, begin + 120, dry=True, tiny=False)
    assert ends["late"]["ended"].startswith("not within ")
    assert ends["bad"]["ended"] == "ValueError: no good"
    assert ends["dead"]["ended"] == "with exit code -9"
    assert ends["wrong"]["ended"] == "1 wrong"
    assert [len(end["rows"]) for end in ends.values()] == [1, 1, 0, 1]
    end = time.monotonic() + 20
    # What was killed is there until it next has a core.
    while hanging in (left := subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout):
        assert time.monotonic() < end, left
        time.sleep(0.01)
    capfd.readouterr()


def test_nothing_is_timed_that_is_wrong(bench_on_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_contenders
    import gpu_decode
    import torch
    import triton_support
    from gpu_layers import TINY, Setting
    from gpu_results import Rows

    assert triton_support.INTERPRETED
    monkeypatch.setattr(gpu_decode, "FASTER", {})
    for module in (gpu_contenders, gpu_decode):
        monkeypatch.setattr(module, "device_experts", lambda bank, x, *step: x * 1.02)
    monkeypatch.setattr(gpu_decode, "race", lambda calls, device, **_: pytest.fail("timed") if calls else {})
    rows = Rows(tmp_path / "rows.json")
    gpu_decode.run(Setting(torch.device("cpu"), TINY), rows, {})
    assert rows.rows and all(row["wrong"] and row["value"] is None for row in rows.rows)


def test_only_others_may_drop_out_of_a_race(bench_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_timing
    import torch

    def prepared(calls: Any, device: torch.device) -> tuple[Any, str]:
        calls[0]()  # as where a graph is captured
        return calls[0], "graph"

    def broken() -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_timing, "_prepared", prepared)
    contenders = {"moert": [lambda: None], "other": [broken]}
    with pytest.raises(RuntimeError, match="no such kernel"):
        gpu_timing.race(contenders, torch.device("cpu"))
    assert list(gpu_timing.race(contenders, torch.device("cpu"), may_fail=("other",))) == ["moert"]
