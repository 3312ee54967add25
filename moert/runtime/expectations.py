"""How often what is expected, and not resident, is needed then."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from moert.predictors.base import Prediction
from moert.types import ExpertId

START = 0.5
"""Chance of what has not been seen yet."""

SHARE = 1 / 32
"""Of the latest step in what is known."""

LEVELS = 8
"""Probabilities are told apart by so many steps."""


def keys_of(prediction: Prediction) -> list[int]:
    """What tells a prediction's experts apart: their ranks, or levels of probability."""
    if prediction.probabilities is None:
        return prediction.ranks
    return [-1 - min(LEVELS - 1, int(LEVELS * chance)) for chance in prediction.probabilities]


class Expectations:
    """Learns what a predictor's words are worth, for each layer and each of its looks at it apart.

    Ranks are what is told apart, or levels of probability where the predictor knows them: those it gives are of all
    experts, and the ones that are not resident are needed less often.
    """

    def __init__(self) -> None:
        self._chances: dict[tuple[int, Hashable], dict[int, float]] = {}
        self._open: dict[int, dict[Hashable, dict[ExpertId, int]]] = {}
        """Layer -> look -> the experts expected there next that were not resident, and their keys."""

    def expect(self, layer: int, look: Hashable, told: dict[ExpertId, int]) -> dict[ExpertId, float]:
        """The chances that these are needed: experts of `layer` that are not resident, each with its key."""
        self._open.setdefault(layer, {})[look] = told
        chances = self._chances.setdefault((layer, look), {})
        return {expert: chances.get(key, START) for expert, key in told.items()}

    def begin(self, layer: int, needed: Collection[ExpertId]) -> set[ExpertId]:
        """A step of `layer` needs these: learn from it. Those that were expected and are not needed."""
        wrong: set[ExpertId] = set()
        for look, told in self._open.pop(layer, {}).items():
            chances = self._chances[layer, look]
            for expert, key in told.items():
                chance = chances.get(key, START)
                chances[key] = chance + SHARE * ((expert in needed) - chance)
                if expert not in needed:
                    wrong.add(expert)
        return wrong

    def forget(self) -> None:
        """The coming steps, of which nothing is to be learned."""
        self._open = {}

    def expected(self, layer: int) -> set[ExpertId]:
        """What all looks at the coming step of `layer` have named, of what was not resident then."""
        return {expert for told in self._open.get(layer, {}).values() for expert in told}
