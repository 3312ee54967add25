"""Predictors that go by picks, against plain recomputations and what can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from moert.predictors._choice import make_predictor
from moert.predictors.base import NO_EXPERT, Model, Need, Predictor

EVERYTHING = frozenset(Need)


def a_model(layers: int = 3, experts: int = 8, top_k: int = 2) -> Model:
    return Model((experts,) * layers, (top_k,) * layers)


def random_picks(tokens: int, model: Model, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[T, L, K] with favourites, and with layers that follow one another."""
    rng = np.random.default_rng(seed)
    liking = rng.dirichlet(np.full(model.num_experts[0], 0.7), size=(4, model.num_layers))
    found = np.empty((tokens, model.num_layers, model.top_k[0]), np.int32)
    kind = 0
    for token in range(tokens):
        kind = kind if rng.random() < 0.7 else int(rng.integers(4))
        for layer in range(model.num_layers):
            chances = liking[kind, layer] * 0.9 + 0.1 / model.num_experts[0]
            found[token, layer] = rng.choice(model.num_experts[0], model.top_k[0], replace=False, p=chances)
    return found


def tell(predictor: Predictor, picks: Any, layers: int | None = None, **known: Any) -> None:
    """One token, its first `layers`."""
    predictor.begin_pass(1, **known)
    for layer, row in enumerate(picks[:layers]):
        predictor.observe(layer, row[None])


def top(scores: Any, n: int) -> list[int]:
    assert scores is not None
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:n]


def test_frequency_is_the_average_that_it_says() -> None:
    model = a_model(1, 4, 1)
    predictor = make_predictor("frequency,alpha=0.25", model, ())
    rates = [0.25] * 4
    for expert in (1, 1, 3, 0, 1):
        predictor.observe(0, np.array([[expert]]))
        rates = [0.75 * rate + 0.25 * (place == expert) for place, rate in enumerate(rates)]
    assert predictor.scores(0, 3) == pytest.approx(rates)
    predictor.begin_pass(3)
    assert predictor.scores(0) == pytest.approx([1 - (1 - rate) ** 3 for rate in rates])


def test_previous_token_goes_back_token_by_token() -> None:
    predictor = make_predictor("previous_token", a_model(1, 8, 2), ())
    assert predictor.scores(0) is None
    for row in ([4, 5], [1, 0], [7, 0]):
        predictor.observe(0, np.array([row]))
    scores = predictor.scores(0, 1)
    assert top(scores, 5) == [7, 0, 1, 4, 5]
    assert scores is not None and [scores[expert] for expert in (2, 3, 6)] == [0, 0, 0]
    predictor.begin_sequence()
    assert predictor.scores(0) is None


def test_previous_token_keeps_its_order_for_ever() -> None:
    predictor = make_predictor("previous_token", a_model(1, 8, 2), ())
    for token in range((1 << 16) + 100):
        predictor.observe(0, np.array([[token % 8, (token + 1) % 8]]))
    last = (1 << 16) + 99
    assert top(predictor.scores(0, 1), 3) == [last % 8, (last + 1) % 8, (last - 1) % 8]


@pytest.mark.parametrize("gap", [1, 2])
def test_set_transition_is_naive_bayes_on_counts(gap: int) -> None:
    model = a_model()
    picks = random_picks(200, model)
    predictor = make_predictor("set_transition,prior=1.5", model, ())
    for token in picks[:-1]:
        tell(predictor, token)
    tell(predictor, picks[-1], layers=1)
    counts, uses, totals = np.zeros((8, 8)), np.full(8, 0.5), np.zeros(8)
    for token in picks[:-1]:
        uses[token[gap]] += 1
        for source in token[0]:
            totals[source] += 1
            counts[source, token[gap]] += 1
    share = uses / len(picks)
    expected = np.log(share)
    for source in picks[-1, 0]:
        expected = expected + np.log((counts[source] + 1.5 * share) / (totals[source] + 1.5) / share)
    scores = predictor.scores(gap)
    assert scores is not None
    assert np.log(scores) - np.log(scores).max() == pytest.approx(expected - expected.max(), abs=1e-4)


def test_activation_matrix_finds_the_sequence_that_is_most_alike() -> None:
    model = a_model(4, 10, 2)
    predictor = make_predictor("activation_matrix,matrices=3", model, ())
    kept: list[Any] = []
    for number in range(7):
        predictor.begin_sequence()
        current = np.zeros((4, 10))
        seen: set[int] = set()
        for token in random_picks(12, model, seed=number % 4 + 10 * (number > 4)):
            predictor.begin_pass(1)
            for layer, row in enumerate(token):
                predictor.observe(layer, row[None])
                current[layer, row] += 1
                seen.add(layer)
                likeness = [sum(cosine(current[i], stored[i]) for i in seen) for stored in kept]
                reference = current if not kept else kept[int(np.argmax(likeness))]
                for later in range(layer + 1, 4):
                    scores = predictor.scores(later)
                    shares = reference[later] / max(1, reference[later].sum())
                    assert scores == pytest.approx(shares * (1 - (later - layer - 1) / 4), abs=1e-5)
        if len(kept) < 3:
            kept.append(current)
        else:
            kept[int(np.argmax(likeness))] = current


