"""`moert simulate`: the rows are those of the simulator, and bad input leaves nothing behind."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_support
import numpy as np
import pytest
from cli_support import Cli, checkpoint, rows_of
from report_support import EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, routing, trace, write

from moert.cli.traces import names_of
from moert.errors import ConfigError
from moert.policies import policy_names
from moert.simulate import simulate

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

PAGE = Path(__file__).parent.parent / "docs" / "simulate.md"

KEYS = {
    "trace",
    "policy",
    "scope",
    "capacity_experts",
    "capacity_bytes",
    "accesses",
    "hits",
    "hit_rate",
    "misses_per_token",
    "bytes_moved",
    "hit_rate_low",
    "hit_rate_high",
    "min_misses",
    "gap_misses",
    "gap_closed",
    "bound",
}


cli, path = cli_support.cli, cli_support.path


def test_rows_are_those_of_the_simulator(cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "simulate", path, "--policy", "lru,ema,alpha=0.05", "--capacity", "25%,8", "--budget", "30MiB")
    assert all(row.keys() >= KEYS for row in rows)
    assert {row["trace"] for row in rows} == {"tiny.safetensors"}
    for row in rows:
        capacity = row["capacity"]
        if row["aside"] and capacity == "8":
            capacity = 8 * LAYERS
        same = simulate(path, row["policy"], capacity, scope=row["scope"])
        assert (row["hits"], row["accesses"], row["misses"]) == (same.hits, same.accesses, same.misses)
        assert row["bytes_moved"] == row["misses"] * EXPERT_BYTES
        assert row["hit_rate_low"] <= row["hit_rate"] <= row["hit_rate_high"]
    named = {(row["capacity"], row["policy"], row["scope"]) for row in rows}
    assert named == {
        (capacity, policy, scope)
        for capacity in ("25%", "8", "30MiB")
        for policy, scope in (("lru", "layer"), ("lru", "global"), ("ema,alpha=0.05", "layer"), ("belady", "layer"))
    }
    assert all(row["capacity_experts"] == 4 * LAYERS for row in rows if row["capacity"] == "25%")
    assert all(row["capacity_experts"] <= 30 for row in rows if row["capacity"] == "30MiB")


def test_min_stands_beside_and_nothing_passes_it(cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "simulate", path, "--policy", ",".join(name for name in policy_names() if name != "min_bypass"))
    by_size: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_size.setdefault(row["capacity"], []).append(row)
    assert list(by_size) == ["12.5%", "25%", "50%"]
    for same in by_size.values():
        bound = same[0]
        assert (bound["policy"], bound["bound"]) == ("belady", True)
        for row in same[1:]:
            assert not row["bound"]
            if row["scope"] == "layer":
                assert row["misses"] >= bound["misses"]
                assert row["gap_misses"] == row["misses"] - row["min_misses"]
                assert row["min_misses"] <= bound["misses"]
                if row["policy"] == "lru" and row["gap_closed"] is not None:
                    assert row["gap_closed"] == 0
        others = [row["hit_rate"] for row in same[1:]]
        assert others == sorted(others, reverse=True)


def test_min_is_the_bound_where_every_step_fits_and_counts(cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "simulate", path, "--policy", "lru", "--capacity", "100%,15", "--count", "all")
    for row in rows:
        if row["policy"] == "belady":
            assert row["misses"] == row["min_misses"]
    ran = cli("simulate", path, "--policy", "lru", "--capacity", "15", "--count", "all")
    (most,) = {1 - row["min_misses"] / row["accesses"] for row in rows if row["bound"] and row["capacity"] == "15"}
    assert f"15  45 slots, 45.0 MiB, at most {100 * most:.1f} %" in ran.out


def test_bypass_has_the_bound_that_goes_with_it(cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "simulate", path, "--policy", "ema", "--capacity", "25%", "--bypass")
    assert [row["policy"] for row in rows] == ["min_bypass", "ema"]
    assert rows[0]["misses"] <= rows[1]["misses"]


def test_options_reach_the_simulator(cli: Cli, path: Path) -> None:
    options = ("--scope", "global", "--reset", "sequence", "--count", "all", "--batch", "2", "--expert-bytes", "3MiB")
    rows = rows_of(cli, "simulate", path, "--policy", "lfu", "--capacity", "12", *options, "--jobs", "2")
    assert [(row["policy"], row["scope"]) for row in rows] == [("belady", "global"), ("lfu", "global")]
    same = simulate(path, "lfu", 12, scope="global", reset="sequence", count="all", batch=2, expert_bytes=3 << 20)
    assert (rows[1]["hits"], rows[1]["bytes_moved"]) == (same.hits, same.bytes_moved)
    assert (rows[1]["reset"], rows[1]["count"], rows[1]["batch"]) == ("sequence", "all", 2)


def test_files_of_other_programs_are_imported_on_the_way(cli: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", experts_000=routing(1, 40).astype(np.uint8))
    rows = rows_of(
        cli, "simulate", tmp_path / "other.npz", "--experts", EXPERTS, "--policy", "lru", "--capacity", "25%"
    )
    assert {row["capacity_experts"] for row in rows} == {4 * LAYERS}
    assert {row["accesses"] for row in rows} == {40 * LAYERS * TOP_K}
    assert all(row["bytes_moved"] is None and row["hit_rate_low"] is None for row in rows)
    assert "--experts" in cli("simulate", tmp_path / "other.npz").error
    assert list(tmp_path.iterdir()) == [tmp_path / "other.npz"]


def test_traces_of_the_same_name_are_told_apart(cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / part / "t.safetensors" for part in "ab"]
    for path in paths:
        path.parent.mkdir()
        write(path, trace(num_sequences=2))
    rows = rows_of(cli, "simulate", *paths, "--policy", "fifo", "--capacity", "4")
    assert list(dict.fromkeys(row["trace"] for row in rows)) == ["a/t.safetensors", "b/t.safetensors"]
    assert names_of([Path("x/t"), Path("x/t")]) == ["x/t (1)", "x/t (2)"]


def test_the_table_is_for_people(cli: Cli, path: Path) -> None:
    ran = cli("simulate", path, "--policy", "lru", "--capacity", "1,4")
    assert ran.code == 0
    lines = [line.split("  ")[0] for line in ran.out.splitlines()]
    assert lines.count("MIN (belady)") == lines.count("lru, one cache for all") == 2
    assert "1 some steps need more experts than the cache holds" in ran.out
    assert "nan" not in ran.out
    assert "tiny.safetensors" in ran.out


@pytest.fixture
def lru_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The policy that the documentation shows, in a file of its own."""
    (source,) = (part.partition("```")[0] for part in PAGE.read_text().split("```python\n") if "class LruK" in part)
    (tmp_path / "lru_k.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield "lru_k:LruK"
    sys.modules.pop("lru_k", None)


def test_a_policy_in_one_file_of_ones_own(lru_k: str, cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "simulate", path, "--policy", f"{lru_k},{lru_k},k=1,lru", "--capacity", "25%,50%")
    assert {row["policy"] for row in rows} == {lru_k, f"{lru_k},k=1", "lru", "belady"}
    hits = {(row["policy"], row["capacity"]): row["hits"] for row in rows if not row["aside"]}
    for capacity in ("25%", "50%"):
        # With one last use it is LRU, but for the order of those that were last used in the same step.
        assert hits[f"{lru_k},k=1", capacity] == pytest.approx(hits["lru", capacity], rel=0.01)
        assert hits[lru_k, capacity] != hits["lru", capacity]


def test_that_policy_runs_live(lru_k: str, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe")
    ran = cli("run", folder, "one two three", "--policy", f"{lru_k},k=3", "--host-memory", "50%", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["policy"] == f"{lru_k},k=3"
    assert ran.document["hits"] and ran.document["misses"]


def test_the_documentation_names_options_that_there_are(cli: Cli) -> None:
    known = "".join(cli(*words, "--help").out for words in (["simulate"], ["suit"], ["run"], ["trace", "record"]))
    for option in set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text())) - {"--help"}:
        assert option in known, option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "clock"], "no policy named 'clock'"),
        (["--policy", "ema,beta=1"], "'beta=1' is no parameter"),
        (["--policy", "ema,alpha=7"], "alpha=7"),
        (["--policy", ""], "is no policy"),
        (["--policy", "nowhere:Mine"], "set PYTHONPATH"),
        (["--policy", "./mine.py:Mine"], "my_file:Class"),
        (["--capacity", "0"], "at least 1 expert"),
        (["--capacity", "-3"], "at least 1 expert"),
        (["--capacity", "0%"], "above 0%"),
        (["--capacity", "101%"], "at most 100%"),
        (["--capacity", "1%"], "less than one of the 16 experts"),
        (["--capacity", "much"], "is not a size"),
        (["--capacity", "2.5"], "a number of experts"),
        (["--capacity", "1e9"], "a number of experts"),
        (["--capacity", ""], "is not a size"),
        (["--capacity", "25%,,50%"], "is not a size"),
        (["--budget", "0"], "--budget"),
        (["--budget", "-4GiB"], "--budget"),
        (["--budget", "1MiB"], "1.0 MiB"),
        (["--budget", "1"], "a cache size of 1 B (1 bytes) for 3 layers"),
        (["--budget", "1"], "less than one expert in each of them; give at least 3.0 MiB (3145728 bytes)"),
        (["--budget", "1", "--scope", "global"], "give at least 1.0 MiB (1048576 bytes)"),
        (["--budget", "25%"], "number of bytes"),
        (["--scope", "all"], "--scope='all' must be one of layer, global"),
        (["--reset", "no"], "--reset='no' must be one of never, sequence"),
        (["--count", "x"], "--count='x' must be one of decode, all"),
        (["--batch", "0"], "--batch"),
        (["--jobs", "0"], "--jobs"),
        (["--expert-bytes", "10%"], "--expert-bytes"),
        (["--plot", "out.jpg"], "must end in .png"),
        (["--html", "out.pdf"], "must end in .html"),
        (["--html", "no/such/folder/out.html"], "cannot write there"),
        (["--plot", "/proc/out.png"], "cannot write there"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, cli: Cli, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in cli("simulate", path, *arguments).error
    assert list(tmp_path.iterdir()) == [path]


def test_there_are_no_more_processes_than_cores(cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(*_: object, n_jobs: int, **_options: object) -> Any:
        asked.append(n_jobs)
        raise ConfigError("enough")

    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("moert.simulate.sweep", note)
    assert "enough" in cli("simulate", path, "--policy", "lru", "--jobs", "1000000").error
    assert asked == [3]


def test_a_huge_budget_holds_everything(cli: Cli, path: Path) -> None:
    rows = rows_of(cli, "simulate", path, "--policy", "lru", "--budget", "900TiB", "--capacity", "1000000000000")
    assert {row["capacity_experts"] for row in rows} == {LAYERS * EXPERTS}
    assert all(row["misses"] <= row["compulsory_misses"] for row in rows)


def test_bad_traces(cli: Cli, path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "words.txt").write_text("no trace at all\n")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with (tmp_path / "half.csv").open("w") as file:
        csv.writer(file).writerow(["step", "layer"])
    for name in ("absent", "empty", "words.txt", "cut.safetensors", "half.csv"):
        before = sorted(tmp_path.iterdir())
        assert name in cli("simulate", path, tmp_path / name, "--html", tmp_path / "out.html").error
        assert sorted(tmp_path.iterdir()) == before
    nothing = trace()
    nothing.sequences.clear()
    assert "no sequences" in cli("simulate", write(tmp_path / "none.safetensors", nothing)).error


def test_a_trace_of_prompts_only_has_nothing_that_counts(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.safetensors", trace(num_tokens=8, prompt=8))
    assert "prompts.safetensors: nothing counts" in cli("simulate", path).error
    assert rows_of(cli, "simulate", path, "--count", "all", "--policy", "lru", "--capacity", "50%")


def test_no_trace_at_all(cli: Cli) -> None:
    assert "TRACE" in cli("simulate").error


def test_outputs_are_whole_files(cli: Cli, path: Path, tmp_path: Path) -> None:
    html, png = tmp_path / "out.html", tmp_path / "out.png"
    html.write_text("what was there before")
    ran = cli("simulate", path, "--policy", "lru", "--capacity", "25%", "--html", html, "--plot", png)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-2:] == [f"wrote {png}", f"wrote {html}"]
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert html.read_text().endswith("</html>\n")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == sorted([path, html, png])


def test_a_full_disk_leaves_what_was_there(
    cli: Cli, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = tmp_path / "out.html"
    html.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert "out.html" in cli("simulate", path, "--policy", "lru", "--capacity", "25%", "--html", html).error
    assert html.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == sorted([path, html])


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_a_narrow_terminal_loses_no_column(cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ran = cli("simulate", path, "--capacity", "25%", "--policy", "lru", "--machine", "24gb-pcie4")
    assert re.search(r" ms a +of the *\n.* token +bound *\n", ran.out)
    (row,) = re.findall(r"^lru  .*$", ran.out, re.MULTILINE)
    assert re.search(r" \d+\.\d +\d+\.\d %$", row.strip())
