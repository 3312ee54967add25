"""Prefetches from predictions: never a wrong number, no needless eviction, and no more reads than they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_disk import FakeDisk, FakeLayer
from hypothesis import given, settings
from hypothesis import strategies as st

import moert
from moert.hf.model import runtime_of
from moert.policies import make_policy, policy_names
from moert.predictors.base import Prediction, Predictor
from moert.residency import Residency
from moert.runtime.link import Link
from moert.runtime.look_ahead import MOST_TOKENS, LookAhead
from moert.runtime.pipeline import Pipeline
from moert.runtime.step import run_step
from moert.tiers.disk import Priority
from moert.types import ExpertId

E = 8
HIDDEN = torch.ones(1, 1)


class Script(Predictor):
    """Says what the test tells it to."""

    def __init__(self) -> None:
        super().__init__([])
        self.next: list[Prediction] = []
        self.entry: Prediction | None = None

    def step(self, layer: int, hidden: torch.Tensor) -> Sequence[Prediction]:
        return self.next

    def enter(self, layer: int, residual: torch.Tensor) -> Prediction | None:
        return self.entry


class Rig:
    def __init__(self, capacity: int = 4) -> None:
        self.disk = FakeDisk()
        self.layers = [FakeLayer(index, E, capacity, self.disk) for index in range(2)]
        self.pipeline = Pipeline(self.layers, 8, clock=lambda: 0.0)
        self.script = Script()
        self.ahead = LookAhead(self.script, self.layers, self.pipeline, clock=lambda: 0.0)

    def expect(self, experts: list[int], layer: int = 1) -> None:
        self.script.next = [Prediction(layer, experts, list(range(len(experts))))]

    def step(self, layer: int, experts: list[int]) -> None:
        ids = torch.tensor([experts])
        out = run_step(
            self.layers[layer],
            lambda hidden, weights: hidden * weights["w"],
            HIDDEN,
            ids,
            torch.ones(ids.shape),
            pipeline=self.pipeline,
            look_ahead=self.ahead,
            check=True,
        )
        assert out.item() == sum(self.layers[layer].factor(expert) for expert in experts)
        self.script.next = []

    def reading(self, layer: int) -> set[int]:
        return {expert.expert for expert in self.layers[layer].residency.arriving}


def test_what_is_expected_is_read_while_nobody_waits_and_then_waited_for_once() -> None:
    rig = Rig()
    rig.expect([5, 2])
    rig.step(0, [0])
    assert rig.reading(1) == {2, 5}
    assert all(read.priority is Priority.PREFETCH for read in rig.disk.reads)
    rig.step(1, [2, 5])
    assert (rig.layers[1].stats.misses, rig.layers[1].stats.forwarded) == (2, 2)
    rig.expect([6])
    rig.step(0, [0])
    rig.disk.reads[0].finish()
    rig.pipeline.collect()
    rig.step(1, [6])
    assert (rig.layers[1].stats.hits, rig.layers[1].stats.misses) == (1, 2)


def test_what_was_wrongly_expected_is_given_up_unless_all_of_it_is_being_read() -> None:
    rig = Rig()
    rig.expect([5, 6, 7])
    rig.step(0, [0])
    for read in rig.disk.reads[:2]:
        read.started = True
    rig.disk.reads[0].all_begun = True
    rig.step(1, [1])
    rig.pipeline.check_integrity()
    rig.pipeline.drain()
    assert {expert.expert for expert in rig.layers[1].residency.residents} == {1, 5}


def test_what_was_given_up_and_is_expected_again_is_taken_up() -> None:
    rig, expert = Rig(), ExpertId(1, 5)
    rig.expect([5])
    rig.step(0, [0])
    rig.disk.reads[0].started = True
    rig.pipeline.withdraw([expert])
    assert rig.pipeline.is_in_flight(expert) and not rig.pipeline.is_coming(expert)
    rig.expect([5])
    rig.step(0, [0])
    assert rig.pipeline.is_coming(expert) or rig.pipeline.bytes_ahead == rig.layers[1].read_bytes(5)


def test_a_later_look_takes_back_what_the_first_one_asked_for() -> None:
    rig = Rig()
    rig.expect([5, 6])
    rig.step(0, [0])
    rig.script.entry = Prediction(1, [6, 7], [0, 1])
    rig.ahead.enter(1, HIDDEN)
    rig.pipeline.pump()
    assert rig.reading(1) == {6, 7}


def test_ranks_are_read_for_as_long_as_they_are_worth_it() -> None:
    rig = Rig()
    steps_until_given_up = 0
    for _ in range(20):
        rig.expect([5, 6])
        rig.step(0, [0])
        if rig.reading(1) != {5, 6}:
            break
        steps_until_given_up += 1
        rig.step(1, [5])
        rig.layers[1].residency.drop(ExpertId(1, 5))
    assert steps_until_given_up <= 2, f"rank 1 was wrong {steps_until_given_up} times and still read"
    assert rig.reading(1) == {5}
    # It is still looked at, and comes back when it proves right.
    for _ in range(60):
        rig.step(1, [6])
        for expert in (5, 6):
            if ExpertId(1, expert) in rig.layers[1].residency:
                rig.layers[1].residency.drop(ExpertId(1, expert))
        rig.expect([5, 6])
        rig.step(0, [0])
    assert 6 in rig.reading(1)
    assert 5 not in rig.reading(1)


def test_long_prompts_are_not_guessed_at() -> None:
    rig = Rig()
    rig.expect([5])
    rig.ahead.step(0, torch.ones(MOST_TOKENS + 1, 1))
    assert not rig.pipeline.busy
    rig.expect([5])
    rig.ahead.step(0, torch.ones(MOST_TOKENS, 1))
    assert rig.pipeline.busy


def test_guesses_beyond_the_cache_are_not_read() -> None:
    rig = Rig(capacity=2)
    rig.expect([1, 2, 3, 4])
    rig.step(0, [0])
    assert rig.reading(1) == {1, 2}


@pytest.mark.parametrize("policy", policy_names(live_only=True))
@settings(max_examples=30, deadline=None)
@given(
    capacity=st.integers(1, 5),
    used=st.lists(st.integers(0, 7), max_size=12),
    expected=st.sets(st.integers(0, 7), max_size=5),
    admitted=st.lists(st.integers(0, 7), max_size=8),
)
def test_nothing_displaces_what_is_expected(
    policy: str, capacity: int, used: list[int], expected: set[int], admitted: list[int]
) -> None:
    residency = Residency(capacity, make_policy(policy, capacity))
    for expert in used:
        identity = ExpertId(0, expert)
        if residency.begin([identity]).misses:
            assert residency.admit(identity) is not None
            residency.arrive(identity)
        residency.end()
    kept = {ExpertId(0, expert) for expert in expected}
    residency.expect(kept)
    before = kept & set(residency.residents)
    for expert in admitted:
        identity = ExpertId(0, expert)
        if residency.slot_of(identity) is not None:
            continue
        possible = residency.can_admit()
        assert (residency.admit(identity) is not None) == possible
        if possible:
            residency.arrive(identity)
        assert before <= set(residency.residents)
        before = kept & set(residency.residents)
        residency.check_integrity()
    residency.begin([ExpertId(0, 0)])
    assert residency.can_admit() == (capacity > (ExpertId(0, 0) in residency))


@pytest.mark.parametrize("predictor", ["gate_ahead", "gate_ahead_corrected"])
def test_tokens_are_the_same_with_and_without(predictor: str, offloaded: Any) -> None:
    prompt = torch.tensor([[3, 1, 4, 1, 5]])

    def tokens(**options: Any) -> tuple[list[int], Any]:
        model = offloaded(**options)
        found = model.generate(prompt, max_new_tokens=24, do_sample=False)
        return found.tolist(), moert.stats(model)

    plain, stats = tokens(host_memory="50%", predictor="none")
    assert sum(layer.forwarded for layer in stats.layers) == 0
    found, _ = tokens(host_memory="50%", predictor=predictor, debug=True)
    assert found == plain


def test_hooks_are_gone_after_unpatch(tiny_olmoe: Path) -> None:
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    moert.patch(model, host_memory="50%", dense_kernels=False)
    runtime = runtime_of(model)
    assert runtime.look_ahead is not None
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == sum(before.values()) + 2
    moert.unpatch(model)
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == before
    model(torch.tensor([[1, 2]]))


def test_the_next_forward_after_an_interrupt_in_the_books_is_right(tiny_olmoe: Path) -> None:
    """A block's entry looks at what is resident before any use of the runtime has put it in order."""
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        moert.patch(model, host_memory="50%")
        right = model(prompt).logits
        runtime = runtime_of(model)
        for layer in runtime.layers:
            # As between the two lines of `Residency` that note an arrival and its slot.
            experts = range(layer.spec.num_experts)
            layer.residency._arriving.update(ExpertId(layer.spec.index, expert) for expert in experts)
        runtime._torn = True
        assert torch.equal(model(prompt).logits, right)
        assert not any(layer.residency.arriving for layer in runtime.layers)


