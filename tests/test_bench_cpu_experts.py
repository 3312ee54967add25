"""The benchmarks of experts on the CPU: what they write, and that nothing wrong is ever given a time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module as bench
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("bench_on_path")

BENCH = Path(__file__).parents[1] / "bench"
SYSTEMS = ("moert", "torch", "transformers", "kt-kernel", "llama.cpp")
ROW_KEYS = {"median_ms", "min_ms", "p90_ms", "bytes_per_s", "share_of_read_limit", "operations_per_s", "times_ours"}
SMALL = ("--shapes", "tiny", "--rounds", "1", "--working-set", "2MB", "--threads", "2")
TIMES = ("median_ms", "samples", "seconds", "limits", "rows")


@pytest.fixture
def threads_restored() -> Iterator[None]:
    from moert.kernels import cpu

    before = torch.get_num_threads(), cpu.threads()
    yield
    torch.set_num_threads(before[0])
    cpu.set_threads(before[1])


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "cpu_experts.py"), *SMALL, *options]
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env={**unset, **environment})


def test_a_whole_benchmark(tmp_path: Path) -> None:
    out, drawn = tmp_path / "out.json", tmp_path / "out.png"
    done = run("--batches", "1,3", "--json", str(out), "--plot", str(drawn), OMP_DISPLAY_ENV="VERBOSE")
    assert done.returncode == 0, done.stdout + done.stderr
    assert drawn.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert report["parity"] == "green"
    assert report["threads"] == 2
    assert "cpu_experts.py" in report["command"]
    assert {"cpu", "torch", "transformers", "instruction_sets"} <= report["machine"].keys()
    assert report["machine"]["torch_threads"] == {"GOMP_SPINCOUNT": "10000"}
    assert "for everybody: GOMP_SPINCOUNT=10000" in done.stdout
    in_force = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[-1:]
    assert in_force in (["10000"], []), "that is what torch's threads have read, if their library is GNU's"
    assert [(cell["format"], cell["batch"]) for cell in report["cells"]] == [
        (form, batch) for form in ("bf16", "int8", "int4") for batch in (1, 3)
    ]
    for package, system in (("kt_kernel", "kt-kernel"), ("llama_cpp", "llama.cpp")):
        assert (system in report["absent"]) == (importlib.util.find_spec(package) is None)
        assert (f"{system} did not run" in done.stdout) == (system in report["absent"])
    for cell in report["cells"]:
        names = {row["system"] for row in cell["rows"]}
        assert names == cell["samples"].keys() == {name for name, x in cell["contenders"].items() if not x["refused"]}
        for system in SYSTEMS:
            takes_part = system not in report["absent"] and (system != "transformers" or cell["format"] == "bf16")
            assert any(name.startswith(system) for name in cell["contenders"]) == takes_part
        for row in cell["rows"]:
            assert row.keys() >= ROW_KEYS
            assert row["median_ms"] > 0
            assert len(cell["samples"][row["system"]]) == 1
        ours = cell["contenders"]["moert"]
        assert 0 <= ours["gate"] <= ours["allowed"]
        assert 0 < ours["error"] < {"bf16": 0.01, "int8": 0.03, "int4": 0.25}[cell["format"]]
        assert all(rate > 0 for rates in cell["limits"].values() for rate in rates)
        bytes_of_number = {"bf16": 2, "int8": 1.0625, "int4": 0.5625}[cell["format"]]
        (row,) = (row for row in cell["rows"] if row["system"] == "moert")
        if cell["batch"] == 1:
            assert row["touched_bytes"] == 2 * 3 * 256 * 128 * bytes_of_number


def any_time(content: Any) -> bool:
    if isinstance(content, dict):
        return any(key in TIMES or any_time(value) for key, value in content.items())
    return isinstance(content, list) and any(any_time(value) for value in content)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_wrong_output_gets_no_time(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, script = bench("cpu_ours"), bench("cpu_experts")
    right = ours.Moert.prepare

    def wrong(self: Any, step: Any, copy: int) -> Any:
        job = right(self, step, copy)

        def spoilt() -> torch.Tensor:
            output = job().clone()
            output[-1, 7] += 0.5 * output[-1].abs().max()
            return output

        # One number of one token, in one of two cells.
        return spoilt if step.x.shape[0] == 5 else job

    monkeypatch.setattr(ours.Moert, "prepare", wrong)
    options = {"shapes": "tiny", "systems": "moert,torch", "formats": form, "batches": "3,5", "rounds": 1}
    options |= {"working_set": "1MB", "threads": 2, "json_path": tmp_path / "out.json"}
    options["plot_path"] = tmp_path / "out.png"
    defaults = {"isas": "", "kt_workers": None, "mask_isa": None, "neighbour": False, "seed": 0}
    with pytest.raises(script.typer.Exit) as stopped:
        script.main(**defaults, **options)
    assert stopped.value.exit_code == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["parity"] == "red"
    assert [cell["parity"] for cell in report["cells"]] == ["green", "red"]
    assert not any_time(report["cells"])
    assert not (tmp_path / "out.png").exists()
    printed = capsys.readouterr().out
    assert f"parity is red: tiny {form} 5; no time is given" in printed
    assert "GB/s" not in printed


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    contest, layers, torch_peers = bench("cpu_contest"), bench("cpu_layers"), bench("cpu_peers_torch")
    shape = layers.SHAPES["tiny"]
    _, held = layers.make_layers(shape, 1)
    (step,) = layers.make_steps(shape, 3)
    exact = [contest._exact(held[0], step)]
    peer = torch_peers.TorchLinear(shape, held)
    assert contest._judge(peer, [peer.prepare(step, 0)], exact, None, "bf16")["refused"] == ""
    for spoilt in (exact[0] * 1.1, exact[0] * float("nan")):
        assert "so not timed" in contest._judge(peer, [lambda spoilt=spoilt: spoilt], exact, None, "bf16")["refused"]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_numbers_stand_for_the_weights(form: str) -> None:
    layers = bench("cpu_layers")
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[0, :32] = 0
    stored = layers.quantise(weight, form)
    steps = 127 if form == "int8" else 8
    step = weight.double().unflatten(-1, (-1, 32)).abs().amax(-1) / steps
    error = (layers.dequantise(stored, form) - weight.double()).unflatten(-1, (-1, 32)).abs()
    # Half a step, but for int4 a whole one at the end opposite to -8, and what fp16 scales lose.
    assert (error <= step[..., None] * (0.51 + steps / 1000 if form == "int8" else 1.01)).all()
    assert layers.rms_error(layers.dequantise(stored, form), weight.double()) < {"int8": 0.006, "int4": 0.1}[form]


def test_one_token_goes_through_all_experts_before_one_comes_again() -> None:
    layers = bench("cpu_layers")
    shape = layers.SHAPES["tiny"]
    steps = layers.make_steps(shape, 1)
    assert sorted(torch.cat([step.ids.flatten() for step in steps]).tolist()) == list(range(shape.experts))
    (batch,) = layers.make_steps(shape, 16)
    assert all(len(set(picks)) == shape.picks for picks in batch.ids.tolist())


def test_contenders_take_turns_on_ever_other_experts() -> None:
    measure = bench("cpu_measure")
    calls: list[tuple[str, int]] = []

    def job(name: str, place: int) -> Any:
        return lambda: calls.append((name, place))

    jobs = {name: [job(name, place) for place in range(9)] for name in ("a", "b")}

    class NoLimits:
        def probes(self) -> dict[str, Any]:
            return {"limit": lambda: 1.0}

    begin = dict.fromkeys(jobs, lambda: None)
    step_bytes = dict.fromkeys(jobs, float(measure.SAMPLE_BYTES) / 3)
    cell = measure.rounds(jobs, begin, step_bytes, NoLimits(), 4, bench("random").Random(0), lambda text: None)
    assert {name: len(taken) for name, taken in cell.samples.items()} == {"a": 4, "b": 4}
    assert cell.limits == {"limit": [1.0] * 4}
    assert len(calls) == 2 * 4 * (1 + 3)
    for start in range(0, len(calls), 8):
        turn = calls[start : start + 8]
        assert [name for name, _ in turn] in (["a"] * 4 + ["b"] * 4, ["b"] * 4 + ["a"] * 4)
        assert len({place for _, place in turn}) == 8


def test_a_neighbour_is_busy_only_when_asked_and_gone_at_the_end() -> None:
    neighbour_module = bench("cpu_neighbour")
    neighbour = neighbour_module.Neighbour(max(neighbour_module.os.sched_getaffinity(0)))
    stat = Path(f"/proc/{neighbour._child.pid}/stat")

    def becomes(state: str) -> bool:
        """A signal that was sent is acted on when its process next has a core."""
        end = time.monotonic() + 20
        while (found := stat.read_text().rpartition(")")[2].split()[0]) != state and time.monotonic() < end:
            time.sleep(0.001)
        return found == state

    assert becomes("T")
    with neighbour.busy():
        assert becomes("R")
    assert becomes("T")
    neighbour.close()
    assert not stat.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "vllm"], "choose from"),
        (["--shapes", "huge"], "choose from"),
        (["--batches", "0"], "whole numbers"),
        (["--working-set", "half"], "half"),
        (["--mask-isa", "mmx"], "choose from"),
    ],
)
@pytest.mark.usefixtures("threads_restored")
def test_bad_options_say_why(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = bench("cpu_experts")
    monkeypatch.setattr(script, "start_with", lambda wanted: None)
    program = script.typer.Typer()
    program.command()(script.main)
    done = CliRunner().invoke(program, [*SMALL, *options])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert message in done.stderr


def test_a_masked_run_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    few = ("--systems", "torch", "--formats", "bf16", "--batches", "3")
    done = run(*few, "--mask-isa", "avx2", "--json", str(out), OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["mask_isa"] == "avx2"
    assert report["machine"]["torch_threads"] == {"OMP_WAIT_POLICY": "passive"}, "the user has decided"


def test_bytes_of_a_token_leave_out_what_it_does_not_read(tmp_path: Path) -> None:
    narrow = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = bench("architectures").configuration(
        "olmoe-bench", layers=2, experts=8, hidden=64, expert_width=32, overrides={**narrow, "num_experts_per_tok": 3}
    )
    total = bench("make_checkpoint").write_checkpoint(config, tmp_path / "tiny")
    unread = 2 * 320 * 64 + 2 * (8 - 3) * 3 * 64 * 32 * 2
    assert bench("cpu_decode").touched_bytes(tmp_path / "tiny") == total - unread


@pytest.mark.slow
def test_decoding_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCH / "cpu_decode.py"), "--layers", "1", "--rounds", "1", "--tokens", "4"]
    command += ["--threads", "2", "--scratch", str(tmp_path), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["parity"]["verdict"] in ("equal", "ties")
    assert {row["system"] for row in report["summary"]} >= {"moert", "transformers eager", "transformers grouped_mm"}
    assert all(row["tokens_per_s"] > 0 and row["share_of_memory_limit"] > 0 for row in report["summary"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
