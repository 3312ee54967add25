"""Calibration: samples and intervals, corrections, what is kept in files, and that only the right file is used."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibration_support import measure_quickly
from cli_support import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from moert.calibration import CalibratedMachine, Calibration, Fingerprint, Measured, Shape, sampled, store
from moert.calibration.repeating import joined, repeated
from moert.calibration.result import as_curve, from_dict
from moert.calibration.sampling import REPEATS, ROUNDS
from moert.errors import ConfigError, CorruptFileError
from moert.planning.machine import Machine
from moert.schedule import Residual

HERE = Fingerprint("A CPU", 2, "avx2", 2, 16 << 30, "ext4 on /dev/one", "0.1.0", "2.13.0", "5.23.0")
SHAPE = Shape("OlmoeForCausalLM", "bfloat16", 64, 32, "silu gated", 12288, 16384, 8, 2, 2, 1 << 20)


def a_calibration(**changes: Any) -> Calibration:
    of = Measured.exactly
    numbers: dict[str, Any] = {
        "fingerprint": HERE,
        "shape": SHAPE,
        "expert": {1: of(1e-3), 2: of(1.5e-3), 16: Measured(4e-3, 3e-3, 9e-3, 28, is_steady=False)},
        "call": of(1e-4),
        "read": of(2e-3),
        "read_together": of(3e-3),
        "read_step": of(2.5e-3),
        "read_prompt": of(2.2e-3),
        "read_start": of(5e-4),
        "miss": of(3e-4),
        "miss_start": of(2e-4),
        "expert_together": of(1.2e-3),
        "step": {1: of(2e-4), 256: of(3e-3)},
        "rest": {1: of(4e-3), 128: of(2e-2)},
        "token": of(5e-3),
        "disk_bytes_per_s": 2e9,
    }
    return Calibration(**{**numbers, **changes})


def test_samples_that_agree_are_enough() -> None:
    draw = random.Random(0)
    taken: list[float] = []

    def sample() -> float:
        taken.append(1.0 + 0.1 * draw.random())
        return taken[-1]

    found = sampled(sample)
    assert found.is_steady
    assert found.repeats == len(taken) == REPEATS
    assert min(taken) <= found.low <= found.seconds <= found.high <= max(taken)


def test_a_busy_machine_is_asked_again_and_the_interval_says_so() -> None:
    draw = random.Random(0)
    found = sampled(lambda: 1.0 if draw.random() < 0.6 else 3.0)
    assert not found.is_steady
    assert found.repeats == REPEATS * ROUNDS
    assert (found.low, found.high) == (1.0, 3.0)


def test_a_machine_that_calms_down_is_steady_in_the_end() -> None:
    times = iter([5.0, 1.0, 4.0, 1.0, 1.0, 9.0, 1.0] + [1.0] * 100)
    found = sampled(lambda: next(times))
    assert found.is_steady
    assert REPEATS < found.repeats <= REPEATS * ROUNDS
    assert found.seconds == 1.0


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_no_time_is_negative_or_no_number(wrong: float) -> None:
    with pytest.raises(ConfigError):
        sampled(lambda: wrong)
    with pytest.raises(ConfigError, match="must be finite"):
        Measured(wrong, wrong, wrong)
    with pytest.raises(ConfigError, match="say nothing"):
        Residual().note(1.0, wrong)
    with pytest.raises(ConfigError, match="disk_bytes_per_s"):
        a_calibration(disk_bytes_per_s=wrong)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), max_size=40), st.floats(1, 8))
def test_a_correction_is_a_bounded_mean(pairs: list[tuple[float, float]], most: float) -> None:
    residual = Residual(most=most)
    assert residual.factor == 1
    for predicted, measured in pairs:
        residual.note(predicted, measured)
    assert 1 / most * 0.999 <= residual.factor <= most * 1.001
    ratios = [min(max(measured / predicted, 1 / most), most) for predicted, measured in pairs]
    if ratios:
        assert min(ratios) * 0.999 <= residual.factor <= max(ratios) * 1.001


def test_a_correction_follows_a_change_and_forgets_a_pause() -> None:
    residual = Residual()
    residual.note(1.0, 1.3)
    assert residual(10.0) == pytest.approx(13.0), "the first observation counts in full"
    for _ in range(100):
        residual.note(1.0, 1.3)
    residual.note(1.0, 1e6)
    assert residual.factor < 1.3 * 1.1
    for _ in range(100):
        residual.note(1.0, 0.8)
    assert residual.factor == pytest.approx(0.8, rel=0.01)
    residual.note(0.0, 1.0)
    assert residual.factor == pytest.approx(0.8, rel=0.01), "a prediction of nothing says nothing"


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    made = a_calibration()
    path = store.save(made, tmp_path)
    assert store.load(HERE, SHAPE, tmp_path) == made
    assert path.parent == tmp_path
    assert store.load(replace(HERE, cpu="Another"), SHAPE, tmp_path) is None
    assert store.load(HERE, replace(SHAPE, num_layers=3), tmp_path) is None
    assert [one.name for one in tmp_path.iterdir()] == [path.name], "nothing unfinished is left"


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.default_folder() == tmp_path / "moert" / "calibration"
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert store.default_folder() == Path.home() / ".cache" / "moert" / "calibration"


@pytest.mark.parametrize("change", [{"cpu": "Another"}, {"cores": 3}, {"disk": "nfs on x"}, {"moert": "0.2.0"}])
def test_a_file_of_another_machine_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = store.save(a_calibration(), tmp_path)
    with pytest.raises(CorruptFileError, match=rf"of another machine .*{next(iter(change))}"):
        store.read(path, replace(HERE, **change), SHAPE)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = store.save(a_calibration(), tmp_path)
    with pytest.raises(CorruptFileError, match=r"of another model .*hidden 64, not 128"):
        store.read(path, HERE, replace(SHAPE, hidden=128))


@given(st.data())
def test_a_partial_or_broken_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "broken"
    path = store.save(a_calibration(), folder)
    whole = path.read_bytes().rstrip()
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1).filter(lambda n: not whole[n : n + 1].isspace()))
        other = data.draw(st.integers(33, 126).filter(lambda c: c != whole[at]))
        broken = whole[:at] + bytes([other]) + whole[at + 1 :]
    path.write_bytes(broken)
    with pytest.raises(CorruptFileError, match="calibrate"):
        store.read(path, HERE, SHAPE)


def test_one_other_digit_is_noticed(tmp_path: Path) -> None:
    path = store.save(a_calibration(), tmp_path)
    path.write_text(path.read_text().replace("2000000000.0", "3000000000.0"))
    with pytest.raises(CorruptFileError, match="checksum"):
        store.read(path, HERE, SHAPE)


def test_numbers_that_cannot_be_are_refused_even_with_the_right_checksum() -> None:
    from moert.calibration.result import _checksum

    for part, wrong in (("read", -1.0), ("token", math.nan)):
        document = a_calibration().as_dict()
        document[part] = {**document[part], "seconds": wrong}
        document.pop("checksum")
        document["checksum"] = _checksum(document)
        with pytest.raises(CorruptFileError, match="does not hold"):
            from_dict(document)
    for document in ([], {"version": 99}, None):  # type: ignore[assignment]
        with pytest.raises(CorruptFileError):
            from_dict(document)


def test_the_latest_with_such_experts_is_found_wherever_its_disk(tmp_path: Path) -> None:
    store.save(a_calibration(), tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert store.find(12288, replace(HERE, disk="elsewhere"), tmp_path) == a_calibration()
    assert store.find(12289, HERE, tmp_path) is None
    assert store.find(12288, replace(HERE, cores=4), tmp_path) is None
    assert store.find(12288, HERE, tmp_path / "nothing") is None


def test_a_calibrated_machine_takes_what_was_measured() -> None:
    base = Machine("this", 16e9, 10e9, 1e12, disk_bytes_per_s=1e9, layer_start_s=1e-3)
    machine = CalibratedMachine.of(base, a_calibration(), read_factor=2.0)
    costs = machine.costs(SHAPE.slot_bytes)
    assert costs.cpu_s(1) == 1e-3
    assert costs.read_s == 2 * 2.5e-3
    assert costs.read_many_s == 2 * 2.2e-3
    assert (costs.cpu_slowdown, costs.read_slowdown) == pytest.approx((1.2, 1.5))
    assert machine.forward_s(1e9, 2, 1) == pytest.approx((2 * 2e-4, 5e-3))
    assert machine.forward_s(1e9, 2, 128)[1] == pytest.approx(2e-2)
    assert machine.costs(10 * SHAPE.slot_bytes) == base.costs(10 * SHAPE.slot_bytes), (
        "of other experts nothing is known"
    )
    assert a_calibration().device is None


def test_more_tokens_never_take_less() -> None:
    of = Measured.exactly
    curve = as_curve({1: of(2.0), 2: of(1.0), 4: of(3.0)})
    assert [curve(n) for n in (1, 2, 3, 4)] == [2.0, 2.0, 2.5, 3.0]


def test_unsteady_parts_are_named() -> None:
    assert a_calibration().unsteady == ("expert of 16",)


def at_pace(slower: float, **changes: Any) -> Calibration:
    """The disk takes so many times as long as usually, samples within a twentieth."""

    def one(seconds: float) -> Measured:
        return Measured(slower * seconds, 0.95 * slower * seconds, 1.05 * slower * seconds, 7)

    reads = {"read": one(2e-3), "read_step": one(2.5e-3), "read_prompt": one(2.2e-3)}
    return a_calibration(expert={1: Measured.exactly(1e-3)}, disk_bytes_per_s=2e9 / slower, **{**reads, **changes})


@pytest.mark.parametrize(
    ("slower", "times", "middle", "low", "high", "unsteady"),
    [
        ([1.0, 1.05, 9.0], 2, 1.025, 0.95, 1.05 * 1.05, False),
        ([1.0, 1.15, 1.1], 3, 1.1, 0.95, 1.05 * 1.15, False),
        ([1.0, 1.6, 1.05], 3, 1.05, 0.95, 1.05 * 1.6, True),
        ([1.6, 1.0, 1.65], 3, 1.6, 0.95, 1.05 * 1.65, True),
    ],
    ids=["the same", "a little slower", "disturbed once", "another disk"],
)
def test_it_is_measured_again_where_the_disk_has_changed_its_speed(
    slower: list[float], times: int, middle: float, low: float, high: float, unsteady: bool
) -> None:
    asked: list[int] = []

    def once(before: int) -> Calibration:
        asked.append(before)
        return at_pace(slower[before])

    found = repeated(once)
    assert asked == list(range(times))
    got = found.read_step
    assert (got.seconds, got.low, got.high) == pytest.approx((2.5e-3 * middle, 2.5e-3 * low, 2.5e-3 * high))
    assert got.repeats == 7 * times
    assert ("read_step" in found.unsteady) == unsteady
    assert found.disk_bytes_per_s == pytest.approx(2e9 / middle, rel=1e-3)
    assert found.expert[1] == Measured(1e-3, 1e-3, 1e-3, times), "nothing happened to the CPU"
    least, most = found.ends()
    assert (least.costs().read_s, most.costs().read_s) == pytest.approx((got.low, got.high))
    assert least.read_slowdown == pytest.approx(found.read_slowdown)
    assert (most.cpu_slowdown, most.token.seconds) == pytest.approx((found.cpu_slowdown, 5e-3))


def test_a_prompt_too_long_for_a_slow_moment_is_left_out() -> None:
    one, other = at_pace(1.0), at_pace(1.0, rest={1: Measured.exactly(6e-3)})
    assert joined([one, other]).rest[1].seconds == pytest.approx(5e-3)
    assert joined([one, other]).rest[128] == one.rest[128]
    assert list(joined([other, one]).rest) == [1, 128], "whichever came first"


def test_a_disturbed_calibration_says_so_and_forecasts_are_ranges(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    from moert.cli import main
    from moert.hf import calibrating

    folder = str(checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    measure_quickly(monkeypatch)
    monkeypatch.setattr("moert.calibration.looking.look", lambda *_: 2e9)
    for slower, is_wide in (([1.0, 1.0], False), ([1.0, 6.0, 6.0], True)):
        paces = iter(slower)
        monkeypatch.setattr(
            calibrating,
            "measure",
            lambda subject, here, shape, progress, paces=paces: at_pace(next(paces), fingerprint=here, shape=shape),
        )
        assert main(["doctor", folder, "--calibrate"]) == 0
        assert next(paces, None) is None, "as often as it must"
        told = capsys.readouterr()
        assert ("the machine was busy" in told.err) == is_wide
        assert ("(2.38–15.75)" in " ".join(told.out.split())) == is_wide
        assert main(["plan", folder, "--host-memory", "25%", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        for speed in (document["decode"], document["prefill"]):
            least, most = speed["range_tokens_per_s"]
            assert least <= speed["tokens_per_s"] <= most
        least, most = document["decode"]["range_tokens_per_s"]
        assert (most > 1.15 * least) == is_wide
        assert main(["plan", folder, "--host-memory", "25%"]) == 0
        text = capsys.readouterr().out
        # It looks at the machine each time, and so the last digit may differ.
        shown = re.search(r"decode +[\d.]+ tokens/s \(([\d.]+)–([\d.]+)\)", text)
        assert (shown is not None) == is_wide
        if shown is not None:
            assert [float(end) for end in shown.groups()] == pytest.approx([least, most], rel=0.05)


def test_a_model_is_calibrated(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    from moert.hf.calibrating import calibrate, identify

    measure_quickly(monkeypatch)
    folder = checkpoint(tmp_path_factory.getbasetemp() / "cli", "olmoe")
    done: list[int] = []
    found = calibrate(Path(folder), progress=lambda n, total: done.append(total - n))
    assert done == sorted(done, reverse=True)
    assert done[-1] == 0
    here, shape = identify(Path(folder))
    assert (found.fingerprint, found.shape) == (here, shape)
    assert (shape.num_experts, shape.top_k, shape.num_layers) == (8, 2, 2)
    assert found.expert[1].seconds > 0
    assert found.read.seconds > 0
    assert found.token.seconds > 0
    store.save(found, tmp_path)
    assert store.load(here, shape, tmp_path) == found
    json.dumps(found.as_dict(), allow_nan=False)
