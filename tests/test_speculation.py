"""Draft lengths: against every fixed length by its closed form, and in `generate` with the same tokens."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moert
from moert.errors import ConfigError
from moert.speculation import LENGTHS, Governor, govern
from moert.speculation.curves import Acceptance, Costs, union_growth
from moert.speculation.governor import Promise

ACCEPTANCE = {
    "none": [0.0] * 7,
    "a fifth": [0.2] * 7,
    "two fifths": [0.4] * 7,
    "three fifths": [0.6] * 7,
    "four fifths": [0.8] * 7,
    "nearly all": [0.95] * 7,
    "two are right": [0.9, 0.9] + [0.05] * 5,
    "three are right": [0.9, 0.9, 0.9] + [0.05] * 4,
    "all if the first is": [0.4, 0.9] + [0.95] * 5,
}

# A fixed part, one that grows as the experts do, and how much of the union's growth shows.
COSTS = {
    "all experts": (0.0, 1.0, 1.0),
    "half experts": (1.0, 1.0, 1.0),
    "few experts": (4.0, 1.0, 1.0),
    "alike picks": (0.5, 1.0, 0.5),
    "equal picks": (0.2, 1.0, 0.0),
}
E, K = 64, 6


class Text:
    """A machine and a text, by their truth."""

    def __init__(self, right: list[float], costs: tuple[float, float, float], found: float = 1.0) -> None:
        fixed, part, spread = costs
        self.right = right
        self.found = found
        self.seconds = [0.0, *(fixed + part * (1 + spread * union_growth(n, E, K)) for n in range(1, 9))]

    def tokens_of(self, n: int) -> float:
        return 1 + self.found * sum(math.prod(self.right[: place + 1]) for place in range(n - 1)) if n > 1 else 1.0

    def seconds_of(self, n: int) -> float:
        return (1 - self.found) * self.seconds[1] + self.found * self.seconds[n]

    def best(self) -> float:
        return max(self.tokens_of(n) / self.seconds_of(n) for n in LENGTHS)

    def run(self, governor: Governor, steps: int, seed: int = 0, noise: float = 0.2) -> tuple[float, Counter[int]]:
        """Tokens per second that its choices give on average, as a share of the best fixed length's."""
        random = np.random.default_rng(seed)
        chosen: Counter[int] = Counter()
        for _ in range(steps):
            n = governor.choose()
            chosen[n] += 1
            drafted = n - 1 if random.random() < self.found else 0
            accepted = 0
            while accepted < drafted and random.random() < self.right[accepted]:
                accepted += 1
            factor = math.exp(noise * random.standard_normal() - noise**2 / 2)
            governor.note(drafted, accepted, self.seconds[1 + drafted] * factor)
        tokens = sum(count * self.tokens_of(n) for n, count in chosen.items())
        seconds = sum(count * self.seconds_of(n) for n, count in chosen.items())
        return tokens / seconds / self.best(), chosen


GRID = [
    (right, costs, found)
    for right, costs, found in itertools.product(ACCEPTANCE, COSTS, (1.0, 0.4))
    # Where drafts are rare and the first is mostly wrong, hardly anything is seen of those after it.
    if found == 1 or (right != "all if the first is" and costs == "half experts")
]


@pytest.mark.parametrize(
    ("right", "costs", "found"),
    [pytest.param(*one, marks=() if place % 4 == 0 else pytest.mark.slow) for place, one in enumerate(GRID)],
)
def test_within_3_percent_of_the_best_fixed_length(right: str, costs: str, found: float) -> None:
    text = Text(ACCEPTANCE[right], COSTS[costs], found)
    share, chosen = text.run(Governor(E, K), 4000)
    assert share >= 0.97, chosen


def test_every_length_is_the_best_somewhere() -> None:
    best = set()
    for right, costs, found in GRID:
        text = Text(ACCEPTANCE[right], COSTS[costs], found)
        best.add(max(LENGTHS, key=lambda n: text.tokens_of(n) / text.seconds_of(n)))
    assert best == set(LENGTHS)


def test_without_drafts_that_are_right_there_is_no_speculation() -> None:
    text = Text(ACCEPTANCE["none"], COSTS["all experts"])
    share, chosen = text.run(Governor(E, K), 3000)
    assert chosen[1] > 0.97 * 3000
    assert share > 0.98