def cosine(one: Any, other: Any) -> float:
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else 0.0


def test_expert_map_follows_the_nearest_tokens() -> None:
    model = a_model(4, 10, 2)
    rng = np.random.default_rng(1)
    predictor = make_predictor("expert_map,entries=20,nearest=3", model, ())
    picks = random_picks(60, model)
    weights = rng.random(picks.shape).astype(np.float32)
    kept: list[Any] = []
    for token, own in zip(picks, weights, strict=True):
        predictor.begin_pass(1)
        path = np.zeros((4, 10))
        for layer in range(4):
            predictor.observe(layer, token[layer][None], own[layer][None])
            path[layer, token[layer]] = own[layer] / own[layer].sum()
            likeness = [cosine(path[: layer + 1].ravel(), stored[: layer + 1].ravel()) for stored in kept]
            if len(kept) > 3 and layer < 3:
                order = np.argsort(-np.array(likeness), kind="stable")
                expected = sum((likeness[i] - likeness[order[3]] + 1e-6) * kept[i][layer + 1] for i in order[:3])
                assert predictor.scores(layer + 1) == pytest.approx(expected, abs=1e-5)
        if len(kept) < 20:
            kept.append(path)
        else:
            kept[int(np.argmax(likeness))] = path


def test_the_oracle_knows_and_errs_as_much_as_it_is_told_to() -> None:
    model = a_model(2, 16, 4)
    picks = random_picks(400, model)
    right = make_predictor("oracle", model, EVERYTHING)
    noisy = make_predictor("oracle,accuracy=0.9,accept=0.7", model, EVERYTHING)
    known = hits = 0
    for predictor in (right, noisy):
        predictor.begin_sequence()
        predictor.foresee(picks)
        for token in range(len(picks) - 3):
            predictor.begin_pass(1)
            for layer in range(2):
                scores = predictor.scores(layer, 3)
                assert scores is not None
                named = set(np.flatnonzero(scores).tolist())
                if predictor is right:
                    assert named == set(picks[token + 3, layer].tolist())
                elif named:
                    known += 1
                    assert len(named) == 4
                    hits += len(named & set(picks[token + 3, layer].tolist()))
    assert known / (2 * (len(picks) - 3)) == pytest.approx(0.7**3, abs=0.07)
    assert hits / (4 * known) == pytest.approx(0.9, abs=0.03)


def test_lookup_repeats_what_followed_the_same_tokens() -> None:
    model = a_model(2, 16, 2)
    predictor = make_predictor("lookup", model, EVERYTHING)
    rng = np.random.default_rng(0)
    text = [5, 6, 7, 8, 9, 3, 5, 6]
    picks = [np.stack([rng.permutation(16)[:2] for _ in range(2)]) for _ in text]
    predictor.begin_sequence()
    for token, own in zip(text[:-1], picks[:-1], strict=True):
        tell(predictor, own, token_ids=np.array([token]))
    predictor.begin_pass(1, np.array([text[-1]]))
    assert set(top(predictor.scores(0), 2)) == set(picks[1][0].tolist()), "6 after 5 was here"
    for distance, place in enumerate((2, 3, 4), 1):
        for layer in range(2):
            assert set(top(predictor.scores(layer, distance), 2)) == set(picks[place][layer].tolist())
    predictor.hint(np.array([3, 9]))
    assert set(top(predictor.scores(1, 1), 2)) == set(picks[5][1].tolist()), "the hint counts for more"
    assert set(top(predictor.scores(1, 2), 2)) == set(picks[4][1].tolist())
    assert predictor.scores(1, 3) is None
    predictor.begin_pass(1, np.array([99]))
    assert predictor.scores(0) is None, "this token is new"


def test_lookup_forgets_what_is_too_long_ago() -> None:
    predictor = make_predictor("lookup,memory=16", a_model(1, 8, 2), EVERYTHING)
    tell(predictor, np.array([[1, 2]]), token_ids=np.array([7]))
    for token in range(100, 130):
        tell(predictor, np.array([[3, 4]]), token_ids=np.array([token]))
    predictor.begin_pass(1, np.array([7]))
    assert predictor.scores(0) is None


class PlainJoint:
    """The published rule of `joint`, written out for one layer without anything clever."""

    def __init__(self, experts: int, top_k: int, speed: float, alpha: float) -> None:
        self.weights: dict[tuple[str, int], Any] = {}
        self.sums: dict[tuple[str, int], float] = {}
        self.experts, self.speed, self.alpha = experts, speed, alpha
        self.bias, self.gain = np.zeros(experts), np.ones(experts)
        self.bias_sums, self.gain_sums = np.full(experts, 1e-8), np.full(experts, 1e-8)
        self.rate = np.full(experts, top_k / experts)

    def logits(self, inputs: list[tuple[str, int]]) -> Any:
        total = self.bias + self.gain * np.log(self.rate / (1 - self.rate))
        return total + sum((self.weights.get(one, np.zeros(self.experts)) for one in inputs), np.zeros(self.experts))

    def learn(self, inputs: list[tuple[str, int]], picks: Any) -> None:
        target = np.isin(np.arange(self.experts), picks).astype(float)
        slope = 1 / (1 + np.exp(-self.logits(inputs))) - target
        odds = np.log(self.rate / (1 - self.rate))
        for values, sums, own in ((self.bias, self.bias_sums, slope), (self.gain, self.gain_sums, slope * odds)):
            sums += own**2
            values -= self.speed / 5 * own / np.sqrt(sums)
        for one in inputs:
            self.sums[one] = min(self.sums.get(one, 1e-8) + float((slope**2).mean()), 8.0)
            before = self.weights.get(one, np.zeros(self.experts))
            self.weights[one] = before - self.speed * slope / math.sqrt(self.sums[one])
        self.rate = np.clip(self.rate + self.alpha * (target - self.rate), 1e-3, 1 - 1e-3)


