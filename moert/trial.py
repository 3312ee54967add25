"""Whether something that costs time gains more than that: tried in turns with doing without it."""

from __future__ import annotations

import math
import statistics
from collections import deque

BLOCK = 64
"""Tokens before the turns change; what went before still shows in the first of them."""

SETTLING = 8
"""So many of those are not looked at."""

GAIN = 0.01
"""What it must gain to be kept."""

REST = 2048
LONGEST_REST = 16384
"""Tokens until it is tried again; twice as many each time that the answer has been the same."""

COST = 0.005
"""Of the time between two trials, what the worse way may take in the first of them: after a dear one rests are longer.
Half of what is allowed, as trials are not all there is to lose."""

ERRORS = (5, 3, 2.5)
"""A gain nearer to `GAIN` than so many of its standard errors leaves a doubt after the first round of four blocks, the
second and the third, as the first ones hardly tell how large those errors are; with one left after all of them, it
stays as it was."""

FEW = 8
"""So many tokens of a block are enough to end a trial"""

OUTRIGHT = 1.25
"""if they take so many times as long as those before it."""


class Trial:
    """Says for each token whether to do it, and learns from how long the tokens took.

    Two blocks of tokens with it and two without, in the order that makes a steady drift cancel out, and where times
    vary so much that those leave a doubt, as many again, up to three times. Then it is done or not until the next
    trial. Medians are compared, so that a pause of the user, or of the machine, does not decide; and pairs of
    neighbouring blocks, so that neither does a machine that is faster or slower for some blocks. No clock, no thread.
    """

    def __init__(self, *, is_on: bool = True) -> None:
        """Begins with what `is_on` says, and tries it after the first block."""
        self.is_on = is_on
        """Whether to do it for the next token."""
        self._usual = is_on
        self._turns: list[bool] = []
        self._rounds = 0
        """Begun in this trial."""
        self._tokens = 0
        self._until = BLOCK
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._block: list[float] = []
        self._blocks: list[tuple[bool, float]] = []
        """Of the trial: whether with it, and the median."""
        self._before: deque[float] = deque(maxlen=BLOCK)
        """Of the latest tokens outside of trials."""
        self._rest = REST

    @property
    def is_trying(self) -> bool:
        """Whether a trial is under way."""
        return bool(self._turns)

    def note(self, seconds: float) -> None:
        """A token has taken so long, with `is_on` as it was."""
        self._tokens += 1
        if not self._turns:
            self._before.append(seconds)
        elif self._tokens > SETTLING:
            self._times[self.is_on].append(seconds)
            self._block.append(seconds)
            if self._is_outright():
                self._decide(self._usual)
                return
        if self._tokens < self._until:
            return
        self._tokens = 0
        if not self._turns:
            self._turns, self._rounds = [True, False, False, True], 1
            self._times, self._blocks = {True: [], False: []}, []
        else:
            self._turns.pop(0)
            self._blocks.append((self.is_on, statistics.median(self._block)))
            if not self._turns:
                gain, error = self._gain()
                doubtful = abs(gain - GAIN) < ERRORS[self._rounds - 1] * error
                if not doubtful or self._rounds == len(ERRORS):
                    self._decide(self._usual if doubtful else gain >= GAIN)
                    return
                self._turns, self._rounds = [True, False, False, True], self._rounds + 1
        self._block = []
        self.is_on, self._until = self._turns[0], BLOCK

    def _gain(self) -> tuple[float, float]:
        """And its standard error."""
        (with_it, error_with), (without, error_without) = (_median(self._times[way]) for way in (True, False))
        if not with_it or not without:
            return 0.0, 0.0
        ratio = without / with_it
        error = ratio * math.hypot(error_with / with_it, error_without / without)
        return ratio - 1, max(error, self._error_of_pairs())

    def _error_of_pairs(self) -> float:
        """Standard error of the gain, by how it differs from one pair of neighbouring blocks to another."""
        gains = []
        for first, second in zip(self._blocks[::2], self._blocks[1::2], strict=True):
            medians = dict((first, second))
            gains.append(medians[False] / medians[True] if medians[True] else 0.0)
        return statistics.stdev(gains) / math.sqrt(len(gains))

    def _is_outright(self) -> bool:
        """Whether the way that is not the usual one is so much slower that the rest of the trial can be left out."""
        times = self._times[self.is_on]
        if self.is_on == self._usual or len(times) != FEW or not self._before:
            return False
        before = self._times[self._usual] or self._before
        return statistics.median(times) > OUTRIGHT * statistics.median(before)

    def _decide(self, keep: bool) -> None:
        # Where more of a trial's tokens were slow than the rest makes up for, the next one is later.
        worse, better = self._times[not keep], self._times[keep] or list(self._before)
        cost = 0.0
        if worse and better and (typical := statistics.median(better)) > 0:
            cost = (len(worse) + SETTLING * math.ceil(len(worse) / BLOCK)) * (statistics.median(worse) / typical - 1)
        self._rest = min(2 * self._rest, LONGEST_REST) if keep == self._usual else REST
        self._usual = self.is_on = keep
        self._turns, self._block = [], []
        self._tokens = 0
        self._until = max(self._rest, int(min(cost / COST, 1e9)))


def _median(times: list[float]) -> tuple[float, float]:
    """And its standard error, as if times were normally distributed but for a few."""
    median = statistics.median(times)
    deviation = 1.4826 * statistics.median(abs(one - median) for one in times)
    return median, 1.2533 * deviation / math.sqrt(len(times))