def test_nobody_measures_layers_that_need_nothing() -> None:
    """Tokens for which every expert is there are no part of the times between reads, nor are pauses around them."""
    rig = Rig(capacity=E)
    clock = [0.0]
    ahead = LookAhead(rig.script, rig.layers, rig.pipeline, clock=lambda: clock[0])

    def token(gap_s: float) -> None:
        for layer in range(2):
            clock[0] += gap_s
            ahead.begin(layer, [ExpertId(layer, 0)])

    for _ in range(3):
        token(1e-3)
    known = [ahead._idle.after(layer, waits=False) for layer in range(2)]
    assert known == pytest.approx([1e-3, 1e-3])
    ahead._expectations.expect(0, "look", {ExpertId(0, 5): 0})
    clock[0] += 100.0
    assert ahead.rest()
    clock[0] += 100.0
    assert ahead.rest()
    assert not ahead._expectations.expected(0)
    token(1e-3)
    token(1e-3)
    assert [ahead._idle.after(layer, waits=False) for layer in range(2)] == pytest.approx(known)
    assert ahead._passes == 3 + 2 + 2

    class Passes(Script):
        def begin_pass(self, n_tokens: int, token_ids: Any = None, rows: int = 1) -> None:
            pass

    assert not LookAhead(Passes(), rig.layers, rig.pipeline).rest(), "its calls are held against the layers' times"


