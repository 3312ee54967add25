"""The offload step of the GPU session: its parts, its synthetic routing, and what it makes of its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from moert.errors import ConfigError
from moert.simulate import simulate
from moert.trace import Trace, TraceWriter
from moert.trace.reuse import Reuse

BENCH = Path(__file__).resolve().parents[1] / "bench"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="triton's interpreter is off: there is a GPU"),
    pytest.mark.usefixtures("bench_on_path"),
]


def decoded(share: int, way: str, **fields: Any) -> dict[str, Any]:
    found = {"kind": "decode", "stored_as": "bf16", "share": share, "way": way, "goal": "offload", "unit": "tokens/s"}
    return {**found, "value": 1 / fields["s_per_token"], "what": f"{share} {way}", **fields}


def printed(steps: dict[str, dict[str, Any]]) -> str:
    import gpu_results

    console = Console(width=200)
    with console.capture() as shown:
        for table in gpu_results.summary(steps, dry=False):
            console.print(table)
    return shown.get()


def test_a_part_that_fails_or_hangs_ends_alone_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import gpu_offload
    import gpu_session
    from gpu_offload import Part

    def sizes(plan: Any, rows: Any, until: float) -> None:
        rows.add("layers", 2.0, "layers", key="layers")
        rows.add("link", 1.0, "GB/s", key="link")

    def good(plan: Any, rows: Any, until: float) -> None:
        rows.add(f"with {plan.layers} layers", 1.0, "x")

    def bad(plan: Any, rows: Any, until: float) -> None:
        rows.add("before it failed", 1.0, "x")
        raise ValueError("no good")

    def late(plan: Any, rows: Any, until: float) -> None:
        rows.add("before it hung", 1.0, "x")
        time.sleep(1000)

    parts = (Part("bad", 60, bad), Part("late", 3, late), Part("good", 60, good), Part("unlikely", 1, good))
    monkeypatch.setattr(gpu_offload, "MARGIN_S", 1.0)
    monkeypatch.setattr(gpu_offload, "FIRST", Part("sizes", 60, sizes))
    monkeypatch.setattr(gpu_offload, "PARTS", parts)
    step = gpu_session.Step("offload", 200, gpu_session._offload)
    end = gpu_session.run_step(step, {}, time.monotonic() + 200, dry=True, tiny=False)
    capfd.readouterr()
    for said in ("bad: ValueError: no good", "late: not within", "unlikely: not begun: no time was left"):
        assert said in end["ended"]
    assert "good:" not in end["ended"].replace("no good", "")
    measured = {row["what"] for row in end["rows"] if row["value"] is not None}
    assert measured == {"layers", "link", "with 2 layers", "before it failed", "before it hung"}
    table = printed({"offload": end})
    assert all(f"part {name} " in table for name in ("bad", "late", "unlikely"))
    assert "part good " not in table
    # And at three budgets G7, G9, hybrid beside two others and beside device_map in two things; and the graph.
    assert table.count("not measured") == 3 + 3 * 6 + 1


LOSES_A_DEVICE = """
import json, sys, time
import gpu_offload, gpu_session, gpu_tiered

gpu_offload.PARTS = [part for part in gpu_offload.PARTS if part.name.startswith("budget")]
prefill = gpu_tiered.Tiered.prefill

def lose(self, way):
    if self._facts["share"] == 25:
        gpu_tiered.tier_of(self.model).device.lose()
    prefill(self, way)

gpu_tiered.Tiered.prefill = lose
step = gpu_session.Step("offload", 200, gpu_session._offload)
end = gpu_session.run_step(step, {}, time.monotonic() + 200, dry=True, tiny=False)
print("END", json.dumps(end))
"""


def test_a_budget_whose_device_is_lost_keeps_what_it_had() -> None:
    # Not a fork of this process, whose threads of torch and moert have been in use.
    child = subprocess.run(
        [sys.executable, "-c", LOSES_A_DEVICE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCH), os.environ.get("PYTHONPATH", "")))},
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    end = json.loads(child.stdout.rpartition("\nEND ")[2])
    assert end["ended"].startswith("RuntimeError: budget 25 %: DeviceLostError: ")
    assert "budget 10" not in end["ended"]
    decodes = {(row["share"], row["way"]) for row in end["rows"] if row.get("kind") == "decode"}
    assert (25, "hybrid") in decodes and (25, "all fetched") not in decodes
    assert {(share, "static split") for share in (10, 50)} <= decodes
    overlaps = [row["value"] for row in end["rows"] if row["goal"] == "G7"]
    assert [value is None for value in overlaps] == [True, False, False]


SEVERAL = """
import json, sys, time
from pathlib import Path
import torch
import gpu_several
from gpu_layers import TINY, Setting
from gpu_offload_parts import Plan, several_gpus
from gpu_results import Rows

