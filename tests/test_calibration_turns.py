"""What a miss costs is seen on a machine that changes its speed, and choosing experts is not part of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moert.calibration import _whole_model
from moert.calibration._whole_model import MORE_TOKENS, PROMPT_TOKENS, WholeModel
from moert.calibration.sampling import REPEATS, ROUNDS, sampled_together
from moert.calibration.subject import Ids
from moert.schedule import Costs, Curve

LAYERS, EXPERTS, TOP_K = 3, 8, 4
RESIDENT = [0, 1, 2, 3, 4]
TOKEN_S, MISS_S, FIRST_S, READ_S = 0.1, 0.02, 0.01, 0.015


class Machine:
    """Tokens of a model whose speed drifts, on a clock of its own; choosing experts takes time too."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now = self.disk_s = 0.0
        self.slow = 1.0
        self._drift = drift
        self.asked: list[int] = []
        """Misses of each layer, by texts."""

    def clock(self) -> float:
        return self.now

    def generate(self, prompt: int, new_tokens: int, ids: Ids) -> tuple[float, float]:
        assert (prompt, new_tokens) == (PROMPT_TOKENS, 1 + MORE_TOKENS)
        self.slow *= 1 + self._drift
        for layer in range(LAYERS):
            assert set(ids(layer, prompt, TOP_K).flatten().tolist()) <= set(RESIDENT)
        begin = self.now
        for _ in range(MORE_TOKENS):
            self.now += TOKEN_S * self.slow
            for layer in range(LAYERS):
                (chosen,) = ids(layer, 1, TOP_K).tolist()
                assert len(set(chosen)) == TOP_K
                misses = len(set(chosen).difference(RESIDENT))
                self.now += misses * MISS_S + (FIRST_S if misses else 0.0)
                self.disk_s += misses * READ_S
        self.asked.append(misses)
        return 0.0, self.now - begin


def whole_model(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> WholeModel:
    layers: list[Any] = [SimpleNamespace(spec=SimpleNamespace(index=index)) for index in range(LAYERS)]
    subject: Any = SimpleNamespace(layers=layers, generate=machine.generate, disk_s=lambda: machine.disk_s)
    shape: Any = SimpleNamespace(top_k=TOP_K, num_experts=EXPERTS)
    work: Any = SimpleNamespace(residents=lambda layer: RESIDENT)
    monkeypatch.setattr(_whole_model, "perf_counter", machine.clock)
    return WholeModel(subject, shape, work, 0.0, Curve.constant(0.0), Curve.constant(0.0))


def test_a_machine_that_slows_down_slows_all_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 41 % in the end. Had all tokens without misses come first, a miss would seem to cost half as much again."""
    machine = Machine(drift=2 ** (1 / (6 * REPEATS)) - 1)
    tokens = whole_model(machine, monkeypatch).tokens()
    turn = [0, 1, EXPERTS - len(RESIDENT)]
    assert machine.asked == turn * REPEATS
    assert 1.1 * TOKEN_S < tokens.whole.seconds < 1.3 * TOKEN_S
    for misses in turn[1:]:
        drifted = tokens.waits[misses].seconds - FIRST_S - misses * MISS_S
        assert 0 <= drifted < 0.04 * 2 * TOKEN_S / LAYERS, "3.4 % from one end of a turn to the other"
        assert tokens.disk[misses].seconds == pytest.approx(misses * READ_S)


def test_choosing_experts_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for choosing_s in (0.0, 0.05):
        machine = Machine()
        model = whole_model(machine, monkeypatch)
        some = model._some

        def slowly(
            layer: int, misses: int, k: int, machine: Any = machine, some: Any = some, s: float = choosing_s
        ) -> Any:
            machine.now += s
            return some(layer, misses, k)

        monkeypatch.setattr(model, "_some", slowly)
        found.append(model.tokens())
    assert found[1].whole.seconds == pytest.approx(found[0].whole.seconds)
    for misses, wait in found[0].waits.items():
        assert found[1].waits[misses].seconds == pytest.approx(wait.seconds)


def test_where_no_expert_can_be_missing_all_is_the_reads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    model = whole_model(machine, monkeypatch)
    model._resident = {layer: list(range(EXPERTS)) for layer in range(LAYERS)}
    tokens = model.tokens()
    assert not tokens.waits and set(machine.asked) == {0}
    found = model.reads(Costs(Curve.constant(0.1), read_s=3.0), tokens)
    assert [one.seconds for one in found] == [3.0, 0.0, 0.0, 0.0]


def test_turns_go_on_until_all_agree() -> None:
    calm: list[float] = []

    def turn() -> dict[str, float]:
        calm.append(1.0)
        return {"calm": 1.0, "late": 1.0 if len(calm) > REPEATS else float(len(calm))}

    found = sampled_together(turn)
    assert found["calm"].repeats == found["late"].repeats == len(calm) == REPEATS * ROUNDS
    assert found["calm"].is_steady and not found["late"].is_steady
    calm.clear()
    assert sampled_together(lambda: {"a": 1.0, "b": 2.0})["b"].repeats == REPEATS
