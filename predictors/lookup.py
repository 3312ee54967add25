"""Tokens that are expected, and what they chose when they came up before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moert.predictors._checks import check_from_to
from moert.predictors._context import MOST_ROWS, Context
from moert.predictors.base import MOST_TOKENS, NO_EXPERT, Floats, Ints, Model, Need, Predictor

LONGEST = 3
"""Tokens that are compared, at most."""

SHARE = 1 / 64
"""Of the latest pass in what is known of how often a place repeats itself."""


class _Match(NamedTuple):
    place: int
    """The number of the token there."""
    length: int
    """Tokens that are the same, that one among them."""


class Lookup(Predictor):
    """Looks tokens up in what has run: a token that was here before, after the same tokens, chose such experts.

    The tokens ahead are those of `hint`: a draft, what an extra head predicts, or the rest of a prompt. Where there is
    no hint they are guessed as prompt-lookup decoding does (Saxena 2023): the last tokens are looked for in the text so
    far, and what followed there is expected here. The last `memory` tokens are kept, with their picks; the
    longest match of at most three tokens counts, of several the latest. How often the picks of such a place come
    again is measured for each length of match and distance, and makes the probabilities; what is left of them goes
    to what is chosen often.

    Only the first sequence of a batch is looked up.
    """

    needs = frozenset({Need.TOKEN_IDS})
    gives_probabilities = True

    def __init__(self, model: Model, memory: int = 4096, alpha: float = 0.03) -> None:
        """A predictor that keeps L times K ids of 2 bytes for each of `memory` tokens.

        Raises:
            ConfigError: a parameter is out of range.
        """
        super().__init__(model)
        self._memory = check_from_to("lookup", "memory", memory, 16, 1 << 24)
        self._alpha = np.float32(check_from_to("lookup", "alpha", alpha, 1e-6, 1.0))
        self._context = Context(model)
        width = max(model.top_k, default=1)
        self._ids = np.full(self._memory, -1, np.int64)
        self._picks = np.full((self._memory, model.num_layers, width), NO_EXPERT, np.int16)
        self._rates = [
            np.full(e, k / max(1, e), np.float32) for e, k in zip(model.num_experts, model.top_k, strict=True)
        ]
        self._count = 0
        """Tokens that have begun, ever; token i is kept at i modulo `memory`."""
        self._first = 0
        """Of them, the first of this sequence: a match may not go beyond it."""
        self._begin = 0
        """The first of this pass."""
        self._places: dict[tuple[int, ...], int] = {}
        """Up to three tokens in a row -> where the latest such row ends, before this pass."""
        self._tails: list[tuple[int, tuple[int, ...]]] = [(-1, ())] * self._memory
        """Of each token that is kept, its number and the row of tokens that ends with it."""
        self._hint: list[int] = []
        self._worth = np.full(LONGEST + 1, 0.5)
        """By the length of a match, the share of its picks that come again, beyond what comes anyway."""
        self._chance = np.array([1.0] + [0.5] * MOST_TOKENS)
        """By distance, the share of expected tokens that come."""
        self._guesses: dict[int, list[tuple[int, int]]] = {}
        """Token by number -> how far ahead it was expected to be which."""
        self._expected: dict[int, list[_Match]] = {}
        """Distance -> the places whose picks are expected then: one for each token of that pass."""

    def begin_sequence(self) -> None:
        self._context.begin_sequence()
        self._note_places()
        self._first = self._begin = self._count
        self._hint = []
        self._guesses = {}
        self._expected = {}

    def begin_pass(self, n_tokens: int, token_ids: Ints | None = None, rows: int = 1) -> None:
        self._context.begin_pass(n_tokens, rows)
        self._note_places()
        self._begin = self._count
        self._hint = []
        for token in [] if token_ids is None else token_ids[: len(token_ids) // max(1, rows)].tolist():
            place = self._count % self._memory
            self._ids[place] = token
            self._picks[place] = NO_EXPERT
            self._count += 1
        self._judge_tokens(self._begin)
        self._expect()

    def hint(self, token_ids: Ints) -> None:
        self._hint = token_ids[:MOST_TOKENS].tolist()
        for number in [number for number in self._guesses if number >= self._count]:
            self._guesses[number] = [guess for guess in self._guesses[number] if guess[0] != number - self._count + 1]
        self._expect()

    def observe(self, layer: int, experts: Ints, weights: Floats | None = None) -> None:
        now = self._context.observe(layer, experts)
        of_first = now[: len(now) // self._context.rows]
        n = min(len(of_first), self._count - self._begin)
        for token in range(n):
            row = of_first[len(of_first) - n + token]
            self._picks[(self._count - n + token) % self._memory, layer, : len(row)] = row
        rates = self._rates[layer]
        for row in of_first:
            kept = row[row >= 0]
            if len(kept):
                rates *= 1 - self._alpha
                rates[kept] += self._alpha
        if self._count - self._begin == 1 and 0 in self._expected:
            self._judge(layer, self._expected[0][0])

    def scores(self, layer: int, tokens: int = 0) -> Floats | None:
        experts = self.model.num_experts[layer]
        missing: Floats | None = None
        for match in self._expected.get(tokens, ()) if experts else ():
            picks = self._picks_at(match.place, layer)
            if len(picks):
                worth = np.float32(self._worth[match.length] * self._chance[tokens])
                missed = 1 - np.minimum(self._rates[layer], 1) * (1 - worth)
                missed[picks] -= worth
                missing = missed if missing is None else missing * missed
        return None if missing is None else np.clip(1 - missing, 0, 1)

    def _picks_at(self, place: int, layer: int) -> Ints:
        """What the token there chose, as far as it is kept."""
        if self._count - place > self._memory:
            return self._picks[0, layer, :0]
        picks = self._picks[place % self._memory, layer]
        return picks[picks >= 0]

    def _judge(self, layer: int, match: _Match) -> None:
        """Learn from what the one token of this pass has chosen how good the picks of a match are."""
        before, now = self._picks_at(match.place, layer), self._picks_at(self._count - 1, layer)
        if not len(before) or not len(now):
            return
        rate = float(self._rates[layer][before].mean())
        hit = float(np.isin(before, now, assume_unique=True).mean())
        if rate < 1:
            gained = min(max((hit - rate) / (1 - rate), 0.0), 1.0)
            self._worth[match.length] += SHARE * (gained - self._worth[match.length])

    def _judge_tokens(self, begin: int) -> None:
        """Learn how often the tokens that were expected come."""
        for number in [number for number in self._guesses if number < self._count]:
            for distance, token in self._guesses.pop(number):
                if number >= begin:
                    right = token == int(self._ids[number % self._memory])
                    self._chance[distance] += SHARE * (right - self._chance[distance])

    def _expect(self) -> None:
        """Find the places whose picks this pass's tokens will repeat, and those after them."""
        self._expected = {}
        n = self._count - self._begin
        if not n:
            return
        matches = [self._find(self._tail(number + 1)) for number in range(self._count - min(n, MOST_ROWS), self._count)]
        if found := [match for match in matches if match is not None]:
            self._expected[0] = found
        ahead = self._hint
        latest = matches[-1]
        if not ahead and latest is not None and latest.length > 1:
            ahead = self._continuation(latest.place)
        tail = self._tail(self._count)
        for distance, token in enumerate(ahead, 1):
            tail = (*tail, token)[-LONGEST:]
            self._guesses.setdefault(self._count - 1 + distance, []).append((distance, token))
            match = self._find(tail)
            if match is not None:
                self._expected[distance] = [match]

    def _continuation(self, place: int) -> list[int]:
        """The tokens that followed a place."""
        end = min(place + MOST_TOKENS, self._count - 1)
        return [int(self._ids[later % self._memory]) for later in range(place + 1, end + 1)]

    def _find(self, tail: tuple[int, ...]) -> _Match | None:
        for length in range(len(tail), 0, -1):
            place = self._places.get(tail[-length:])
            if place is not None and self._count - place < self._memory:
                return _Match(place, length)
        return None

    def _tail(self, count: int) -> tuple[int, ...]:
        """The last tokens of this sequence, when it has `count` of those that have begun."""
        begin = max(self._first, count - LONGEST, self._count - self._memory)
        return tuple(int(self._ids[i % self._memory]) for i in range(begin, count))

    def _note_places(self) -> None:
        """The tokens of this pass are over, and may be found."""
        for end in range(max(self._begin, self._count - self._memory + LONGEST), self._count):
            tail = self._tail(end + 1)
            self._forget(end % self._memory)
            for length in range(1, len(tail) + 1):
                self._places[tail[-length:]] = end
            self._tails[end % self._memory] = (end, tail)

    def _forget(self, slot: int) -> None:
        """What was kept there is overwritten: it is not to be found any more."""
        before, tail = self._tails[slot]
        for length in range(1, len(tail) + 1):
            if self._places.get(tail[-length:]) == before:
                del self._places[tail[-length:]]