def test_joint_is_the_regression_that_it_says() -> None:
    model = a_model(3, 8, 2)
    picks = random_picks(300, model)
    predictor = make_predictor("joint", model, ())
    plain = PlainJoint(8, 2, 0.1, 0.03)
    before: Any = None
    for token in picks:
        predictor.begin_pass(1)
        for layer in range(2):
            predictor.observe(layer, token[layer][None])
        inputs = [("one", int(i)) for i in token[1]] + [("two", int(i)) for i in token[0]]
        inputs += [] if before is None else [("last", int(i)) for i in before]
        expected = 1 / (1 + np.exp(-plain.logits(inputs)))
        assert predictor.scores(2) == pytest.approx(expected, abs=2e-3)
        predictor.observe(2, token[2][None])
        plain.learn(inputs, token[2])
        before = token[2]


def test_joint_learns_the_same_from_one_pass_as_from_many() -> None:
    model = a_model(3, 8, 2)
    picks = random_picks(40, model)
    one, many = (make_predictor("joint", model, ()) for _ in range(2))
    one.begin_pass(40)
    for layer in range(3):
        one.observe(layer, picks[:, layer])
    for token in picks:
        tell(many, token)
    for predictor in (one, many):
        tell(predictor, random_picks(1, model, seed=3)[0], layers=1)
    for layer, tokens in ((1, 0), (2, 0), (0, 1), (2, 4)):
        assert one.scores(layer, tokens) == pytest.approx(many.scores(layer, tokens), abs=1e-6)


def test_joint_of_several_tokens_is_that_some_token_needs_it() -> None:
    model = a_model(3, 8, 2)
    predictor, single = (make_predictor("joint", model, ()) for _ in range(2))
    for token in random_picks(200, model):
        tell(predictor, token)
        tell(single, token)
    for each in (predictor, single):
        each.begin_sequence()
    rows = random_picks(3, model, seed=9)
    chances = []
    for row in rows:
        tell(single, row, layers=1)
        chances.append(np.array(single.scores(1)))
        single.begin_sequence()
        # What `single` learned from the row it has to be told of is little; `predictor` learns from all three at once.
    predictor.begin_pass(3, rows=3)
    predictor.observe(0, rows[:, 0])
    assert predictor.scores(1) == pytest.approx(1 - np.prod([1 - chance for chance in chances], axis=0), abs=0.02)


def test_joint_counts_tokens_ahead_from_the_pass_that_runs() -> None:
    model = a_model(2, 8, 2)
    predictor = make_predictor("joint", model, ())
    for token in random_picks(300, model):
        tell(predictor, token)
    one, two = (np.array(predictor.scores(1, tokens)) for tokens in (1, 2))
    assert one != pytest.approx(two, abs=1e-3)
    predictor.begin_pass(1)
    assert predictor.scores(1, 1) == pytest.approx(two), "nothing is known yet of the pass that has begun"


def test_joint_learns_a_rule_and_unlearns_it() -> None:
    """Layer 1 chooses what layer 0 chose, moved by 1; later by 3."""
    model = a_model(2, 16, 1)
    predictor = make_predictor("joint", model, ())
    rng = np.random.default_rng(0)
    for move, tokens in ((1, 1200), (3, 4000)):
        right = 0
        for token in range(tokens):
            source = int(rng.integers(16))
            tell(predictor, np.array([[source]]), layers=1)
            right += token >= tokens - 200 and top(predictor.scores(1), 1) == [(source + move) % 16]
            predictor.observe(1, np.array([[(source + move) % 16]]))
        assert right >= 195


def test_sequences_do_not_run_into_one_another() -> None:
    """The token before the first one is nobody's."""
    model = a_model(2, 8, 2)
    one, other = (make_predictor("joint", model, ()) for _ in range(2))
    for predictor in (one, other):
        for token in random_picks(50, model):
            tell(predictor, token)
    one.begin_sequence()
    other.begin_sequence()
    for predictor in (one, other):
        predictor.begin_pass(1)
    assert np.array_equal(one.scores(0), other.scores(0))  # type: ignore[arg-type]
    tell(other, np.full((2, 2), NO_EXPERT, np.int32))
    other.begin_pass(1)
    assert one.scores(0) == pytest.approx(np.array(other.scores(0)), abs=1e-6)
