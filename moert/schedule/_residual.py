"""How far off a predicted time is, learned while it is used."""

from __future__ import annotations

import math

from moert.errors import ConfigError

SHARE = 1 / 16
"""Of the latest observation in what is known."""

MOST = 4.0
"""A prediction is corrected up to this factor, either way: what is further off is no drift but another machine."""


class Residual:
    """Corrects predictions of one quantity by what was measured of it lately; a factor, bounded. No clock."""

    def __init__(self, share: float = SHARE, most: float = MOST) -> None:
        """
        Raises:
            ConfigError: `share` is not above 0 and at most 1, or `most` below 1.
        """
        if not 0 < share <= 1 or not most >= 1 or math.isinf(most):
            raise ConfigError(f"share={share} must be above 0 and at most 1, most={most} finite and at least 1")
        self._share = share
        self._bound = math.log(most)
        self._log = 0.0
        self._weight = 0.0
        self.seen = 0
        """Observations so far."""

    @property
    def factor(self) -> float:
        """What predictions are to be multiplied with; 1 as long as nothing is known."""
        return math.exp(self._log / self._weight) if self._weight else 1.0

    def note(self, predicted_s: float, measured_s: float) -> None:
        """What was predicted, without this correction, has taken so long. Times of nothing say nothing.

        The mean is over logarithms and forgets, with full weight from the first observation on; each counts as no more
        than the bound, so that a pause of the machine changes little.

        Raises:
            ConfigError: a time is negative or no number.
        """
        if not all(math.isfinite(s) and s >= 0 for s in (predicted_s, measured_s)):
            raise ConfigError(f"a prediction of {predicted_s} s and a measurement of {measured_s} s say nothing")
        if not predicted_s or not measured_s:
            return
        ratio = min(max(math.log(measured_s / predicted_s), -self._bound), self._bound)
        self._log += self._share * (ratio - self._log)
        self._weight += self._share * (1 - self._weight)
        self.seen += 1

    def __call__(self, predicted_s: float) -> float:
        """A prediction, corrected."""
        return predicted_s * self.factor
