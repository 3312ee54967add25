"""What a recording says will come, with as many errors as asked for."""

from __future__ import annotations

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors.base import MOST_TOKENS, Floats, Ints, Model, Need, Predictor


class Oracle(Predictor):
    """Knows the picks of the tokens to come: the bound of what any predictor can gain, and the model of a draft.

    With `accept` below 1, a token ahead is known only if the one before it is, and then with that probability, as the
    tokens of a draft are; with `accuracy` below 1, each pick is another expert with the probability that is missing.
    What is wrong is drawn from `seed`, and is the same however often it is asked for.
    """

    needs = frozenset({Need.FUTURE})
    gives_probabilities = True

    def __init__(self, model: Model, accept: float = 1.0, accuracy: float = 1.0, seed: int = 0) -> None:
        """A predictor for recordings.

        Raises:
            ConfigError: a parameter is out of range.
        """
        super().__init__(model)
        self._accept = check_from_to("oracle", "accept", accept, 0.0, 1.0)
        self._accuracy = check_from_to("oracle", "accuracy", accuracy, 0.0, 1.0)
        self._seed = check_from_to("oracle", "seed", seed, 0, 2**31)
        self._sequence: Ints = np.zeros((0, model.num_layers, 1), np.int32)
        self._sequences = 0
        self._next = 0
        self._n_tokens = 0

    def begin_sequence(self) -> None:
        self._sequence = self._sequence[:0]
        self._sequences += 1
        self._next = self._n_tokens = 0

    def foresee(self, sequence: Ints) -> None:
        self._sequence = sequence

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._next += self._n_tokens
        self._n_tokens = n_tokens

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        experts = self.model.num_experts[layer]
        if not 0 <= tokens <= MOST_TOKENS or not experts:
            return None
        begin, n = (self._next, self._n_tokens) if tokens == 0 else (self._next + self._n_tokens + tokens - 1, 1)
        missing = np.ones(experts, np.float32)
        for token in range(begin, min(begin + n, len(self._sequence))):
            if self._is_known(tokens):
                for pick in self._picks(token, layer):
                    missing[pick] *= 1 - np.float32(self._accuracy)
        scores: Floats = 1 - missing
        return scores if self._accuracy > 0 else np.zeros(experts, np.float32)

    def _is_known(self, tokens: int) -> bool:
        """Whether a draft at this place in the sequence has its first `tokens` right."""
        if self._accept == 1 or tokens == 0:
            return True
        draw = self._draw(self._next + self._n_tokens, -1)
        return bool((draw.random(tokens) < self._accept).all())

    def _picks(self, token: int, layer: int) -> list[int]:
        """Of one token, some of them wrong; none twice."""
        true = [int(pick) for pick in self._sequence[token, layer] if 0 <= pick < self.model.num_experts[layer]]
        if self._accuracy == 1:
            return true
        draw = self._draw(token, layer)
        others = np.setdiff1d(np.arange(self.model.num_experts[layer]), true)
        draw.shuffle(others)
        wrong = iter(others.tolist())
        return [
            pick if right else next(wrong, pick)
            for pick, right in zip(true, draw.random(len(true)) < self._accuracy, strict=True)
        ]

    def _draw(self, token: int, layer: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._sequences, token, layer + 1))
