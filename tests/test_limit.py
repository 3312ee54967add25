"""The share of the limit: the bound by hand, where the loss goes, and that decoding is told from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calibration_support import measure_quickly
from cli_support import Cli, checkpoint
from hypothesis import given
from hypothesis import strategies as st

from moert.errors import ConfigError
from moert.planning.limit import Ran, limit_of
from moert.runtime.pace import Decoding, Pace
from moert.schedule import Costs, Curve

COSTS = Costs(Curve.constant(1.0), read_s=5.0)


def test_a_run_by_hand() -> None:
    """10 uses, 4 misses of which an optimal cache has 3: the disk takes 20 s or 15, the CPU 10 and 2 besides."""
    ran = Ran(tokens=2, seconds=30.0, hits=6, misses=4, stall_s=14.0, compute_s=11.0)
    found = limit_of(ran, least_misses=3, costs=COSTS, other_s=1.0)
    assert found.tokens_per_s == pytest.approx(2 / 30)
    assert found.bound_tokens_per_s == pytest.approx(2 / 15)
    assert found.own_bound_tokens_per_s == pytest.approx(2 / 20)
    assert found.share == pytest.approx(0.5)
    assert found.lost_to_policy_s == pytest.approx(5 / 2)
    assert found.lost_to_overhead_s == pytest.approx((30 - 14 - 11 - 2) / 2)
    assert found.lost_to_waiting_s == pytest.approx((30 - 20 - 3) / 2)


def test_what_was_read_ahead_of_time_is_read_too() -> None:
    """Of the 4 misses 3 were read ahead and are hits; 2 more were read for nothing: the disk takes 30 s or 15."""
    ran = Ran(tokens=2, seconds=40.0, hits=9, misses=1, stall_s=14.0, compute_s=11.0, reads=6.0)
    found = limit_of(ran, least_misses=3, costs=COSTS, other_s=1.0)
    assert found.bound_tokens_per_s == pytest.approx(2 / 15), "an optimal cache reads 3 of 10 uses, ahead or not"
    assert found.own_bound_tokens_per_s == pytest.approx(2 / 30)
    assert found.lost_to_policy_s == pytest.approx(15 / 2)
    with pytest.raises(ConfigError, match="another run's"):
        limit_of(ran, least_misses=7, costs=COSTS, other_s=1.0)


times = st.floats(0, 100)


@given(st.integers(1, 9), st.floats(0.1, 100), st.integers(1, 50), st.integers(0, 50), times, times, times, st.data())
def test_what_is_lost_adds_up(
    tokens: int, seconds: float, hits: int, misses: int, stall: float, compute: float, other: float, data: st.DataObject
) -> None:
    ran = Ran(tokens, seconds, hits, misses, stall, compute)
    least = data.draw(st.integers(0, misses))
    found = limit_of(ran, least_misses=least, costs=COSTS, other_s=other)
    lost = (found.lost_to_policy_s, found.lost_to_waiting_s, found.lost_to_overhead_s)
    assert min(lost) >= -1e-9
    assert 0 < found.share <= 1
    assert sum(lost) + 1 / found.bound_tokens_per_s == pytest.approx(1 / found.tokens_per_s)


def test_numbers_that_cannot_be() -> None:
    ran = Ran(1, 1.0, 1, 1, 0.0, 0.0)
    with pytest.raises(ConfigError, match="another run's"):
        limit_of(ran, least_misses=2, costs=COSTS, other_s=0.0)
    for wrong in ((0, 1.0, 1, 1, 0.0, 0.0), (1, float("nan"), 1, 1, 0.0, 0.0), (1, 1.0, 1, -1, 0.0, 0.0)):
        with pytest.raises(ConfigError, match="is no run"):
            Ran(*wrong)


def test_decoding_is_told_from_prompts_and_pauses() -> None:
    now = 0.0
    sums = [0, 0, 0.0, 0.0, 0]
    pace = Pace(lambda: tuple(sums), lambda: now)  # type: ignore[arg-type,return-value]

    def step(tokens: int, seconds: float) -> None:
        nonlocal now
        pace.begin(tokens)
        now += seconds
        sums[0] += 3 * tokens
        sums[1] += 1
        sums[2] += seconds / 2
        sums[3] += seconds / 4
        sums[4] += 1000

    step(50, 7.0)
    for _ in range(5):
        step(1, 0.1)
    step(50, 7.0)  # a second text
    for _ in range(3):
        step(1, 0.1)
    now += 60  # the user reads it
    step(1, 0.1)
    found = pace.decoding()
    assert (found.tokens, found.steps) == (4 + 2, 9)
    assert found.seconds == pytest.approx(0.6)
    assert (found.hits, found.misses) == (27, 9)
    assert found.stall_s == pytest.approx(0.45)
    assert found.compute_s == pytest.approx(0.225)
    assert found.bytes_read == 9000
    pace.reset()
    assert pace.decoding() == Decoding()


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure_quickly(monkeypatch)
    return Cli(capfd)


def test_calibrated_planned_and_run(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe"))
    run: list[Any] = ["run", folder, "one two", "--host-memory", "50%", "--max-new-tokens", 6, "--stats"]
    before = cli(*run, "--json").document
    assert before["limit"] is None
    assert "doctor MODEL --calibrate" in before["limit_problem"]
    assert "not yet" in cli("doctor", folder).out

    ran = cli("doctor", folder, "--calibrate", "--json")
    assert ran.code == 0, ran.err
    measured = ran.document["model"]["calibration"]["measured"]
    assert measured["expert"]["1"]["seconds"] > 0
    assert measured["device"] is None
    assert "the device" in cli("doctor", folder).out

    plan = cli("plan", folder, "--host-memory", "50%", "--json").document
    assert "measured on this machine" in plan["machine_note"]
    after = cli(*run, "--json").document
    limit, done = after["limit"], after["decoding"]
    assert after["token_ids"] == before["token_ids"]
    assert (done["tokens"], done["steps"]) == (4, 5)
    assert limit["tokens_per_s"] == pytest.approx(done["tokens"] / done["seconds"])
    assert 0 < limit["share"] <= 1
    assert limit["bound_tokens_per_s"] >= limit["own_bound_tokens_per_s"] >= limit["tokens_per_s"] * 0.999
    assert "that nothing can pass" in cli(*run).err

    path = Path(ran.document["model"]["calibration"]["path"])
    path.write_text(path.read_text()[:100])
    broken = cli("plan", folder, "--host-memory", "50%")
    assert broken.code == 0
    assert "only a part of it" in broken.err
    assert "only a part of it" in cli(*run, "--json").document["limit_problem"]


def test_calibrating_needs_a_model(cli: Cli) -> None:
    ran = cli("doctor", "--calibrate")
    assert ran.code == 2
    assert "say which MODEL" in ran.err