@pytest.mark.parametrize("rights", [("none", "nearly all"), ("nearly all", "none"), ("four fifths", "a fifth")])
def test_it_follows_when_the_text_changes(rights: tuple[str, str]) -> None:
    governor = Governor(E, K)
    before, after = (Text(ACCEPTANCE[right], COSTS["half experts"]) for right in rights)
    before.run(governor, 2000, seed=1)
    after.run(governor, 2000, seed=2)
    share, chosen = after.run(governor, 1000, seed=3)
    assert share >= 0.96, chosen


def test_it_follows_when_the_machine_changes() -> None:
    governor = Governor(E, K)
    Text(ACCEPTANCE["four fifths"], COSTS["few experts"]).run(governor, 1500, seed=1)
    slow = Text(ACCEPTANCE["four fifths"], (0.0, 3.0, 1.0))
    slow.run(governor, 1500, seed=2)
    share, chosen = slow.run(governor, 1000, seed=3)
    assert share >= 0.96, chosen


def test_a_pause_does_not_decide() -> None:
    text = Text(ACCEPTANCE["nearly all"], COSTS["few experts"])
    governor = Governor(E, K)
    text.run(governor, 500)
    usual = governor.promises()
    governor.choose()
    governor.note(7, 7, 1e4)
    assert governor.promises()[8].seconds < 1.1 * usual[8].seconds


def test_never_more_than_are_allowed() -> None:
    text = Text(ACCEPTANCE["nearly all"], COSTS["few experts"])
    governor = Governor(E, K)
    for most in (1, 2, 5, 8, 3, 1, 12) * 100:
        n = governor.choose(most)
        assert n in LENGTHS
        assert n <= most
        governor.note(n - 1, n - 1, text.seconds[n])
    assert governor.choose(12) == 8


class Told(Governor):
    """Knows what lengths promise, without doubt, so that it tries nothing while it speculates."""

    def __init__(self, promised: dict[int, float]) -> None:
        super().__init__()
        self.promised = promised

    def _promise(self, n: int, *, at_best: bool = False) -> Promise:
        return Promise(0.0 if at_best else self.promised[n], 1.0)

    def steps(self, count: int) -> set[int]:
        chosen = set()
        for _ in range(count):
            n = self.choose(max(self.promised))
            self.note(n - 1, n - 1, 1.0)
            chosen.add(n)
        return chosen


def test_another_length_is_chosen_where_it_promises_a_percent_more() -> None:
    told = Told({1: 0.5, 2: 1.0, 3: 1.1})
    assert told.steps(8) == {1, 2}
    assert told.steps(8) == {3}
    for gain, chosen in ((0.007, 3), (0.013, 2)):
        told.promised |= {2: 1 + gain, 3: 1.0}
        assert told.steps(8) == {chosen}, gain


def test_union_by_counting_all_draws() -> None:
    for size, picks, n in [(4, 1, 3), (4, 2, 2), (5, 3, 2), (4, 2, 3)]:
        draws = list(itertools.combinations(range(size), picks))
        unions = [len(set().union(*tokens)) for tokens in itertools.product(draws, repeat=n)]
        assert union_growth(n, size, picks) == pytest.approx(sum(unions) / len(unions) / picks - 1)
    assert union_growth(1, 64, 6) == pytest.approx(0)
    assert union_growth(5, 0, 0) == 4


def test_drafts_that_are_right_by_their_definition() -> None:
    random = np.random.default_rng(0)
    right = [0.9, 0.5, 0.8, 0.3, 0.7, 0.6, 0.9]
    acceptance = Acceptance(7)
    accepted = []
    for _ in range(4000):
        n = int(np.argmin([*(random.random(7) < right), False]))
        accepted.append(n)
        acceptance.note(7, n, was_asked=True)
    assert acceptance.expected(7) == pytest.approx(float(np.mean(accepted)), rel=0.15)
    assert acceptance.expected(2) == pytest.approx(0.9 + 0.45, rel=0.15)
    assert acceptance.chance_of_drafts == 1


def test_lengths_that_were_not_tried_follow_the_union() -> None:
    for fixed, part in [(0.0, 1.0), (1.0, 1.0), (5.0, 0.3), (2.0, 0.0)]:
        costs = Costs(8, E, K)
        for n in (1, 2):
            for _ in range(4):
                costs.note(n, fixed + part * (1 + union_growth(n, E, K)))
        assert costs.seconds(8) == pytest.approx(fixed + part * (1 + union_growth(8, E, K)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Governor(4, 6), "no 6 experts to pick of 4"),
        (lambda: Governor(-1), "no 0 experts to pick of -1"),
        (lambda: Governor(8, 0), "no 0 experts to pick of 8"),
        (lambda: Governor().choose(0), "at most 0 tokens gives none"),
        (lambda: Governor().note(2, 3, 1.0), "of 2 drafts 3 cannot have been accepted"),
        (lambda: Governor().note(-1, 0, 1.0), "of -1 drafts 0"),
        (lambda: Governor().note(1, 0, -1.0), "took -1.0 s"),
        (lambda: Governor().note(1, 0, math.nan), "took nan s"),
    ],
)
def test_what_cannot_be(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


# In `generate`.

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3, 1]])


