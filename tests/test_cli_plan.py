"""`moert plan` and `moert simulate --machine`: the numbers add up, and bad input is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_support import Cli, checkpoint
from report_support import trace, write

from moert.planning.machine import load_machine
from moert.schedule import Promotion
from moert.simulate.timed import simulate_time

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

CARD = "12gb-pcie4"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "100")
    return Cli(capfd)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe"))


def plan_of(cli: Cli, *arguments: object) -> dict[str, Any]:
    ran = cli("plan", *arguments, "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = ran.document
    return found


def test_a_plan_adds_up(cli: Cli, folder: str) -> None:
    for machine in (CARD, "2-core-xeon-disk"):
        plan = plan_of(cli, folder, "--machine", machine, "--context", 100, "--batch", 3)
        for tier in (plan["host"], plan["device"]):
            if tier is not None:
                parts = ("dense_bytes", "cache_bytes", "workspace_bytes", "staging_bytes", "expert_bytes")
                assert tier["used_bytes"] == sum(tier[part] for part in parts) <= tier["available_bytes"]
        assert (plan["device"] is None) == (machine != CARD)
        assert plan["cache_known"]
        assert plan["decode"]["tokens_per_s"] == pytest.approx(3 / plan["decode"]["seconds"])
        assert plan["decode_without_locality"]["tokens_per_s"] <= plan["decode"]["tokens_per_s"]
        assert plan["command"].startswith(f"moert run {folder} PROMPT --host-memory 100%")


def test_a_smaller_budget_is_slower_and_more_would_help(cli: Cli, folder: str) -> None:
    small = plan_of(cli, folder, "--machine", "2-core-xeon-disk", "--host-memory", "25%")
    large = plan_of(cli, folder, "--machine", "2-core-xeon-disk", "--host-memory", "75%")
    assert small["decode"]["tokens_per_s"] < large["decode"]["tokens_per_s"]
    assert small["host"]["expert_bytes"] == small["experts_bytes"] // 4
    assert small["reads_from_disk"]
    assert small["one_more_gib"]["host"] > 0
    assert small["context"] == 512, "what the model takes"


def test_the_plan_of_this_machine_can_be_run(cli: Cli, folder: str) -> None:
    plan = plan_of(cli, folder, "--host-memory", "50%")
    assert plan["machine"] == "this"
    size = plan["host"]["expert_bytes"]
    ran = cli("run", folder, "one two", "--host-memory", size, "--max-new-tokens", 2, "--json")
    assert ran.code == 0, ran.err


def test_it_is_for_people(cli: Cli, folder: str) -> None:
    ran = cli("plan", folder, "--machine", CARD)
    assert ran.code == 0, ran.err
    for word in ("KV cache, 1 x 512 tokens", "held up by", "1 GiB more", "--device-memory", "forecasts"):
        assert word in ran.out


def test_routing_of_a_trace(cli: Cli, folder: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", trace(layers=2, experts=8))
    plan = plan_of(cli, folder, "--machine", "2-core-xeon-disk", "--host-memory", "25%", "--trace", path)
    assert plan["expected_routing"] == str(path)
    assert 0 < plan["decode"]["hit_rate"] < 1


@pytest.mark.parametrize(
    ("layers", "experts", "message"),
    [(24, 8, "24 layers of experts, and Olmoe has 2"), (2, 9, "9 experts in model.layers.0.mlp.experts, and Olmoe")],
)
def test_the_trace_of_another_model_is_refused(
    cli: Cli, folder: str, tmp_path: Path, layers: int, experts: int, message: str
) -> None:
    path = write(tmp_path / "t.safetensors", trace(num_sequences=1, layers=layers, experts=experts))
    error = cli("plan", folder, "--machine", CARD, "--trace", path).error
    assert str(path) in error
    assert message in error.replace("OlmoeForCausalLM", "Olmoe")
    assert layers == 24 or "has 8 in model.layers.0.mlp" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "nobody"], "no machine named 'nobody'"),
        (["--machine", CARD, "--context", "100000"], "context=100000 is more than"),
        (["--machine", CARD, "--host-memory", "1KiB"], "host_memory is 1.0 KiB"),
        (["--machine", CARD, "--host-memory", "lots"], "host_memory='lots'"),
        (["--machine", "2-core-xeon-disk", "--device-memory", "1GiB"], "has no device"),
        (["--machine", CARD, "--context", "0"], "--context"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, folder: str, arguments: list[str], message: str) -> None:
    ran = cli("plan", folder, *arguments)
    assert ran.code == 2
    assert message in ran.error


def test_models_that_are_not_here(cli: Cli) -> None:
    assert (
        "no folder, and no model of the hub that is on this machine yet"
        in cli("plan", "nobody/nothing", "--machine", CARD).error
    )


def test_times_are_those_of_the_timed_replay(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", trace(num_sequences=3))
    ran = cli("simulate", path, "--policy", "lru,ema", "--capacity", "25%", "--machine", CARD, "--tokens", 60, "--json")
    assert ran.code == 0, ran.err
    machine = load_machine(CARD)
    for row in ran.document["results"]:
        if row["aside"]:
            assert "ms_per_token" not in row
            continue
        assert row["timed_tokens"] == 60
        assert row["bound_ms_per_token"] <= row["own_bound_ms_per_token"] <= row["ms_per_token"]
        assert row["share_of_bound"] == pytest.approx(row["bound_ms_per_token"] / row["ms_per_token"])
    whole = cli("simulate", path, "--policy", "ema", "--machine", CARD, "--capacity", "25%", "--tokens", 999, "--json")
    (row,) = (row for row in whole.document["results"] if row["policy"] == "ema")
    same = simulate_time(
        path, "ema", "25%", machine.costs(1 << 20), layer_s=machine.layer_start_s, promotion=Promotion()
    )
    assert row["ms_per_token"] == pytest.approx(1e3 * same.seconds_per_token)
    assert row["timed_hit_rate"] == same.hit_rate


def test_times_in_the_table(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", trace(num_sequences=2))
    ran = cli("simulate", path, "--policy", "lru", "--capacity", "25%", "--machine", "2-core-xeon-disk")
    assert "ms a" in ran.out
    assert "others on disk" in ran.out
    assert "ms a" not in cli("simulate", path, "--policy", "lru", "--capacity", "25%").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "nobody"], "no machine named"),
        (["--machine", CARD, "--scope", "global"], "leave --scope layer"),
        (["--machine", CARD, "--reset", "sequence"], "leave --scope layer"),
        (["--machine", CARD, "--scheduler", "best"], "no scheduler named"),
        (["--machine", CARD, "--dense-bytes", "10%"], "--dense-bytes"),
        (["--machine", CARD, "--tokens", "0"], "--tokens"),
    ],
)
def test_bad_machines_are_one_line(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    ran = cli("simulate", write(tmp_path / "t.safetensors"), "--policy", "lru", *arguments)
    assert ran.code == 2
    assert message in ran.error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "60"], "--tokens without --machine"),
        (["--tokens", "500"], "--tokens without --machine"),
        (["--scheduler", "exact"], "--scheduler without --machine"),
        (["--dense-bytes", "1GiB"], "--dense-bytes without --machine"),
        (["--no-promote"], "--no-promote without --machine"),
        (["--promote"], "--promote without --machine"),
        (["--scheduler", "dali", "--tokens", "60"], "--scheduler, --tokens without --machine"),
    ],
)
def test_what_is_timed_needs_a_machine(cli: Cli, tmp_path: Path, arguments: list[str], named: str) -> None:
    error = cli("simulate", write(tmp_path / "t.safetensors"), "--policy", "lru", *arguments).error
    assert error.startswith(named)
    assert "give --machine" in error


def test_unknown_sizes_have_no_time(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", trace(num_sequences=1, expert_bytes=0))
    assert "--expert-bytes" in cli("simulate", path, "--policy", "lru", "--machine", CARD).error


def test_a_plan_says_what_reads_ahead_of_time_can_bring(cli: Cli, folder: str, tmp_path: Path) -> None:
    disk = ("--machine", "2-core-xeon-disk", "--host-memory", "50%")
    plan = plan_of(cli, folder, *disk)
    ahead, decode = plan["reads_ahead"], plan["decode"]
    assert (ahead["counted"], ahead["predictor"], ahead["simulated"]) == (False, "gate_ahead_corrected", None)
    busy = decode["busy_s"]
    least_s = max(busy["disk"], sum(busy.values()) - busy["disk"])
    assert ahead["at_most_tokens_per_s"] == pytest.approx(1 / least_s)
    assert ahead["at_most_tokens_per_s"] >= decode["tokens_per_s"]
    assert ahead["at_most_gain"] == pytest.approx(decode["seconds"] / least_s - 1)
    shown = " ".join(cli("plan", folder, *disk).out.split())
    assert "not counted; at most" in shown
    assert "“Decode” counts no reads ahead of time. The runtime makes them (gate_ahead_corrected)" in shown
    for machine in (("--machine", CARD), ("--machine", "2-core-xeon-disk", "--host-memory", "100%")):
        assert plan_of(cli, folder, *machine)["reads_ahead"] is None, "nothing is read while it decodes"
        assert "reads ahead" not in cli("plan", folder, *machine).out

    path = write(tmp_path / "t.safetensors", trace(layers=2, experts=8))
    told = plan_of(cli, folder, *disk, "--trace", path)["reads_ahead"]["simulated"]
    assert told["predictor"] == "joint", "a trace has no hidden states"
    assert told["gain"] == pytest.approx(told["unpredicted_ms_per_token"] / told["ms_per_token"] - 1)
    assert told["predict_ms_per_token"] > 0
    known = plan_of(cli, folder, *disk, "--trace", path, "--predictor", "oracle")["reads_ahead"]["simulated"]
    assert known["unpredicted_ms_per_token"] == pytest.approx(told["unpredicted_ms_per_token"])
    assert plan_of(cli, folder, *disk, "--trace", path, "--predictor", "none")["reads_ahead"]["simulated"] is None
    assert plan_of(cli, folder, *disk, "--trace", path, "--batch", 2)["reads_ahead"]["simulated"] is None
    assert "as joint predicts; at most" in " ".join(cli("plan", folder, *disk, "--trace", path).out.split())
    for wrong, message in (
        (("--predictor", "joint"), "without --trace"),
        (("--trace", path, "--predictor", "nobody"), "nobody"),
        (("--trace", path, "--predictor", "gate_ahead"), "needs"),
    ):
        ran = cli("plan", folder, *disk, *wrong)
        assert (ran.code, len(ran.err.strip().splitlines())) == (2, 1)
        assert message in ran.err