torch.set_num_threads(1)
{change}
rows = Rows(Path(sys.argv[1]) / "rows.json")
several_gpus(25)(Plan(Setting(torch.device("cpu"), TINY), Path(sys.argv[1]), layers=2), rows, time.monotonic() + 100)
print("ROWS", json.dumps(rows.rows))
"""


def several(folder: Path, change: str = "") -> list[dict[str, Any]]:
    child = subprocess.run(
        [sys.executable, "-c", SEVERAL.format(change=change), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCH), os.environ.get("PYTHONPATH", "")))},
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(child.stdout.rpartition("\nROWS ")[2])
    return rows


def test_two_gpus_have_their_layers_and_give_the_tokens_of_one(tmp_path: Path) -> None:
    rows = several(tmp_path)
    kinds = {row.get("several") for row in rows}
    by = {kind: [row for row in rows if row.get("several") == kind] for kind in kinds}
    assert {(row["gpus"], row["way"]) for row in by["speed"]} == {
        (n, way) for n in (1, 2) for way in ("all fetched", "hybrid")
    }
    assert [(row["value"], row["wrong"]) for row in by["places"]] == [(2.0, False)]
    assert [(row["value"], row["wrong"]) for row in by["tokens"]] == [(5.0, False)]
    assert all(row["value"] > 0 for row in by["ratio"]) and len(by["ratio"]) == 2


GOES_WRONG = """
places, decode = gpu_several._check_places, gpu_several._decode

def swapped(model, devices, *rest):
    places(model, devices[::-1], *rest)

def other(model, *rest):
    found = decode(model, *rest)
    found.greedy[2] += len(gpu_several.tiers_of(model)) - 1
    return found

