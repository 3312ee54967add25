"""What is measured of speculative steps: how many drafts are right, and how long steps take."""

from __future__ import annotations

import math

MEMORY = 256
"""Drafts at one place that count: those before are forgotten."""
PRIOR = 2.0
"""A place that has seen few drafts counts as having seen so many more, which went as at the place before."""
FADING = 1 / 512
"""What is forgotten of a place in a step that says nothing of it."""

COST_MEMORY = 128
"""Steps of one length that count."""
DOUBT, COST_DOUBT = 0.5, 0.3
"""How far an average of one may be off: a share of drafts by the first, seconds by this share of them."""
GUESS = 0.5
"""What the other lengths tell of one counts as this share of a step of it."""
OUTLIER = 4.0
"""A step that took so many times as long as usual is taken to be so long: something else has run."""


class Acceptance:
    """How often drafts are right, by their place: that of the i-th, given that those before it were."""

    def __init__(self, places: int) -> None:
        self._right = [0.0] * places
        self._seen = [0.0] * places
        self._found = 1.0
        self.n_asked = 0
        """Steps that were to have drafts."""

    def note(self, drafted: int, accepted: int, *, was_asked: bool) -> None:
        """Of so many drafts the first `accepted` were right; `was_asked`: drafts were looked for."""
        if was_asked:
            self.n_asked += 1
            self._found += ((drafted > 0) - self._found) / min(self.n_asked, MEMORY)
        known = min(drafted, accepted + 1, len(self._seen))
        for place in range(len(self._seen)):
            if place < known:
                is_right = place < accepted
                self._right[place] += is_right - self._right[place] / MEMORY
                self._seen[place] += 1 - self._seen[place] / MEMORY
            else:
                self._right[place] *= 1 - FADING
                self._seen[place] *= 1 - FADING

    @property
    def chance_of_drafts(self) -> float:
        """That any are found when they are looked for."""
        return self._found

    def expected(self, drafts: int, *, at_best: bool = False) -> float:
        """So many drafts are right on average, of `drafts`; `at_best`: as many as may well be, for what is known."""
        total, chance, share = 0.0, 1.0, 0.5
        for right, seen in zip(self._right[:drafts], self._seen[:drafts], strict=True):
            share = (right + PRIOR * share) / (seen + PRIOR)
            chance *= min(1.0, share + DOUBT / math.sqrt(1 + seen)) if at_best else share
            total += chance
        return total


class Costs:
    """How long steps of n tokens take: their average, or from the curve of the union where n has not been tried."""

    def __init__(self, most: int, num_experts: int, top_k: int) -> None:
        self._seconds = [0.0] * (most + 1)
        self._counts = [0] * (most + 1)
        self._weights = [0.0] * (most + 1)
        """Of each length's average: the steps in it, and less the longer they are ago."""
        self._growth = [0.0, *(union_growth(n, num_experts, top_k) for n in range(1, most + 1))]

    @property
    def is_known(self) -> bool:
        """Whether any step has been measured."""
        return any(self._counts)

    def count(self, n: int) -> int:
        """Steps of n tokens that have been measured."""
        return self._counts[n]

    def note(self, n: int, seconds: float) -> None:
        """A step of n tokens took so long."""
        usual = self._seconds[n]
        if self._counts[n] >= 2:
            seconds = min(seconds, OUTLIER * usual)
        self._counts[n] += 1
        self._weights = [weight * (1 - FADING) for weight in self._weights]
        self._weights[n] = min(self._weights[n] + 1, COST_MEMORY)
        self._seconds[n] += (seconds - usual) / self._weights[n]

    def seconds(self, n: int, *, at_best: bool = False) -> float:
        """Of a step of n tokens, above 0; `at_best`: as few as may well be, for what is known."""
        weight = self._weights[n]
        found = (weight * self._seconds[n] + GUESS * self._guess(n)) / (weight + GUESS)
        if at_best:
            found *= 1 - COST_DOUBT / math.sqrt(1 + weight)
        return max(found, 1e-9)

    def _guess(self, n: int) -> float:
        """A fixed part, and one that grows as the union does; fitted to the other lengths that were measured.

        How alike the picks of neighbours are, and how many of the experts are missing, is in the slope.
        """
        known = [
            (1 + self._growth[m], self._seconds[m], self._weights[m])
            for m in range(1, len(self._counts))
            if self._counts[m] and m != n
        ]
        union = 1 + self._growth[n]
        if not known:
            return self._seconds[n] if self._counts[n] else union
        total = sum(weight for _, _, weight in known)
        x = sum(weight * w for w, _, weight in known) / total
        y = sum(weight * s for _, s, weight in known) / total
        square = sum(weight * (w - x) ** 2 for w, _, weight in known)
        if square < 1e-6 * total:
            return y * union / x
        slope = sum(weight * (w - x) * (s - y) for w, s, weight in known) / square
        slope = min(max(slope, 0.0), y / x)
        return y + slope * (union - x)


def union_growth(n: int, num_experts: int, top_k: int) -> float:
    """By how much n tokens need more experts than one, in units of one token's, if each drew its picks anew."""
    if not num_experts:
        return n - 1.0
    return float(num_experts * (1 - (1 - top_k / num_experts) ** n) / top_k - 1)
