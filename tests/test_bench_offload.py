"""The offload benchmark: limits that bite, cold files, the disk's own limit, and no speed without the right tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module as bench
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("bench_on_path")

BENCH = Path(__file__).parents[1] / "bench"
NARROW = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
RUN_KEYS = {"tokens_per_s", "first_token_s", "load_s", "share_of_disk_limit"}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = bench("architectures").configuration(
        "olmoe-bench", layers=2, experts=8, hidden=64, expert_width=32, overrides=NARROW
    )
    bench("make_checkpoint").write_checkpoint(config, tmp_path / "tiny", shard_bytes=60_000)
    return tmp_path / "tiny"


def skip_unless_limits_work(limit_bytes: int) -> None:
    refused = bench("limited").limit_refused(limit_bytes)
    if refused:
        pytest.skip(refused)


@pytest.mark.parametrize("systems", ["moert,moert-resident", pytest.param("moert,hf", marks=pytest.mark.slow)])
def test_a_whole_benchmark(tiny: Path, tmp_path: Path, systems: str) -> None:
    pytest.importorskip("moert.api")
    command = [sys.executable, str(BENCH / "offload.py"), str(tiny), "--systems", systems, "--host-memory", "100%"]
    command += ["--tokens", "6", "--rounds", "1", "--disk-seconds", "0.1", "--json", str(tmp_path / "out.json")]
    result = subprocess.run([*command, "--scratch", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["system"] for row in report["summary"]] == systems.split(",")
    for row in report["summary"]:
        assert row.keys() >= RUN_KEYS
        assert row["tokens_per_s"] > 0
        assert row["system"] in result.stdout
    assert report["record_bytes"] == 3 * 64 * 32 * 2
    assert report["disk_bytes_per_s"] > 0
    assert report["parity"]["verdict"] in (("equal", "ties"))
    assert report["machine"]["torch_threads"], "whatever the environment says, or as under moert's command line"
    runs = [outcome["run"] for one in report["rounds"] for outcome in one["outcomes"]]
    assert all(len(run["tokens"]) == 6 for run in runs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "tiny"]


def test_the_slower_limit_binds() -> None:
    report = bench("report")

    def share(disk: float, speed: float, resident: float | None) -> float | None:
        rows = [{"system": "moert", "tokens_per_s": speed, "share_of_disk_limit": disk}]
        rows += [] if resident is None else [{"system": "moert-resident", "tokens_per_s": resident}]
        report.set_share_of_limit(rows)
        return rows[0].get("share_of_limit")

    assert share(0.6, 8.0, 10.0) == 0.8
    assert share(0.9, 8.0, 10.0) == 0.9
    assert share(0.9, 8.0, None) is None


def test_the_resident_run_has_no_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, systems = bench("rounds"), bench("systems")
    limits = {}
    monkeypatch.setattr(rounds, "drop_page_cache", lambda files: None)
    monkeypatch.setattr(rounds, "run_child", lambda spec, limit, **_: limits.setdefault(spec.system, limit))
    of = rounds.Bench([], 1, 100, 1.0, 1.0)
    for system in ("moert", systems.RESIDENT):
        of.run(systems.Spec(system, "folder", [1], 2))
    assert limits == {"moert": 100, systems.RESIDENT: None}


def outcome(system: str, tokens: list[int] | None, **of_run: Any) -> Any:
    limited, systems = bench("limited"), bench("systems")
    if tokens is None:
        return limited.Outcome(system, error="killed")
    return limited.Outcome(system, run=systems.Run(tokens=tokens, decode_s=1.0, **of_run))


def judge(outcomes: list[Any], rerun: Callable[[Any, bool], Any]) -> Any:
    spec = bench("systems").Spec("moert", "folder", [1], 3, host_memory="25%")
    return bench("parity").check(outcomes, spec, "100%", rerun)


def never(spec: Any, limited: bool) -> Any:
    raise AssertionError("no further run was needed")


def test_parity_of_equal_tokens_needs_no_further_run() -> None:
    verdict = judge([outcome("moert", [1, 2, 3]), outcome("hf", [1, 2, 3])], never)
    assert (verdict.verdict, verdict.reference, verdict.green) == ("equal", "hf", True)


@pytest.mark.parametrize(("gap", "expected"), [(0.02, "ties"), (0.9, "red")])
def test_parity_follows_the_reference_where_tokens_differ(gap: float, expected: str) -> None:
    def along(spec: Any, limited: bool) -> Any:
        assert spec.forced == [1, 7, 3]
        assert limited
        return outcome("moert", [1, 7, 3], gaps=[0.0, gap, 0.0], forced_differ=1)

    verdict = judge([outcome("moert", [1, 2, 3]), outcome("hf", [1, 7, 3])], along)
    assert verdict.verdict == expected
    assert verdict.green == (expected == "ties")


@pytest.mark.parametrize(("other", "expected"), [([1, 2, 3], "equal"), ([1, 2, 4], "red"), (None, "not checked")])
def test_parity_without_transformers_takes_another_budget(other: list[int] | None, expected: str) -> None:
    def rerun(spec: Any, limited: bool) -> Any:
        assert spec.host_memory == "100%"
        assert not limited
        return outcome("moert", other)

    verdict = judge([outcome("moert", [1, 2, 3]), outcome("hf", None)], rerun)
    assert verdict.verdict == expected
    assert verdict.green == (expected == "equal")


def test_parity_is_red_when_rounds_disagree() -> None:
    outcomes = [outcome("moert", [1, 2, 3]), outcome("moert", [1, 2, 4]), outcome("hf", [1, 2, 3])]
    assert judge(outcomes, never).verdict == "red"


def test_no_speed_is_reported_without_parity() -> None:
    outcomes = [outcome("moert", [1, 2, 3])]
    report = bench("report")
    assert not report.summarise("moert", outcomes, speed=False).keys() & RUN_KEYS
    row = report.summarise("moert", outcomes, speed=True, reference=[1, 2, 4])
    assert row["tokens_per_s"] == 2.0
    assert row["tokens_as_hf"] == "2 of 3"


def test_forced_tokens_tell_how_far_they_were_from_greedy(tiny: Path, tmp_path: Path) -> None:
    systems = bench("systems")
    spec = systems.Spec("hf", str(tiny), [5, 6, 7], 3, hf_folder=str(tiny), hf_memory_bytes=10**9)

    def ran() -> Any:
        """As in a child, but for the time that one takes to import everything."""
        (tmp_path / "spec").write_text(json.dumps(dataclasses.asdict(spec)))
        systems.main(str(tmp_path / "spec"), str(tmp_path / "result"))
        return systems.Run(**json.loads((tmp_path / "result").read_text()))

    tokens = ran().tokens
    spec.forced = [*tokens[:2], (tokens[2] + 1) % 320]
    forced = ran()
    assert forced.tokens == spec.forced
    assert forced.gaps[:2] == [0.0, 0.0]
    assert forced.gaps[2] > 0
    assert forced.forced_differ == 1


def grow(limit_bytes: int, use_bytes: int) -> tuple[int, Any, Path]:
    """Touch `use_bytes` in a child under `limit_bytes`: its exit code, the group's state, the group's folder."""
    cgroup = bench("cgroup")
    with cgroup.memory_group(limit_bytes) as group:
        script = f"b = bytearray({use_bytes}); b[::4096] = bytes([1]) * len(b[::4096])"
        code = subprocess.run(group.command([sys.executable, "-c", script])).returncode
        return code, (group.oom_kills, group.peak_bytes), group.path


def test_a_group_kills_what_outgrows_it_and_is_removed() -> None:
    limit_bytes = 64 << 20
    skip_unless_limits_work(limit_bytes)
    code, (kills, peak_bytes), path = grow(limit_bytes, 128 << 20)
    assert (code, kills) == (-9, 1)
    assert peak_bytes is None or limit_bytes * 0.9 < peak_bytes <= limit_bytes
    assert not path.exists()


def test_a_group_leaves_alone_what_fits() -> None:
    skip_unless_limits_work(64 << 20)
    code, (kills, peak_bytes), path = grow(64 << 20, 16 << 20)
    assert (code, kills) == (0, 0)
    assert peak_bytes is None or 16 << 20 < peak_bytes < 64 << 20
    assert not path.exists()


def test_a_run_killed_for_memory_says_so(tiny: Path) -> None:
    limit_bytes = 48 << 20
    skip_unless_limits_work(limit_bytes)
    spec = bench("systems").Spec("hf", str(tiny), [1], 2, hf_folder=str(tiny))
    killed = bench("limited").run_child(spec, limit_bytes, timeout_s=60)
    assert killed.run is None
    assert killed.oom_kills >= 1
    assert "needs more than 48.0 MiB" in killed.error


def test_hf_gets_less_memory_until_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, limited, systems = bench("rounds"), bench("limited"), bench("systems")
    given: list[int] = []

    def run_child(spec: Any, limit_bytes: int | None, **options: Any) -> Any:
        given.append(spec.hf_memory_bytes)
        assert Path(spec.offload_folder).is_dir()
        if spec.hf_memory_bytes > 30 << 20:
            return limited.Outcome("hf", error="killed", oom_kills=1)
        return limited.Outcome("hf", run=systems.Run(tokens=[1, 2]))

    monkeypatch.setattr(rounds, "run_child", run_child)
    one = rounds.Bench([], 1, 1 << 30, 1.0, 0.1)
    spec = systems.Spec("hf", "folder", [1], 2, hf_memory_bytes=100 << 20)
    assert one.run(spec).oom_kills == 2
    assert one.run(spec).oom_kills == 0
    assert given == [100 << 20, 50 << 20, 25 << 20, 25 << 20]


def test_a_terminated_benchmark_leaves_nothing(tiny: Path) -> None:
    skip_unless_limits_work(1 << 30)
    pytest.importorskip("moert.api")
    command = [sys.executable, str(BENCH / "offload.py"), str(tiny), "--systems", "moert", "--memory-limit", "1GiB"]
    driver = subprocess.Popen([*command, "--disk-seconds", "0.1"], stdout=subprocess.DEVNULL)

    def group_processes() -> list[list[str]]:
        parents = [folder for _, folder in bench("cgroup").memory_folders()]
        groups = [group for parent in parents for group in parent.glob(f"moert-bench-{driver.pid}-*")]
        return [(group / "cgroup.procs").read_text().split() for group in groups]

    deadline = time.monotonic() + 60
    while not any(group_processes()) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    (children,) = group_processes()
    driver.terminate()
    assert driver.wait(timeout=30) == 128 + signal.SIGTERM
    assert group_processes() == []
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_run_that_hangs_or_fails_says_so(tiny: Path) -> None:
    systems, limited = bench("systems"), bench("limited")
    spec = systems.Spec("hf", str(tiny), [1], 2, hf_folder=str(tiny / "absent"))
    assert "not done after 0 s" in limited.run_child(spec, None, timeout_s=0.2).error
    failed = limited.run_child(spec, None, timeout_s=60)
    assert failed.run is None
    assert failed.error.startswith("exit 1: ")


def test_dropped_files_are_read_from_the_disk_again(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 << 20))
    imports = f"import diskspeed, pathlib; from systems import disk_read_bytes as n; p = pathlib.Path({str(path)!r}); "

    def read_bytes(read: str) -> int:
        command = [sys.executable, "-c", f"{imports}a = n(); {read}; print(n() - a)"]
        return int(subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=True).stdout)

    drop_page_cache = bench("diskspeed").drop_page_cache
    drop_page_cache([path])
    if read_bytes("diskspeed.measure([p], 4096, seconds=0.01)") == 0:
        pytest.skip("the kernel does not count this file system's reads")
    path.read_bytes()
    assert read_bytes("p.read_bytes()") == 0
    drop_page_cache([path])
    assert read_bytes("p.read_bytes()") >= 4 << 20


@pytest.mark.parametrize("is_direct", [True, False])
def test_the_disk_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_direct: bool) -> None:
    diskspeed = bench("diskspeed")
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    if is_direct and not diskspeed._can_read_directly(path):
        pytest.skip("no O_DIRECT here")
    if not is_direct:
        monkeypatch.setattr(diskspeed, "_can_read_directly", lambda path: False)
    speed = diskspeed.measure([path], 100_000, depth=2, seconds=0.2)
    assert speed.bytes_per_s > 1e6
    assert speed.direct == is_direct
    with pytest.raises(ValueError, match="no file"):
        diskspeed.measure([path], 2 << 20, seconds=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "vllm"], "choose from"),
        (["--systems", "llama.cpp"], "needs --gguf"),
        (["--memory-limit", "25%", "--systems", "hf"], "must be a size"),
        (["--systems", "hf"], "no config.json"),
    ],
)
def test_bad_options_say_why(tiny: Path, tmp_path: Path, options: list[str], message: str) -> None:
    folder = tmp_path if message == "no config.json" else tiny
    command = [sys.executable, str(BENCH / "offload.py"), str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
