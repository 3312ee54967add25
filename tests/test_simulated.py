"""The engine's steps in simulated time: against the schedule's arithmetic, and against small machines done by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_support import header_of, trace_of
from trace_support import real_trace

from moert.cli import main
from moert.errors import ConfigError, CorruptFileError, MoertError
from moert.runtime.simulated import simulate_live
from moert.runtime.virtual import VirtualMachine
from moert.schedule import Costs, Curve
from moert.simulate.timed import simulate_time
from moert.tiers.disk import Priority
from moert.tiers.native_reads import PIECE_BYTES
from moert.trace import Phase, Sequence, Trace, TraceWriter
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer, recognise

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

parts = st.floats(0.01, 3).map(lambda x: round(x, 3))
slower = st.floats(1, 2).map(lambda x: round(x, 2))
disks = st.builds(
    lambda cpu, read, start, begin, merge, cpu_slowdown, read_slowdown: Costs(
        Curve.proportional(cpu),
        read_s=read,
        cpu_start_s=start,
        read_start_s=begin,
        merge_s=merge,
        cpu_slowdown=cpu_slowdown,
        read_slowdown=read_slowdown,
    ),
    *[parts] * 5,
    slower,
    slower,
)


@settings(max_examples=25)
@given(
    costs=disks,
    layer_s=parts,
    seed=st.integers(0, 1000),
    slots=st.integers(3, 8),
    policy=st.sampled_from(["lru", "ema", "lfu", "s3fifo"]),
    mib=st.sampled_from([1, 3]),
)
def test_without_predictions_the_engine_takes_what_its_schedule_takes(
    costs: Costs, layer_s: float, seed: int, slots: int, policy: str, mib: int
) -> None:
    draw = np.random.default_rng(seed)
    picks = [[draw.choice(8, draw.integers(1, 4), replace=False).tolist() for _ in range(2)] for _ in range(20)]
    trace = trace_of([8, 8], picks[:12], picks[12:])
    how = {"layer_s": layer_s, "expert_bytes": mib << 20}
    want = simulate_time(trace, policy, slots, costs, **how)
    got = simulate_live(trace, policy, slots, costs, **how)
    assert got.event_hits == want.event_hits
    assert got.seconds == pytest.approx(want.seconds)
    assert (got.tokens, got.accesses, got.hits) == (want.tokens, want.accesses, want.hits)
    assert (got.bound_s, got.own_bound_s) == (want.bound_s, want.own_bound_s)
    assert (got.forwarded, got.read_ahead, got.predict_s) == (0, 0, 0)


def never_twice(tokens: int, counted: int) -> Trace:
    """Two layers of 8 experts that use one after another, and so never find one in a cache of two; the last count."""
    experts = np.array([[[token % 8], [(token + 4) % 8]] for token in range(tokens)], np.int32)
    phases = np.full(tokens, Phase.PREFILL, np.uint8)
    phases[-counted:] = Phase.DECODE
    return Trace(header_of([8, 8], top_k=1), [Sequence(experts, np.arange(tokens), phases)])


@pytest.mark.parametrize(
    ("layer_s", "predict_s", "event_s"),
    [
        (2.0, 0.0, 2.1),  # all of a read of 1 s is over when its event begins
        (2.0, 0.3, 2.4),  # predicting takes its time
        (0.4, 0.0, 1.0),  # a read after another: what the CPU does meanwhile is hidden
    ],
)
def test_the_future_is_read_while_nobody_waits(layer_s: float, predict_s: float, event_s: float) -> None:
    costs = Costs(Curve.constant(0.1), read_s=1.0)
    trace = never_twice(60, 20)
    how = {"layer_s": layer_s, "expert_bytes": PIECE_BYTES}
    alone = simulate_live(trace, "lru", 2, costs, **how)
    assert alone.seconds_per_token == pytest.approx(2 * (layer_s + 1.1))
    found = simulate_live(trace, "lru", 2, costs, predictor="oracle", predict_s=predict_s, **how)
    assert found.seconds_per_token == pytest.approx(2 * event_s)
    assert found.predict_s == pytest.approx(2 * 20 * predict_s)
    assert (found.forwarded, found.hits) == (2 * 20, 0)
    assert found.read_ahead == 2 * 20 - 1, "the first was asked for before, and nothing comes after the last"
    told = simulate_live(trace, "lru", 2, costs, predictor="oracle", prefetch=False, predict_s=0.0, **how)
    assert told.seconds == pytest.approx(alone.seconds)
    assert told.read_ahead == 0


def test_what_is_read_for_nothing_is_in_the_bound_of_the_own_reads() -> None:
    costs = Costs(Curve.constant(0.1), read_s=1.0)
    how = {"layer_s": 0.9, "expert_bytes": PIECE_BYTES, "predictor": "oracle,accuracy=0.5", "predict_s": 0.0}
    found = simulate_live(never_twice(200, 100), "lru", 2, costs, **how)
    for_nothing = found.read_ahead - found.forwarded
    assert for_nothing > 10
    assert found.own_bound_s == pytest.approx(found.fetched + for_nothing, abs=2)
    assert found.bound_s + 10 < found.own_bound_s <= found.seconds


def test_reads_beside_other_work_slow_both_down() -> None:
    costs = Costs(Curve.constant(0.5), read_s=1.0, cpu_slowdown=1.5, read_slowdown=2.0)
    found = simulate_live(
        never_twice(60, 20), "lru", 2, costs, layer_s=3.0, predictor="oracle", predict_s=0.0, expert_bytes=PIECE_BYTES
    )
    # Of the next read's 2 s the expert's .75 and 1.25 of the layer's pass; what is left of that goes on alone. The last
    # expert has no read beside it.
    assert found.seconds == pytest.approx(20 * 2 * (0.75 + 1.25 + (3.0 - 1.25 / 1.5)) - 0.25)


def test_a_demand_waits_for_what_has_been_begun_and_no_more() -> None:
    machine = VirtualMachine(4)
    guess = machine.submit(8.0, 0.5, 8 * PIECE_BYTES, Priority.PREFETCH)
    machine.work(0.5)
    demand = machine.submit(2.0, 9.0, 2 * PIECE_BYTES, Priority.DEMAND)
    demand.wait()
    assert machine.now == pytest.approx(0.5 + 2 + 2), "two lanes have chunks of the guess"
    machine.work(1.0, cpu_slowdown=2.0)
    assert machine.now == pytest.approx(6.5)
    assert not guess.ready
    assert guess.give_up()
    assert guess.promote()
    guess.wait()
    assert machine.now == machine.disk_s == pytest.approx(10.5)
    assert not guess.give_up()
    other = machine.submit(3.0, 0.0, 3 * PIECE_BYTES, Priority.PREFETCH)
    assert other.give_up()
    with pytest.raises(MoertError, match="given up"):
        other.wait()
    assert machine.now == pytest.approx(12.5), "what has been begun of it"
    assert not other.promote()


def test_on_a_real_trace_a_predictor_gains_what_it_is_worth() -> None:
    path = real_trace("gpt-oss-20b", "gpt-oss-20b_mmlu_pro_test.npz")
    header, found = load_importer(recognise(path)).read(path, ImportOptions(experts=32))
    first = next(iter(found))
    short = Trace(header, [Sequence(first.experts[:80], np.arange(80), first.phases[:80])])
    costs = Costs(Curve.constant(2e-4), read_s=1e-3, read_start_s=2e-4)
    how = {"layer_s": 2e-3, "expert_bytes": 6 << 20}
    none = simulate_live(short, "ema", "25%", costs, **how)
    times = [
        simulate_live(short, "ema", "25%", costs, predictor=one, predict_s=0.0, **how).seconds
        for one in ("oracle", "joint", "frequency")
    ]
    assert times[0] < times[1] < none.seconds
    assert times[0] < times[2]
    assert times[0] > none.bound_s


def test_what_cannot_be_simulated_is_refused() -> None:
    trace = never_twice(4, 4)
    costs = Costs(Curve.constant(0.1), read_s=1.0)
    for wrong, message in (
        ({"policy": "belady"}, "knows the future"),
        ({"layer_s": -1.0}, "layer_s"),
        ({"costs": Costs(Curve.constant(1.0), Curve.constant(1.0))}, "have a device"),
        ({"costs": [costs]}, "1 costs do not fit 2 layers"),
        ({"predictor": "gate_ahead"}, "needs .* in this trace"),
        ({"capacity": 0}, "0"),
        ({"lanes": 0}, "lanes=0"),
        ({"predictor": "oracle", "predict_s": -1.0}, "predict_s=-1.0"),
        ({"predictor": "oracle", "predict_s": math.nan}, "predict_s=nan"),
    ):
        arguments = {"policy": "lru", "capacity": 2, "costs": costs, **wrong}
        with pytest.raises(MoertError, match=message):
            simulate_live(trace, **arguments)  # type: ignore[arg-type]
    beside = Trace(trace.header, [trace[0], trace[0]])
    with pytest.raises(MoertError):
        simulate_live(beside, "lru", 2, costs)
    nothing = Trace(trace.header, [Sequence(trace[0].experts, np.arange(4), np.zeros(4, np.uint8))])
    with pytest.raises(ConfigError, match="nothing counts"):
        simulate_live(nothing, "lru", 2, costs)


def test_the_command_line_shows_both_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.safetensors"
    trace = never_twice(40, 40)
    writer = TraceWriter(path, trace.header)
    writer.add(trace[0])
    writer.close()
    command = ["simulate", str(path), "--policy", "ema", "--capacity", "25%", "--expert-bytes", "6MiB"]
    shown = [*command, "--machine", "12gb-pcie4", "--predictor", "joint"]
    command += ["--machine", "2-core-xeon-disk"]
    assert main([*command, "--predictor", "joint", "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)["results"]}
    assert main([*command, "--json"]) == 0
    alone = {row["policy"]: row for row in json.loads(capsys.readouterr().out)["results"]}
    assert rows["ema"]["unpredicted_ms_per_token"] == alone["ema"]["ms_per_token"]
    assert rows["ema"]["predict_ms_per_token"] > 0
    assert rows["ema"]["read_ahead_per_token"] > 0
    assert "unpredicted_ms_per_token" not in rows["belady"], "a bound is told nothing"
    assert rows["belady"]["ms_per_token"] == alone["belady"]["ms_per_token"]
    assert main([*command, "--predictor", "joint"]) == 0
    assert "without" in capsys.readouterr().out
    assert main(shown) == 2
    assert "has a device" in capsys.readouterr().err
    assert main([*command, "--predictor", "joint", "--batch", "2"]) == 2
    assert "--batch" in capsys.readouterr().err


def test_an_expert_that_its_layer_does_not_have() -> None:
    trace = never_twice(6, 2)
    trace.sequences[0].experts[3, 1] = 8
    with pytest.raises(CorruptFileError, match="has expert 8 in layer 1, which has 8"):
        simulate_live(trace, "lru", 2, Costs(Curve.constant(0.1), read_s=1.0))


@pytest.mark.parametrize(("nbytes", "wasted"), [(3 << 20, 1 << 20), (8 << 18, 4 << 18), (6 << 18, 3 << 18)])
def test_what_was_read_for_nothing(nbytes: int, wasted: int) -> None:
    machine = VirtualMachine(2)
    read = machine.submit(1.0, 0.0, nbytes, Priority.PREFETCH)
    machine.work(0.2)
    assert read.give_up()
    with pytest.raises(MoertError, match="given up"):
        read.wait()
    assert read.wasted == wasted
