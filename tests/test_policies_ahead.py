"""Eviction by predictions: MIN where they are certain and reach far, EMA where there are none, never below MIN."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import fewest_misses
from policy_support import Watched, replay, replay_with_bypass, traces
from simulate_support import header_of, sequence_of, trace_of

from moert.cli import main
from moert.errors import ConfigError, PolicyError
from moert.policies import Policy, make_policy
from moert.policies.ema_ahead import EMAAhead
from moert.predictors._ahead import chances_ahead
from moert.predictors.base import Floats, Ints, Model, Predictor
from moert.schedule import Costs, Curve, Promotion
from moert.simulate import simulate
from moert.simulate.ahead import look_ahead
from moert.simulate.capacity import Scope
from moert.simulate.events import Reading
from moert.simulate.timed import simulate_time
from moert.trace import Trace, TraceWriter
from moert.types import ExpertId

quick = settings(max_examples=40, deadline=None)
Events = list[list[ExpertId]]


def e(expert: int, layer: int = 0) -> ExpertId:
    return ExpertId(layer, expert)


def ints(events: Events) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(1000 * layer + expert for layer, expert in event) for event in events)


class Told(Watched):
    """A policy that is told before each event what the layer's later ones will need, of so many of them."""

    def __init__(self, policy: Policy, events: Events, reach: int, experts: int = 8) -> None:
        super().__init__(policy)
        self.events, self.reach, self.experts, self.now = events, reach, experts, 0

    def access(self, event: Sequence[ExpertId]) -> None:
        layer = event[0].layer
        later = [one for one in self.events[self.now + 1 :] if one[0].layer == layer][: self.reach]
        rows = [[float(ExpertId(layer, x) in one) for x in range(self.experts)] for one in later]
        self.inner.observe_ahead(layer, rows)
        self.now += 1
        super().access(event)


@quick
@given(trace=traces(steps=14), capacity=st.integers(3, 6))
def test_certain_predictions_that_reach_the_end_are_min(trace: Events, capacity: int) -> None:
    misses = sum(replay(Told(make_policy("ema_ahead", capacity), trace, 99), capacity, trace))
    assert misses == fewest_misses(ints(trace), capacity)


@quick
@given(trace=traces(n_experts=5, steps=40, layers=3), capacity=st.integers(3, 9))
def test_it_is_min_in_one_cache_for_several_layers_too(trace: Events, capacity: int) -> None:
    misses = sum(replay(Told(make_policy("ema_ahead", capacity), trace, 99), capacity, trace))
    assert misses == sum(replay(make_policy("belady", capacity, future=trace), capacity, trace))


@quick
@given(trace=traces(steps=30), capacity=st.integers(1, 5))
def test_it_is_min_with_bypass_too(trace: Events, capacity: int) -> None:
    misses = sum(replay_with_bypass(Told(make_policy("ema_ahead", capacity), trace, 99), capacity, trace))
    assert misses == sum(replay_with_bypass(make_policy("min_bypass", capacity, future=trace), capacity, trace))


@quick
@given(
    trace=traces(n_experts=6, steps=30, layers=2),
    capacity=st.integers(3, 6),
    rows=st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), max_size=3),
    every=st.integers(1, 4),
)
def test_no_prediction_beats_min(trace: Events, capacity: int, rows: list[list[float]], every: int) -> None:
    class Guess(Watched):
        now = 0

        def access(self, event: Sequence[ExpertId]) -> None:
            self.now += 1
            if self.now % every == 0:
                self.inner.observe_ahead(event[0].layer, rows)
            super().access(event)

    misses = sum(replay(Guess(make_policy("ema_ahead", capacity)), capacity, trace))
    assert misses >= sum(replay(make_policy("belady", capacity, future=trace), capacity, trace))


@quick
@given(trace=traces(n_experts=6, steps=40, layers=3), capacity=st.integers(3, 9))
def test_without_predictions_it_is_ema(trace: Events, capacity: int) -> None:
    plain, ahead = (Watched(make_policy(name, capacity)) for name in ("ema", "ema_ahead"))
    assert replay(plain, capacity, trace) == replay(ahead, capacity, trace)
    assert plain.evicted == ahead.evicted


def test_worth_is_what_its_definition_gives() -> None:
    policy = EMAAhead(2, alpha=0.5, discount=0.8)
    policy.observe_ahead(0, [[0.25, 0.5], [0.0, 1.0]])
    policy.access([e(0)])
    policy.admit(e(0))
    policy.admit(e(1))
    # Expert 0 has a moving average of .5: its next use is the first with 1/4, else the third, fourth, ... with 1/2.
    tail = sum(0.8**n * 0.5 ** (n - 2) for n in range(3, 200))
    assert policy.worth(e(0)) == pytest.approx(0.8 * 0.25 + 0.75 * tail)
    assert policy.worth(e(1)) == pytest.approx(0.8 * 0.5 + 0.5 * 0.64)
    # An event later the second prediction is the first, and what is not told has no chance of its own.
    policy.access([e(1)])
    assert policy.worth(e(1)) == pytest.approx(0.8)
    assert policy.worth(e(7)) == 0


