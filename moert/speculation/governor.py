"""How many tokens to run at once where drafts are at hand: what gives most tokens a second, which may be one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from moert.errors import ConfigError
from moert.speculation.curves import Acceptance, Costs

LENGTHS = (1, 2, 3, 4, 8)
"""Tokens of a step that may be chosen: the one that is certain to be wanted, and drafts."""

TRY = 4
"""Steps that a length is tried for."""
GAIN = 0.01
"""Another length must promise so much more to be changed to."""
BUDGET = 0.01
"""Of all time, what tries may be expected to lose."""
ADVANCE = 16
"""Steps of one token; what they take may be lost before."""


class Promise(NamedTuple):
    """What steps of one length are expected to give."""

    tokens: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """What is to be as large as possible."""
        return self.tokens / self.seconds


class Governor:
    """Chooses for each step of speculative decoding how many tokens it runs, drafts included.

    A step of n tokens gives 1 to n of them: the drafts up to the first wrong one, and one more. It costs more than a
    step of one, for it needs the union of its tokens' experts, of which more are missing. Chosen is the n that
    maximises expected tokens / expected seconds, as MoE-SpeQ's governor does for its draft model; unlike there nothing
    is assumed of the machine: how often the i-th draft is accepted after those before it and how long a step takes are
    both measured, and what has not been tried is extrapolated along the curve of the union. 1, no speculation, is a
    choice like any other.

    Call `choose`, run the step, call `note`. No clock, no thread.
    """

    def __init__(self, num_experts: int = 0, top_k: int = 0) -> None:
        """Of a model of E `num_experts` a layer, `top_k` of them picked; 0: unknown, so steps cost what tokens do.

        Raises:
            ConfigError: there are no such models.
        """
        if num_experts < 0 or not 0 <= top_k <= num_experts or (num_experts > 0) != (top_k > 0):
            raise ConfigError(f"there are no {top_k} experts to pick of {num_experts}")
        self.length = 1
        """What was chosen last."""
        self._usual: int | None = None
        """What is chosen when nothing is being tried."""
        self._acceptance = Acceptance(LENGTHS[-1] - 1)
        self._costs = Costs(LENGTHS[-1], num_experts, top_k)
        self._tries: list[int] = []
        """Lengths of the next steps."""
        self._all_s = 0.0
        self._lost_s = 0.0
        """What tries were expected to lose."""

    def choose(self, most: int = LENGTHS[-1]) -> int:
        """The tokens of the next step, from `LENGTHS`, at most `most`, which counts the one that is no draft.

        Raises:
            ConfigError: `most` is less than 1.
        """
        if most < 1:
            raise ConfigError(f"a step of at most {most} tokens gives none")
        lengths = [n for n in LENGTHS if n <= most]
        while self._tries and self._tries[0] > most:
            self._tries.pop(0)
        if not self._tries:
            self._plan(lengths)
        if self._tries:
            self.length = self._tries.pop(0)
        else:
            assert self._usual is not None
            self.length = max(n for n in lengths if n <= max(1, self._usual))
        return self.length

    def note(self, drafted: int, accepted: int, seconds: float) -> None:
        """The step is over.

        Args:
            drafted: drafts that were run with the certain token, fewer than were chosen where no more were found.
            accepted: of them, those that were right; the step has given one token more.
            seconds: that it took, drafting included.

        Raises:
            ConfigError: numbers that cannot be.
        """
        if drafted < 0 or not 0 <= accepted <= drafted:
            raise ConfigError(f"of {drafted} drafts {accepted} cannot have been accepted")
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"no step took {seconds} s")
        self._acceptance.note(drafted, accepted, was_asked=self.length > 1)
        self._all_s += seconds
        self._costs.note(min(1 + drafted, LENGTHS[-1]), seconds)

    def promises(self) -> Mapping[int, Promise]:
        """Of each length, for reports; empty until a step has been measured."""
        return {n: self._promise(n) for n in LENGTHS} if self._costs.is_known else {}

    def _plan(self, lengths: list[int]) -> None:
        """Decide what is chosen from now on, and what is tried first."""
        for n in (1, 2):
            # Both have to be known for any guess at the others.
            if n in lengths and self._n_noted(n) < TRY:
                self._tries = [n]
                return
        promises = {n: self._promise(n) for n in lengths}
        best = max(lengths, key=lambda n: promises[n].tokens_per_s)
        usual = self._usual if self._usual in lengths else best
        if promises[best].tokens_per_s > promises[usual].tokens_per_s * (1 + GAIN):
            usual = best
        self._usual = usual
        tried = self._most_hopeful(lengths, promises[usual].tokens_per_s)
        if tried is None:
            return
        lost_s = TRY * max(0.0, promises[tried].seconds - promises[tried].tokens / promises[usual].tokens_per_s)
        if self._lost_s + lost_s <= BUDGET * self._all_s + ADVANCE * self._costs.seconds(1):
            self._lost_s += lost_s
            self._tries = [tried] * TRY

    def _most_hopeful(self, lengths: list[int], usual: float) -> int | None:
        """The length that may well be better than the usual one's tokens a second, for what little is known of it."""
        rates = {n: self._promise(n, at_best=True).tokens_per_s for n in lengths if n != self._usual}
        found = max(rates, key=lambda n: rates[n], default=None)
        if found is not None and rates[found] > usual:
            return found
        # After one token nothing is learned of drafts.
        return 2 if self._usual == 1 and 2 in lengths else None

    def _n_noted(self, n: int) -> int:
        """Steps of that length, or for 2 those that were to be so long."""
        return self._costs.count(1) if n == 1 else self._acceptance.n_asked

    def _promise(self, n: int, *, at_best: bool = False) -> Promise:
        """`at_best`: what little is known of is taken to be as good as it may well be."""
        one = self._costs.seconds(1, at_best=at_best and n == 1)
        if n == 1:
            return Promise(1.0, one)
        found = self._acceptance.chance_of_drafts
        tokens = 1 + found * self._acceptance.expected(n - 1, at_best=at_best)
        return Promise(tokens, (1 - found) * one + found * self._costs.seconds(n, at_best=at_best))
