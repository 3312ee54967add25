"""The prefill benchmark: bytes counted once, limits beside the time, and no time without the right logits."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module as bench
from pathlib import Path

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("bench_on_path")

BENCH = Path(__file__).parents[1] / "bench"
NARROW = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERT_BYTES = 3 * 64 * 32 * 2


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = bench("architectures").configuration(
        "olmoe-bench", layers=2, experts=16, hidden=64, expert_width=32, overrides=NARROW
    )
    bench("make_checkpoint").write_checkpoint(config, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("chunk", [None, 20])
def test_a_whole_benchmark(tiny: Path, tmp_path: Path, chunk: int | None) -> None:
    command = [sys.executable, str(BENCH / "prefill.py"), str(tiny), "--host-memory", "50%", "--rounds", "2"]
    command += ["--prompt-tokens", "60", "--disk-seconds", "0.1", "--json", str(tmp_path / "out.json")]
    command += [] if chunk is None else ["--chunk", str(chunk)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["parity"] is True
    assert report["machine"]["torch_threads"], "whatever the environment says, or as under moert's command line"
    assert len(report["passes"]) == len(report["computing"]) == len(report["disk_bytes_per_s"]) == 2
    summary = report["summary"]
    # 60 tokens that pick 8 of 16 experts miss none of them.
    assert summary["bytes_needed"] == 2 * 16 * EXPERT_BYTES
    for one in report["passes"]:
        # At least the half that has no slot, and each forward at most what it needs; a record is read in whole blocks.
        assert one["bytes_read"] >= 2 * 8 * EXPERT_BYTES
        assert one["misses"] <= 2 * 16 * (1 if chunk is None else 3)
        assert one["hits"] + one["misses"] >= 2 * 16
    assert all(one["bytes_read"] == one["misses"] == 0 for one in report["computing"])
    assert summary["seconds"] > 0
    assert summary["over_the_slower_limit"] > 0
    assert "over the slower of the two" in result.stdout


def test_a_checkpoint_that_is_none_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "prefill.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "error:" in result.stderr
