"""Predictions in the live engine: policies are told what the simulator tells them, reads are worth their time."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch
from fake_disk import READ_BYTES, FakeDisk, FakeLayer
from families import build, tiny_config
from test_trace_engine import capacities

import moert
from moert.hf.model import runtime_of
from moert.predictors.base import Floats, Ints, Model, Prediction, Predictor
from moert.runtime.look_ahead import LookAhead
from moert.runtime.pipeline import Pipeline
from moert.runtime.step import run_step
from moert.simulate import simulate
from moert.tiers.disk import Priority
from moert.types import ExpertId

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

PROMPTS = ((5, 17, 33, 8, 61), (9,), (40, 41, 42, 7, 7, 90, 12))


def run(model: Any, tokens: int = 24) -> list[list[int]]:
    with torch.inference_mode():
        return [
            model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[
                0
            ].tolist()
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("olmoe", "ema_ahead"),
        ("olmoe", "ema_ahead,tokens=2,discount=0.7"),
        ("olmoe", "ema"),
        ("deepseek_v3", "ema_ahead"),
    ],
)
def test_hits_are_those_of_the_simulator_with_the_same_predictor(family: str, policy: str) -> None:
    for debug in (False, True):
        model = build(family)
        with moert.patch(model, host_memory="50%", policy=policy, predictor="joint", prefetch=False, debug=debug):
            with moert.record(model) as trace:
                run(model)
            (capacity,) = set(capacities(model))
            stats = moert.stats(model)
        result = simulate(trace, policy, capacity, count="all", predictor="joint" if "ahead" in policy else None)
        assert stats.misses > 50
        assert (stats.hits, stats.misses) == (result.hits, result.misses)
        assert sum(layer.forwarded for layer in stats.layers) == 0


def test_being_told_makes_a_difference() -> None:
    hits = []
    for policy in ("ema_ahead", "ema"):
        model = build("olmoe")
        with moert.patch(model, host_memory="50%", policy=policy, predictor="joint", prefetch=False):
            run(model)
            hits.append([layer.hits for layer in moert.stats(model).layers])
    assert hits[0] != hits[1]


@pytest.mark.parametrize("policy", ["lru", "ema_ahead"])
@pytest.mark.parametrize("predictor", ["joint,ahead=2", "gate_ahead_corrected"])
def test_bits_and_counts_are_the_same_the_short_way_and_the_long_one(policy: str, predictor: str) -> None:
    config = tiny_config("olmoe")
    config.num_experts_per_tok = 4  # of two the order would not show
    model, bits, counts = build("olmoe", config=config), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a policy that looks ahead, and no probabilities
        for debug in (False, True):
            with moert.patch(model, host_memory="60%", policy=policy, predictor=predictor, debug=debug):
                found = logits(model)
                stats = moert.stats(model)
                for layer in runtime_of(model).layers:
                    layer.residency.check_integrity()
            assert stats.misses > 50
            bits.append(found)
            counts.append(stats.hits + stats.misses)
    assert torch.equal(*bits)
    assert counts[0] == counts[1]
    torch.testing.assert_close(bits[0], logits(model))


def logits(model: Any) -> torch.Tensor:
    """[tokens, vocabulary] of a text that is decoded token by token."""
    prompt = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        found = model.generate(
            prompt,
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(found.logits)


@pytest.mark.parametrize("predictor", ["none", "gate_ahead"])
def test_a_policy_that_is_not_told_says_so(predictor: str) -> None:
    model = build("olmoe")
    with pytest.warns(RuntimeWarning, match="policy='ema_ahead' looks ahead .*'joint'"):
        moert.patch(model, host_memory="50%", policy="ema_ahead", predictor=predictor)
    moert.unpatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moert.unpatch(moert.patch(model, host_memory="50%", policy="ema_ahead", predictor="joint"))
        moert.unpatch(moert.patch(model, policy="ema_ahead", predictor=predictor))


class Told(Predictor):
    """Says what the test tells it to."""

    gives_probabilities = True
    next: list[Prediction]
    first: list[float] | None = None

    def step(self, layer: int, hidden: torch.Tensor | None = None) -> list[Prediction]:
        return self.next if layer == 0 else []

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        return None if self.first is None else torch.tensor(self.first).numpy()


class Rig:
    """Layers of eight experts of which four fit, a disk, and a clock that a test sets."""

    def __init__(self, layers: int = 2) -> None:
        self.now = 0.0
        self.disk = FakeDisk()
        self.layers = [FakeLayer(index, 8, 4, self.disk) for index in range(layers)]
        self.pipeline = Pipeline(self.layers, 8, clock=lambda: self.now)
        self.told = Told(Model((8,) * layers, (2,) * layers))
        self.told.next = []
        self.ahead = LookAhead(self.told, self.layers, self.pipeline, clock=lambda: self.now)

    def step(self, layer: int, experts: list[int], *, idle_s: float, read_s: float = 1.0) -> None:
        """Each read that is waited for takes `read_s`, and it is `idle_s` from the last one to the next event."""
        wait = self.pipeline.wait

        def slow() -> list[ExpertId]:
            self.now += read_s
            return wait()

        self.pipeline.wait = slow  # type: ignore[method-assign]
        run_step(
            self.layers[layer],
            lambda hidden, weights: hidden * weights["w"],
            torch.ones(1, 1),
            torch.tensor([experts]),
            torch.ones(1, len(experts)),
            pipeline=self.pipeline,
            look_ahead=self.ahead,
            check=True,
        )
        del self.pipeline.wait
        self.now += idle_s

    def learn(self, idle_s: float) -> None:
        """Two passes whose experts all miss."""
        for expert in range(3):
            for layer in range(2):
                self.step(layer, [expert], idle_s=idle_s)
                self.layers[layer].residency.drop(ExpertId(layer, expert))

    def reading(self, layer: int) -> set[int]:
        return {expert.expert for expert in self.layers[layer].residency.arriving}


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize(("idle_s", "n_read"), [(0.4, 0), (0.6, 1), (1.4, 1), (1.6, 2), (2.6, 3), (9.0, 4)])
def test_as_much_is_read_as_is_worth_its_time(idle_s: float, n_read: int, rig: Rig) -> None:
    rig.learn(idle_s)
    assert rig.pipeline.link.read_s(READ_BYTES) == pytest.approx(1.0)
    # Nothing is known of any of them yet: each is needed as likely as not.
    rig.told.next = [Prediction(1, [4, 5, 6, 7], [0, 1, 2, 3])]
    rig.step(0, [0], idle_s=idle_s)
    queued = {expert.expert for expert in rig.pipeline._queues[Priority.PREFETCH]}
    assert len(rig.reading(1) | queued) == n_read
    assert rig.reading(1) <= {4, 5, 6, 7}


@pytest.mark.parametrize(
    ("residents", "read", "left"),
    [([0.9, 0.8, 0.7, 0.6], set(), set()), ([0.9, 0.8, 0.7, 0.0], {4}, {3}), ([0.0, 0.9, 0.04, 0.3], {4}, {0})],
)
def test_nobody_leaves_who_is_likelier_to_be_needed(
    residents: list[float], read: set[int], left: set[int], rig: Rig
) -> None:
    """Expert 0 is the one that LRU evicts, of those that are as unlikely."""
    rig.learn(1.2)
    for expert in range(4):
        rig.step(1, [expert], idle_s=1.2)
    rig.told.next = [Prediction(1, [4], [0], [0.5], [*residents, 0.5, 0.0, 0.0, 0.0])]
    rig.step(0, [0], idle_s=1.2)
    assert rig.reading(1) == read
    assert {expert.expert for expert in rig.layers[1].residency.residents} == {0, 1, 2, 3} - left


def test_what_was_given_up_and_is_predicted_again_is_read(rig: Rig) -> None:
    rig.learn(9.0)
    rig.told.next = [Prediction(1, [4], [0])]
    rig.step(0, [0], idle_s=9.0)
    (read,) = rig.disk.reads
    read.started = True
    rig.told.next = [Prediction(1, [5], [0])]
    rig.step(0, [0], idle_s=9.0)
    assert read.given_up
    rig.told.next = [Prediction(1, [4, 5], [0, 1])]
    rig.step(0, [0], idle_s=9.0)
    assert not read.given_up
    assert rig.disk.n_submitted == 6 + 1 + 2, "those of `learn`, of the step before, and of 4 and 5"


def test_the_next_pass_is_looked_at_from_the_last_layer(rig: Rig) -> None:
    rig.learn(2.0)
    rig.told.first = [0, 0, 0, 0, 0, 0, 0.9, 0]
    rig.step(0, [0], idle_s=2.0)
    assert not rig.reading(0)
    rig.step(1, [0], idle_s=2.0)
    assert rig.reading(0) == {6}
    rig.step(0, [6], idle_s=2.0)
    assert rig.layers[0].stats.forwarded == 1


def test_the_only_layer_is_not_the_next_one() -> None:
    rig = Rig(layers=1)
    rig.told.first = [0, 0, 0, 0, 0, 0, 0.9, 0]
    for expert in range(5):
        rig.step(0, [expert], idle_s=2.0)
    assert not rig.reading(0)


def test_what_is_due_sooner_is_read_first() -> None:
    disk = FakeDisk()
    layers = [FakeLayer(index, 8, 4, disk) for index in range(3)]
    pipeline = Pipeline(layers, 8)
    pipeline.prefetch([ExpertId(2, 1), ExpertId(2, 0)], due=2)
    pipeline.prefetch([ExpertId(1, 5)], due=1)
    pipeline.prefetch([ExpertId(2, 3)], due=2)
    assert list(pipeline._queues[Priority.PREFETCH]) == [
        ExpertId(1, 5),
        ExpertId(2, 1),
        ExpertId(2, 0),
        ExpertId(2, 3),
    ]
    pipeline.check_integrity()
    pipeline.dequeue([ExpertId(2, 0), ExpertId(0, 0)])
    pipeline.pump()
    assert pipeline.bytes_ahead == 3 * READ_BYTES
    assert pipeline.is_in_flight(ExpertId(1, 5))
    pipeline.dequeue([ExpertId(1, 5)])
    assert pipeline.is_in_flight(ExpertId(1, 5)), "its read has begun"
    pipeline.drain()
    assert pipeline.bytes_ahead == 0


class Hinted(Predictor):
    """Notes passes and hints."""

    gives_probabilities = True
    calls: ClassVar[list[Any]] = []

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self.calls.append(n_tokens)

    def hint(self, token_ids: Ints) -> None:
        self.calls.append(token_ids.tolist())


def test_a_hint_holds_for_the_next_pass() -> None:
    Hinted.calls.clear()
    model = build("olmoe")
    with pytest.raises(moert.MoertError):
        moert.hint(model, [1, 2])
    with moert.patch(model, host_memory="50%", predictor="test_look_ahead_live:Hinted"), torch.inference_mode():
        moert.hint(model, [4])
        moert.hint(model, torch.tensor([1, 2]).tolist())
        model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[8]]))
        with pytest.raises(moert.ConfigError, match="whole numbers"):
            moert.hint(model, [1.5])  # type: ignore[list-item]
    assert Hinted.calls == [3, [1, 2], 1]
    with moert.patch(build("olmoe"), predictor="joint") as whole:
        moert.hint(whole, [1, 2])  # nothing is predicted, and nobody minds