def test_one_early_use_is_worth_more_than_many_late_ones() -> None:
    policy = EMAAhead(2)
    policy.observe_ahead(0, [[1, 0], [0, 1], [0, 1], [0, 1]])
    policy.access([e(7)])
    policy.admit(e(0))
    policy.admit(e(1))
    assert policy.victim(set()) == e(1)


def test_the_larger_of_two_alike_leaves() -> None:
    policy = make_policy("ema_ahead", 5, sizes=lambda expert: 1 + 3 * expert.expert)
    policy.observe_ahead(0, [[0.5, 0.9]])
    policy.access([e(0), e(1)])
    policy.admit(e(0))
    policy.admit(e(1))
    assert policy.victim(set()) == e(1)


@st.composite
def one_sequence(draw: st.DrawFn, tokens: int = 9) -> Trace:
    """Two layers of ten experts, up to three of them for a token, and passes of one or two tokens."""
    pick = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)
    picks = draw(st.lists(st.tuples(pick, pick), min_size=1, max_size=tokens))
    sequence = sequence_of(picks)
    steps = [0]
    for _ in picks[1:]:
        joins = draw(st.booleans()) and steps.count(steps[-1]) == 1
        steps.append(steps[-1] + (not joins))
    return Trace(header_of([10, 10]), [replace(sequence, steps=np.array(steps))])


@settings(max_examples=30, deadline=None)
@given(trace=one_sequence(), scope=st.sampled_from(["layer", "global"]), room=st.integers(6, 9))
def test_an_oracle_in_the_simulator_is_min_also_where_passes_have_many_tokens(
    trace: Trace, scope: Scope, room: int
) -> None:
    def misses(policy: str, predictor: str | None = None) -> int:
        return simulate(trace, policy, room, scope=scope, count="all", predictor=predictor).misses

    assert misses("ema_ahead,tokens=8", "oracle") == misses("belady")
    assert misses("ema_ahead") == misses("ema") >= misses("belady")
    assert misses("ema_ahead", "oracle,accept=0.5,accuracy=0.5") >= misses("belady")


class Heard(Predictor):
    """Notes what it is told, and knows that expert 3 is next."""

    gives_probabilities = True
    calls: ClassVar[list[Any]] = []

    def begin_sequence(self) -> None:
        self.calls.append("sequence")

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self.calls.append(("pass", n_tokens, None if token_ids is None else token_ids.tolist()))

    def hint(self, token_ids: Ints) -> None:
        self.calls.append(("hint", token_ids.tolist()))

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        self.calls.append(("observe", layer, experts.tolist()))

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        self.calls.append(("scores", layer, tokens))
        return np.eye(4, dtype=np.float32)[3] if tokens < 3 else None


def test_a_predictor_is_told_and_asked_as_in_a_live_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "heard", ModuleType("heard"))
    vars(sys.modules["heard"])["Heard"] = Heard
    Heard.calls.clear()
    sequence = replace(
        sequence_of([[[0, 1], [2]], [[1], [2]], [[3], [0]], [[0], [1]]], num_prompt=3),
        steps=np.array([0, 0, 1, 2]),
        token_ids=np.array([7, 8, 9, 5], dtype=np.int64),
    )
    found = list(look_ahead(Trace(header_of([4, 4]), [sequence]), Reading(), "heard:Heard", 4))
    assert found == [[[0, 0, 0, 1]] * 2] * 6
    asked = [[("scores", layer, 1), ("scores", layer, 2), ("scores", layer, 3)] for layer in (0, 1)]
    assert Heard.calls == [
        "sequence",
        ("pass", 2, [7, 8]),
        ("hint", [9]),
        ("observe", 0, [[0, 1, -1], [1, -1, -1]]),
        *asked[0],
        ("observe", 1, [[2, -1, -1], [2, -1, -1]]),
        *asked[1],
        ("pass", 1, [9]),
        ("observe", 0, [[3, -1, -1]]),
        *asked[0],
        ("observe", 1, [[0, -1, -1]]),
        *asked[1],
        ("pass", 1, [5]),
        ("observe", 0, [[0, -1, -1]]),
        *asked[0],
        ("observe", 1, [[1, -1, -1]]),
        *asked[1],
    ]


def test_what_is_no_number_is_not_said() -> None:
    class Odd(Predictor):
        def scores(self, layer: int, tokens: int = 0) -> Floats | None:
            return np.array([[0.5, 2.0], [np.nan, 0.5], [0.1, 0.1]][tokens - 1], np.float32)

    assert chances_ahead(Odd(Model((2,), (1,))), 0, 3) == [[0.5, 1.0]]