class Idle:
    """Idle times that are what the test says."""

    def __init__(self, tail_s: float = 0.0, until_s: float = 0.0) -> None:
        self.tail_s, self.until_s = tail_s, until_s

    def begin(self, layer: int, now: float, drained: float) -> None:
        return

    def enter(self, layer: int, now: float) -> None:
        return

    def until(self, layer: int) -> float:
        return self.until_s

    def after(self, layer: int, waits: bool) -> float:
        return 0.0 if waits else self.tail_s


def test_no_more_is_asked_for_than_there_is_room_for() -> None:
    rig = Rig(capacity=2)
    rig.expect([5, 2, 7])
    rig.step(0, [0])
    assert rig.reading(1) == {2, 5}
    assert rig.pipeline.bytes_ahead == 2 * rig.layers[1].read_bytes(0)


def test_what_is_on_its_way_takes_its_part_of_the_idle_time() -> None:
    rig = Rig()
    rig.expect([5, 2])
    rig.step(0, [0])
    assert rig.reading(1) == {2, 5}
    rig.pipeline.link = Link()
    rig.pipeline.link.demand(0.0)
    rig.pipeline.link.arrive(rig.layers[1].read_bytes(0), True, 1.0)
    for idle_s, asked in ((2.5, 2), (2.9, 3)):
        rig.ahead._idle = Idle(until_s=idle_s)  # type: ignore[assignment]
        rig.script.entry = Prediction(1, [5, 2, 6], [0, 1, 2])
        rig.ahead.enter(1, HIDDEN)
        assert rig.pipeline.bytes_ahead == asked * rig.layers[1].read_bytes(0), "one more, if half of it is hidden"


def test_the_link_has_waited_for_once_an_event_is_in_between() -> None:
    rig = Rig()
    rig.ahead._idle = Idle(tail_s=3.0)  # type: ignore[assignment]
    assert rig.ahead._idle_until(0, 1) == 3.0
    assert rig.ahead._idle_until(0, 3) == 3.0


def test_among_residents_that_are_about_as_unlikely_the_policy_says_who_leaves() -> None:
    for chances, left in (([0.32, 0.30], 0), ([0.50, 0.30], 1), ([0.30, 0.50], 0)):
        rig = Rig(capacity=2)
        rig.step(1, [0])
        rig.step(1, [1])
        every = [*chances, *[0.9 if expert == 5 else 0.0 for expert in range(2, E)]]
        rig.script.next = [Prediction(1, [5], [0], [0.9], every)]
        rig.step(0, [0])
        assert rig.reading(1) == {5}
        assert ExpertId(1, left) not in rig.layers[1].residency
        assert ExpertId(1, 1 - left) in rig.layers[1].residency


def test_tokens_are_compared_with_steps_of_as_many() -> None:
    rig = Rig()
    noted: list[float] = []
    rig.ahead._trial.note = noted.append  # type: ignore[method-assign]
    for n_tokens, count in ((1, 0), (1, 1), (3, 1), (1, 1), (1, 2), (MOST_TOKENS + 1, 2), (MOST_TOKENS + 1, 2)):
        rig.ahead.begin(0, {ExpertId(0, 0)}, n_tokens)
        assert len(noted) == count