gpu_several._check_places, gpu_several._decode = swapped, other
"""


def test_what_is_wrong_on_two_gpus_is_said(tmp_path: Path) -> None:
    wrong = {row["several"]: row["value"] for row in several(tmp_path, GOES_WRONG) if row.get("wrong")}
    assert wrong == {"places": 0.0, "tokens": 2.0}


def test_with_one_gpu_the_part_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_several
    import torch
    from gpu_layers import TINY, Setting
    from gpu_offload_parts import Plan, several_gpus
    from gpu_results import Rows

    monkeypatch.setattr(gpu_several, "count", lambda setting: 1)
    rows = Rows(tmp_path / "rows.json")
    several_gpus(25)(Plan(Setting(torch.device("cpu"), TINY), tmp_path, layers=2), rows, 0.0)
    (row,) = rows.rows
    assert row["value"] is None and row["why"] == "one GPU: left out" and row["goal"] == "offload"


def test_what_was_possible(tmp_path: Path) -> None:
    from gpu_bounds import judge
    from gpu_results import Rows

    rows = Rows(tmp_path / "rows.json")
    rows.extend(
        [
            decoded(100, "all fetched", s_per_token=0.01, missed=0, copied_bytes=0, greedy=[1, 2, 3]),
            decoded(25, "hybrid", s_per_token=0.02, missed=10, copied_bytes=500, greedy=[1, 2, 9]),
            decoded(25, "all fetched", s_per_token=0.04, missed=10, copied_bytes=1000, greedy=[1, 2, 3]),
            decoded(25, "all on the CPU", s_per_token=0.03, missed=20, copied_bytes=0, greedy=[1]),
            decoded(25, "static split", s_per_token=0.036, missed=20, copied_bytes=0, greedy=[1]),
            decoded(10, "hybrid", s_per_token=0.045, missed=30, copied_bytes=3000, greedy=[1, 7, 3]),
            decoded(10, "all fetched", s_per_token=0.04, missed=30, copied_bytes=3000, greedy=[1, 7, 3]),
            {**decoded(25, "device_map", s_per_token=0.5), "kind": "hf decode"},
            {**decoded(100, "all fetched", s_per_token=1), "kind": "prefill", "value": 0.2},
            {**decoded(25, "all fetched", s_per_token=1, copied_bytes=50_000), "kind": "prefill", "value": 0.6},
        ]
    )
    judge(rows, link=1e5, expert_bytes=100)
    found = {row["what"]: row for row in rows.rows[10:]}
    hybrid = found["decode at 25 %, share of the bound, hybrid"]
    # 10 experts of 100 bytes at 1e5 bytes a second, and what all of them take when they are there.
    assert hybrid["value"] == pytest.approx((0.01 + 0.01) / 0.02) and hybrid["met"] and hybrid["goal"] == "G9"
    assert hybrid["share_of_link"] == pytest.approx(0.005 / 0.02)
    assert found["decode at 25 %, share of the bound, all fetched"]["value"] == pytest.approx(0.5)
    goals = {
        "decode at 25 %, hybrid over all on the CPU": (1.5, "≥ 0.97", True),
        "decode at 25 %, hybrid over static split": (1.8, "≥ 1.7", True),
        "decode at 25 %, hybrid over device_map": (25, "≥ 20", True),
        "decode at 10 %, hybrid over all fetched": (0.04 / 0.045, "≥ 0.97", False),
        "prompt at 25 %, time over max(copies, compute)": (1.2, "≤ 1.15", False),
    }
    for what, (value, target, met) in goals.items():
        row = found[what]
        assert (row["value"], row["target"], row["met"]) == (pytest.approx(value), target, met), what
    same = {row["what"]: (row["value"], row["wrong"]) for row in rows.rows if "wrong" in row}
    assert same == {
        "first greedy tokens at 25 % that are those at 100 %, of 3": (3.0, False),
        "first greedy tokens at 10 % that are those at 100 %, of 3": (1.0, True),
    }
    assert {what for what, row in found.items() if row["value"] is None} == {
        "decode at 50 %, share of the bound, hybrid",
        "decode at 50 %, hybrid over the best other way",
        "decode at 50 %, hybrid over static split",
        "decode at 10 %, hybrid over static split",
        *(f"decode at {share} %, hybrid over device_map" for share in (10, 50)),
        *(f"prefill at {share} %, hybrid over device_map" for share in (10, 25, 50)),
        "prompt at 10 %, time over max(copies, compute)",
        "prompt at 50 %, time over max(copies, compute)",
        "decode, graph over eager",
    }


def test_goals_that_no_step_came_to_are_named() -> None:
    nothing = {"ended": "well", "seconds": 1.0, "rows": []}
    table = printed({"peaks": nothing})
    assert "G7" in table and "G9" in table and table.count("not measured") == 2


def test_synthetic_routing_is_like_what_was_published() -> None:
    """gpt-oss-20b and OLMoE: tokens share 42 and 44 % of their picks with the one before, LRU hits 64 and 60 % at a
    quarter, MIN 76 and 72 %."""
    from gpu_routing import synthetic

    trace = synthetic(3, 128, 8, (700, 40))
    assert [len(sequence.steps) for sequence in trace] == [700, 40]
    assert all(len(set(picks)) == 8 for picks in trace[0].experts[:, 0])
    reuse = Reuse(3)
    reuse.add(trace[0])
    assert reuse.mean == pytest.approx(0.41, abs=0.03)
    assert simulate(trace, "lru", "25%").hit_rate == pytest.approx(0.64, abs=0.03)
    assert simulate(trace, "belady", "25%").hit_rate == pytest.approx(0.79, abs=0.04)
    assert (synthetic(3, 128, 8, (50,))[0].experts == synthetic(3, 128, 8, (50,))[0].experts).all()


def saved(folder: Path, trace: Trace) -> Path:
    with TraceWriter(folder / "trace.safetensors", trace.header) as writer:
        for sequence in trace:
            writer.add(sequence)
    return folder / "trace.safetensors"


def test_recorded_routing_is_followed_as_it_is(tmp_path: Path) -> None:
    from gpu_routing import recorded, synthetic

    of = synthetic(3, 16, 4, (30, 20))
    path = saved(tmp_path, of)
    all_of_it = np.concatenate([sequence.experts for sequence in of])
    found = recorded(path, 2, 16, 4, (35, 8))
    assert [len(sequence.steps) for sequence in found] == [35, 8]
    assert found.header.model == "trace.safetensors"
    assert (np.concatenate([sequence.experts for sequence in found]) == all_of_it[:43, :2]).all()
    longer = np.concatenate([sequence.experts for sequence in recorded(path, 5, 16, 4, (60,))])
    assert longer.shape == (60, 5, 4)
    assert (longer[50:, :3] == all_of_it[:10]).all()
    assert (longer[:50, 3:] == all_of_it[:, :2]).all()
    with pytest.raises(ConfigError, match=r"layers that choose 4 of 16 experts; 8 of 128 are needed"):
        recorded(path, 2, 128, 8, (35, 8))


def test_the_offload_step_is_told_of_it(tmp_path: Path) -> None:
    import gpu_offload_parts
    from gpu_layers import TINY, Setting
    from gpu_random_model import shape_of
    from gpu_routing import synthetic

    shape = shape_of(Setting(torch.device("cpu"), TINY))
    of = synthetic(2, shape.experts, shape.top_k, (500,), seed=5)
    setting = Setting(torch.device("cpu"), TINY, saved(tmp_path, of))
    routing = gpu_offload_parts.Plan(setting, tmp_path, 2).routing
    assert (routing[0].experts == of[0].experts[: len(routing[0].steps)]).all()