def test_each_sequence_begins_anew_where_caches_do() -> None:
    tokens = [[[0]], [[1]], [[2]], [[0]], [[1]], [[2]]]
    twice = trace_of([4], tokens, tokens)
    once = trace_of([4], tokens)
    for predictor in ("joint", "oracle"):
        one = simulate(once, "ema_ahead,tokens=2", 2, predictor=predictor, reset="sequence")
        two = simulate(twice, "ema_ahead,tokens=2", 2, predictor=predictor, reset="sequence")
        assert two.misses == 2 * one.misses


def test_a_replay_in_time_looks_ahead_too() -> None:
    rng = np.random.default_rng(5)
    trace = trace_of([8], [[rng.choice(8, 2, replace=False).tolist()] for _ in range(60)])
    costs = Costs(Curve.proportional(9.0), Curve.constant(1.0), move_s=2.0)

    def hits(policy: str, predictor: str | None = None) -> int:
        return simulate_time(trace, policy, 4, costs, scheduler="fetch_all", predictor=predictor).hits

    assert hits("ema") == hits("ema_ahead") < hits("ema_ahead", "oracle") <= hits("min_bypass")
    assert hits("ema_ahead,tokens=8", "oracle") == hits("min_bypass")
    assert hits("ema", "oracle") == hits("ema"), "a policy that does not look ahead is told nothing"


def test_what_is_promoted_goes_by_what_it_is_worth() -> None:
    """The CPU computes every miss, so only promotion changes the cache."""
    rng = np.random.default_rng(6)
    trace = trace_of([8], [[rng.choice(8, 2, replace=False).tolist()] for _ in range(80)])
    costs = Costs(Curve.proportional(1.0), Curve.constant(1.0), move_s=1.0)

    def hits(policy: str, predictor: str | None = None) -> int:
        timed = simulate_time(
            trace, policy, 4, costs, scheduler="static_split", promotion=Promotion(), layer_s=1.0, predictor=predictor
        )
        return timed.hits

    assert hits("ema") == hits("ema_ahead") < 0.9 * hits("ema_ahead", "oracle")


def test_the_command_line_takes_a_predictor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.safetensors"
    rng = np.random.default_rng(7)
    tokens = [[rng.choice(8, 2, replace=False).tolist()] for _ in range(40)]
    with TraceWriter(path, header_of([8])) as writer:
        writer.add(trace_of([8], tokens)[0])
    command = ["simulate", str(path), "--policy", "ema,ema_ahead,tokens=8", "--capacity", "4", "--json"]
    assert main([*command, "--predictor", "oracle"]) == 0
    document = json.loads(capsys.readouterr().out)
    misses = {row["policy"]: row["misses"] for row in document["results"]}
    assert misses["ema_ahead,tokens=8"] <= misses["ema"]
    assert misses["ema_ahead,tokens=8"] == misses["belady"]
    assert document["command"].endswith("--predictor oracle")
    for predictor, message in (("nobody", "no predictor named"), ("set_transition", "gives no probabilities")):
        assert main([*command, "--predictor", predictor]) == 2
        assert message in capsys.readouterr().err
    assert main(["simulate", str(path), "--policy", "lru", "--predictor", "oracle"]) == 2
    assert "no policy of lru, belady looks ahead; ema_ahead does" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("nobody", "no predictor named 'nobody'"),
        ("set_transition", "gives no probabilities"),
        ("lookup", "needs token ids, which are not at hand in this trace"),
        ("oracle,accept=2", "accept=2"),
    ],
)
def test_predictors_that_cannot_be_used(predictor: str, message: str) -> None:
    trace = trace_of([4], [[[0]], [[1]]])
    with pytest.raises(ConfigError, match=message):
        simulate(trace, "ema_ahead", 2, predictor=predictor)


def test_sequences_that_run_together_are_refused() -> None:
    one = sequence_of([[[0]], [[1]]])
    with pytest.raises(ConfigError, match="sequence 1 begins at step 1 and one before it ended at step 1"):
        simulate(Trace(header_of([4]), [one, replace(one, steps=one.steps + 1)]), "ema_ahead", 2, predictor="oracle")
    apart = trace_of([4], [[[0]], [[1]]], [[[0]]])
    for options in ({"batch": 2}, {"atomic": False}):
        with pytest.raises(ConfigError, match="one sequence at a time"):
            simulate(apart, "ema_ahead", 2, predictor="oracle", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"), [("tokens=0", "tokens=0 must be at least 1"), ("discount=1", "discount=1.0 must be above 0")]
)
def test_parameters_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(f"ema_ahead,{text}", 2)


def test_a_policy_from_outside_that_fails_when_told_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "farsighted.py").write_text(
        "from moert.policies.lru import LRU\n"
        "class Farsighted(LRU):\n"
        "    tokens_ahead = 2\n"
        "    def observe_ahead(self, layer, chances):\n"
        "        raise ValueError(f'{len(chances)} rows')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PolicyError, match=r"observe_ahead raised ValueError: 2 rows"):
        simulate(trace_of([4], [[[0]], [[1]]]), "farsighted:Farsighted", 2, predictor="oracle")
