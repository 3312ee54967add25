"""Predictors that fail, lie, or take too long: one warning, and the same tokens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moert
from moert.errors import TransferError
from moert.hf.model import runtime_of
from moert.predictors.base import Floats, Ints, Model, Prediction, Predictor
from moert.runtime.predictor_guard import PASSES, PredictorGuard

L, E = 2, 8
HIDDEN = torch.ones(1, 4)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Says(Predictor):
    """Answers as it is told to, after as long as it is told to."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.calls = 0
        self.act: Callable[[], Any] = list
        self.given: Any = None

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> Sequence[Prediction]:
        self.calls += 1
        answer: Sequence[Prediction] = self.act()
        return answer

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        self.given = (experts, weights)

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self.calls += 1


class Scores(Predictor):
    """Names the scores that it is told to."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.all: Any = np.zeros(E, np.float32)

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        found: Floats = self.all
        return found


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.predictor = Says(Model((E,) * L, (2,) * L))
        self.guard = PredictorGuard(self.predictor, [E] * L, self.clock)

    def run_pass(
        self, call_s: float = 0.0, own_s: float = 0.002, pause_s: float = 0.0, is_first_alone: bool = False
    ) -> None:
        def act() -> list[Prediction]:
            self.clock.now += call_s
            if is_first_alone:
                self.predictor.act = list
            return []

        self.predictor.act = act
        self.guard.begin_pass(1, None, 1)
        for layer in range(L):
            self.guard.begin_layer(layer)
            self.guard.step(layer, HIDDEN)
            self.clock.now += own_s
        self.clock.now += pause_s


def one_warning(caught: Sequence[warnings.WarningMessage]) -> str:
    found = [str(warning.message) for warning in caught if "is switched off" in str(warning.message)]
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def test_what_raises_is_not_called_again_and_the_warning_says_where(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()

    def act() -> Any:
        return list(rig.predictor.model.top_k)[7]

    rig.predictor.act = act
    assert rig.guard.step(1, HIDDEN) == []
    line = act.__code__.co_firstlineno + 1
    message = one_warning(caught)
    assert (
        f"predictor {__name__}:Says is switched off until the model is loaded again: step of layer 1 raised" in message
    )
    assert f"IndexError: list index out of range (test_predictor_guard.py, line {line})" in message
    for _ in range(3):
        rig.run_pass()
    assert rig.predictor.calls == 1
    assert rig.predictor.scores(0) is None
    one_warning(caught)


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


def test_an_error_without_words_is_an_error_too(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()

    def act() -> Any:
        raise _Unspeakable

    rig.predictor.act = act
    assert rig.guard.step(0, HIDDEN) == []
    assert "_Unspeakable" in one_warning(caught)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), TransferError(5, "gone", "shard")])
def test_interrupts_and_errors_of_moert_pass(error: BaseException) -> None:
    rig = Rig()

    def act() -> Any:
        raise error

    rig.predictor.act = act
    with pytest.raises(type(error)):
        rig.guard.step(0, HIDDEN)
    assert rig.guard.is_on


def lazily() -> Iterator[Prediction]:
    yield Prediction(1, [3], [0])
    raise ArithmeticError("late")


NONSENSE: list[tuple[Any, str]] = [
    (None, "returned None, which is no sequence of predictions"),
    ([(1, [2], [0], None)], "returned (1, [2], [0], None), which is no prediction"),
    ([Prediction(7, [2], [0])], "predicts layer 7, of 2 layers"),
    ([Prediction(-1, [2], [0])], "predicts layer -1, of 2 layers"),
    ([Prediction(1, [3, 8], [0, 1])], "names expert 8 in layer 1, of 8 experts"),
    ([Prediction(1, [-1], [0])], "names expert -1 in layer 1"),
    ([Prediction(1, [2.0], [0])], "names expert 2.0 in layer 1"),  # type: ignore[list-item]
    ([Prediction(1, [2], [10**9])], "names rank 1000000000 in layer 1"),
    ([Prediction(1, [2, 2], [0, 1])], "names an expert of layer 1 twice: [2, 2]"),
    ([Prediction(1, [2, 3], [0])], "names 2 experts of layer 1 with 1 ranks and no probabilities"),
    ([Prediction(1, [2], [0], [0.5, 0.5])], "names 1 experts of layer 1 with 1 ranks and 2 probabilities"),
    ([Prediction(1, [2], [0], [float("nan")])], "names a probability of nan in layer 1"),
    ([Prediction(1, [2], [0], [1.5])], "names a probability of 1.5 in layer 1"),
    ([Prediction(1, [2], [0], [0.5], [0.5] * 7)], "names 7 chances of layer 1, of 8 experts"),
    ([Prediction(1, [2], [0], [0.5], [0.5] * 7 + [1.5])], "names chances of layer 1 from 0.5 to 1.5, or NaN"),
    ([Prediction(1, [2], [0], [0.5], [0.5] * 7 + [float("nan")])], "names chances of layer 1 from 0.5 to 0.5, or NaN"),
    (lazily(), "raised ArithmeticError: late"),
]


@pytest.mark.parametrize(("answer", "message"), NONSENSE, ids=[message for _, message in NONSENSE])
def test_nonsense(answer: Any, message: str, caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    rig.predictor.act = lambda: answer
    assert rig.guard.step(0, HIDDEN) == []
    assert f"step of layer 0 {message}" in one_warning(caught)
    assert not rig.guard.is_on


def test_what_makes_sense_passes(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    answer = [Prediction(1, [np.int64(2), 7], [0, 0], [1.0, np.float32(0.5)]), Prediction(0, [], [])]  # type: ignore[list-item]
    rig.predictor.act = lambda: answer
    assert rig.guard.step(0, HIDDEN) == answer
    assert rig.guard.is_on
    assert not caught


def odd_scores() -> list[tuple[Any, bool, str]]:
    nan, big = np.zeros(E, np.float32), np.zeros(E, np.float32)
    nan[[1, 4]] = np.nan, np.inf
    big[2] = 3
    return [
        (nan, False, "are NaN or infinite for 2 of 8 experts"),
        (np.zeros(E + 1, np.float32), False, "are float32 (9,), not 8 floats"),
        (np.zeros(E, np.int64), False, "are int64 (8,), not 8 floats"),
        ([0.0] * E, False, "are [0.0, 0.0"),
        (big, True, "are meant as probabilities and go from 0 to 3"),
    ]


@pytest.mark.parametrize(("scores", "are_probabilities", "message"), odd_scores())
def test_odd_scores(scores: Any, are_probabilities: bool, message: str, caught: list[warnings.WarningMessage]) -> None:
    predictor = Scores(Model((E,) * L, (2,) * L))
    guard = PredictorGuard(predictor, [E] * L, Clock())
    predictor.all = np.linspace(-1, 7, E, dtype=np.float32)
    assert guard.step(0, HIDDEN)[0].experts == [7, 6, 5]
    predictor.all = scores
    predictor.gives_probabilities = are_probabilities  # type: ignore[misc]
    assert guard.step(0, HIDDEN) == []
    assert f"scores of layer 1 {message}" in one_warning(caught)
    assert predictor.scores(1) is None


@pytest.mark.parametrize("large", [np.finfo(np.float32).max])
def test_large_scores_are_finite(large: float) -> None:
    predictor = Scores(Model((E,) * L, (2,) * L))
    guard = PredictorGuard(predictor, [E] * L, Clock())
    predictor.all = np.full(E, large, np.float32)
    with np.errstate(over="ignore"):
        assert guard.step(0, HIDDEN)
    assert guard.is_on


def test_slower_than_the_layers_themselves(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    for _ in range(PASSES + 1):
        assert rig.guard.is_on
        rig.run_pass(call_s=0.0031, own_s=0.0025)
    assert not rig.guard.is_on
    message = one_warning(caught)
    assert f"took 3.1 ms a layer and the layers themselves 2.5 ms, medians of {PASSES} passes" in message
    assert re.search(r"the longest was step of layer \d\. Tokens are not affected$", message)


@pytest.mark.parametrize(
    "way",
    [
        {"call_s": 0.0024, "own_s": 0.0025},
        {"call_s": 0.0009, "own_s": 0.0001},
    ],
    ids=["faster than the layers", "too fast to matter"],
)
def test_fast_enough(way: dict[str, float], caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    for turn in range(6 * PASSES):
        rig.run_pass(**way, pause_s=100.0 if turn % 7 == 0 else 0.0)
    assert rig.guard.is_on
    assert not caught


def test_pauses_within_calls_do_not_decide(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    rig.run_pass(call_s=50.0, is_first_alone=True)  # compiles something
    for turn in range(6 * PASSES):
        rig.run_pass(call_s=0.9 if turn % 3 == 0 else 0.0001)
    assert rig.guard.is_on
    assert not caught


def test_the_second_call_that_hangs_is_the_last(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    for _ in range(4):
        rig.run_pass(call_s=0.0001, own_s=0.05)
    rig.run_pass(call_s=2.0, own_s=0.05)
    rig.run_pass(call_s=2.0, own_s=0.05)
    message = one_warning(caught)
    assert "step of layer 1 took 2.00 s, where the layer itself took 0.05 s; 2 calls were that long" in message
    before = rig.clock.now
    rig.run_pass(call_s=2.0, own_s=0.05)
    assert rig.clock.now < before + 0.2


def test_long_calls_of_layers_that_are_longer_do_not_hang(caught: list[warnings.WarningMessage]) -> None:
    rig = Rig()
    for _ in range(PASSES // 2):
        rig.run_pass(call_s=2.0, own_s=4.0)
    assert rig.guard.is_on
    assert not caught


# In a model.


class Broken(Predictor):
    """Works for a while, then fails in one of its calls."""

    good = 3
    act: Callable[[], Any]
    where: str
    made: list[Broken] = []  # noqa: RUF012

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.calls = 0
        self.after = 0
        self.made.append(self)

    def _go(self, where: str) -> Any:
        self.calls += 1
        if where == type(self).where and self.calls > self.good:
            self.after += 1
            return type(self).act()
        return None

    def begin_sequence(self) -> None:
        self._go("begin_sequence")

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._go("begin_pass")

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        if type(self).where == "write":
            experts[:] = 0
            assert weights is not None
            weights[:] = 0
        self._go("observe")

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        found: Prediction | None = self._go("enter")
        return found

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> Sequence[Prediction]:
        found: Sequence[Prediction] | None = self._go("step")
        return super().step(layer, hidden) if found is None else found

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        found: Floats | None = self._go("scores")
        return np.ones(self.model.num_experts[layer], np.float32) if found is None else found


def boom() -> Any:
    raise RuntimeError("boom")


LIVE: list[tuple[str, Callable[[], Any], str]] = [
    ("begin_sequence", boom, "begin_sequence raised RuntimeError: boom"),
    ("begin_pass", boom, "begin_pass raised RuntimeError: boom"),
    ("observe", boom, r"observe of layer \d raised RuntimeError: boom"),
    ("write", boom, r"observe of layer \d raised ValueError: assignment destination is read-only"),
    ("enter", boom, r"enter of layer \d raised RuntimeError: boom"),
    ("step", boom, r"step of layer \d raised RuntimeError: boom"),
    ("scores", boom, r"scores of layer 1 raised RuntimeError: boom"),
    ("scores", lambda: np.full(E, np.nan, np.float32), "scores of layer 1 are NaN or infinite for 8 of 8 experts"),
    ("step", lambda: [Prediction(1, [99], [0])], r"step of layer \d names expert 99 in layer 1, of 8 experts"),
    ("enter", lambda: Prediction(5, [1], [0]), r"enter of layer \d predicts layer 5, of 2 layers"),
]


@pytest.fixture(scope="module")
def plain(tiny_olmoe: Path) -> list[Any]:
    with moert.load(tiny_olmoe, host_memory="50%", predictor="none") as model:
        return runs(model)


def runs(model: Any) -> list[Any]:
    prompts = ([[3, 1, 4, 1, 5]], [[9, 2, 6], [5, 3, 5]])
    return [
        model.generate(torch.tensor(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()
        for prompt in prompts
    ]


@pytest.mark.parametrize(("where", "act", "message"), LIVE, ids=[f"{where}: {text[-30:]}" for where, _, text in LIVE])
def test_tokens_are_the_same(
    where: str,
    act: Callable[[], Any],
    message: str,
    tiny_olmoe: Path,
    plain: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caught: list[warnings.WarningMessage],
) -> None:
    monkeypatch.setattr(Broken, "where", where, raising=False)
    monkeypatch.setattr(Broken, "act", staticmethod(act), raising=False)
    monkeypatch.setattr(Broken, "made", [])
    with moert.load(tiny_olmoe, host_memory="50%", predictor=f"{__name__}:Broken", debug=True) as model:
        assert runs(model) == plain
        found = one_warning(caught)
        assert re.search(f"predictor {__name__}:Broken is switched off.*: {message}", found)
        (predictor,) = Broken.made
        calls = predictor.calls
        assert predictor.after == (where != "write")
        assert runs(model) == plain
        assert predictor.calls == calls, "it is called again"
        ahead = runtime_of(model).look_ahead
        assert ahead is not None
        assert ahead.rests(0)
        one_warning(caught)
