"""Whether something that costs time gains more than that: tried in turns with doing without it."""

from __future__ import annotations

import statistics

BLOCK = 64
"""Tokens before the turns change; what went before still shows in the first of them."""

SETTLING = 8
"""So many of those are not looked at."""

GAIN = 0.01
"""What it must gain to be kept."""

CLEAR = 0.08
"""A gain or loss of this size needs no second look."""

REST = 2048
LONGEST_REST = 16384
"""Tokens until it is tried again; twice as many each time that the answer has been the same."""


class Trial:
    """Says for each token whether to do it, and learns from how long the tokens took.

    Two blocks of tokens with it and two without, in the order that makes a steady drift cancel out; if the first two
    leave no doubt, only those. Then it is done or not until the next trial. Medians are compared, so that a pause of
    the user, or of the machine, does not decide. No clock, no thread.
    """

    def __init__(self, *, is_on: bool = True) -> None:
        """Begins with what `is_on` says, and tries it after the first block."""
        self.is_on = is_on
        """Whether to do it for the next token."""
        self._usual = is_on
        self._turns: list[bool] = []
        self._tokens = 0
        self._until = BLOCK
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._rest = REST

    @property
    def is_trying(self) -> bool:
        """Whether a trial is under way."""
        return bool(self._turns)

    def note(self, seconds: float) -> None:
        """A token has taken so long, with `is_on` as it was."""
        self._tokens += 1
        if self._turns and self._tokens > SETTLING:
            self._times[self.is_on].append(seconds)
        if self._tokens < self._until:
            return
        self._tokens = 0
        if not self._turns:
            self._turns = [True, False, False, True]
            self._times = {True: [], False: []}
        else:
            self._turns.pop(0)
            gain = self._gain()
            if not self._turns or (len(self._turns) == 2 and gain is not None and abs(gain) >= CLEAR):
                assert gain is not None
                self._decide(gain >= GAIN)
                return
        self.is_on, self._until = self._turns[0], BLOCK

    def _gain(self) -> float | None:
        if not all(self._times.values()):
            return None
        with_it, without = statistics.median(self._times[True]), statistics.median(self._times[False])
        return without / with_it - 1 if with_it > 0 else 0.0

    def _decide(self, keep: bool) -> None:
        self._rest = min(2 * self._rest, LONGEST_REST) if keep == self._usual else REST
        self._usual = self.is_on = keep
        self._turns = []
        self._until = self._rest