class Script(Governor):
    """Goes through lengths in turn."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()
        self._script = itertools.cycle(lengths)
        self.notes: list[tuple[int, int, int]] = []

    def choose(self, most: int = 8) -> int:
        self.length = next(self._script)
        return self.length

    def note(self, drafted: int, accepted: int, seconds: float) -> None:
        super().note(drafted, accepted, seconds)
        self.notes.append((self.length, drafted, accepted))


@pytest.fixture(scope="module")
def other(tiny_olmoe: Path) -> Any:
    """A model that agrees with `model` at times."""
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight += 0.01 * torch.randn_like(model.lm_head.weight)
    # Otherwise it stops drafting where it is not sure.
    model.generation_config.assistant_confidence_threshold = 0
    return model


@pytest.fixture(scope="module")
def model(tiny_olmoe: Path) -> Any:
    with moert.load(tiny_olmoe, host_memory="75%") as loaded:
        yield loaded


def tokens(model: Any, **options: Any) -> list[int]:
    found = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=40, do_sample=False, **options
    )
    return [int(token) for token in found[0]]


@pytest.fixture(scope="module")
def plain(model: Any) -> list[int]:
    return tokens(model)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_tokens_are_the_same(way: str, model: Any, other: Any, plain: list[int]) -> None:
    options = {"prompt_lookup_num_tokens": 7} if way == "prompt lookup" else {"assistant_model": other}
    with govern(model) as governor:
        assert tokens(model, **options) == plain
        assert tokens(model) == plain, "without drafts it is left alone"
    assert "_get_candidate_generator" not in vars(model)
    assert set(governor.promises()) == set(LENGTHS)
    script = Script(4, 1, 8, 1, 1, 2, 3)
    with govern(model, script):
        assert tokens(model, **options) == plain
    assert {length for length, *_ in script.notes} == set(LENGTHS)
    assert all(drafted == 0 for length, drafted, *_ in script.notes if length == 1)
    assert all(drafted < length for length, drafted, *_ in script.notes)
    assert sum(accepted for _, _, accepted in script.notes) > 0


def test_an_assistant_goes_on_from_the_text_as_it_is(
    model: Any, other: Any, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After steps that it was not asked in, and wrong drafts before, it drafts what it would for the whole text."""
    from transformers.generation.candidate_generator import AssistedCandidateGenerator

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = AssistedCandidateGenerator.get_candidates

    def watched(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        found = original(self, input_ids, **kwargs)
        seen.append((input_ids.clone(), found[0].clone()))
        return found

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", watched)
    script = Script(8, 1, 4, 1, 1, 8)
    with govern(model, script):
        assert tokens(model, assistant_model=other) == plain
    monkeypatch.undo()
    assert any(accepted < drafted for _, drafted, accepted in script.notes)
    assert len(seen) > 4
    for text, drafted in seen:
        n_new = drafted.shape[1] - text.shape[1]
        if n_new:
            found = other.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=n_new, do_sample=False)
            assert found.tolist() == drafted.tolist()


def test_a_governor_goes_on_with_what_it_knows(model: Any) -> None:
    script = Script(1, 4)
    counts = []
    for _ in range(2):
        with govern(model, script) as governor:
            assert governor is script
            tokens(model, prompt_lookup_num_tokens=3)
        counts.append(script.promises()[1].seconds)
    assert len(script.notes) > 2
    assert counts[0] != counts[1]


def test_errors_leave_nothing(model: Any) -> None:
    with govern(model), pytest.raises(ConfigError, match="is governed already"), govern(model):
        pass
    with pytest.raises(ValueError, match="mine"), govern(model):
        raise ValueError("mine")
    assert "_get_candidate_generator" not in vars(model)
    with (
        pytest.raises(ConfigError, match=r"Linear has no _get_candidate_generator.*Governor\.choose"),
        govern(torch.nn.Linear(1, 1)),
    ):
        pass
