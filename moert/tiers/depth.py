"""How many reads at once a disk wants: measured while it works, by trying the next depth now and then."""

from __future__ import annotations

import math
import statistics

DEPTHS = (2, 3, 4, 6, 8, 12, 16)
START_DEPTH = 4

PERIOD_S = 0.05
PERIOD_BYTES = 64 << 20
"""A period that is worth comparing has lasted so long, and has read so much."""

UP_GAIN = 0.05
"""What a larger depth must gain: with it a demand waits longer for what is in flight."""

DOWN_LOSS = 0.02
"""What a smaller depth may lose. Far enough below `UP_GAIN` that nothing goes down and up again."""

_MIN_PAIRS = 3
_MAX_PAIRS = 8
_FIRST_REST = 16
_LONGEST_REST = 256


class DepthTuner:
    """Climbs over `DEPTHS` by the bandwidth of one disk.

    It is told of periods in which as many reads were in flight as it had asked for, and says how many it wants next.
    A trial alternates between the depth in use and one beside it, so that whatever else changes the bandwidth meets
    both. No clock, no thread, no lock.
    """

    def __init__(self, depth: int = START_DEPTH) -> None:
        self._home = DEPTHS.index(depth)
        self._step = 1
        self._trial: int | None = None
        self._before: float | None = None
        self._tried = 0.0
        self._gains: list[float] = []
        self._refused = 0
        self._rest = 0
        self._next_rest = _FIRST_REST

    @property
    def depth(self) -> int:
        """The best depth found so far."""
        return DEPTHS[self._home]

    @property
    def asked(self) -> int:
        """The depth to read at now; during a trial sometimes another one than `depth`."""
        return DEPTHS[self._home if self._trial is None else self._trial]

    def observe(self, nbytes: float, seconds: float, lanes: int) -> int:
        """`nbytes` were read in `seconds` with always `lanes` in flight; returns the depth to read at from now on."""
        if lanes != self.asked:
            return self.asked
        rate = math.log(nbytes / seconds)
        if self._trial is not None:
            self._tried = rate
            self._trial = None
        elif self._rest > 0:
            self._rest -= 1
        else:
            self._compare(rate)
        return self.asked

    def _compare(self, rate: float) -> None:
        """Take a period at the depth in use, and decide what the next one is to tell."""
        if self._before is not None:
            # The two periods around the trial: a disk that slowly gets faster or slower favours neither.
            self._gains.append(self._tried - (self._before + rate) / 2)
            verdict = self._verdict()
            if verdict is not None:
                self._settle(verdict)
                return
        neighbour = self._home + self._step
        if not 0 <= neighbour < len(DEPTHS):
            self._settle(False)
            return
        self._before = rate
        self._trial = neighbour

    def _verdict(self) -> bool | None:
        """Whether the depth beside this one is the better one; None while that is not clear."""
        count = len(self._gains)
        if count < _MIN_PAIRS:
            return None
        gain = statistics.mean(self._gains)
        wanted = UP_GAIN if self._step > 0 else -DOWN_LOSS
        doubt = statistics.stdev(self._gains) / math.sqrt(count)
        if abs(gain - wanted) >= 2 * doubt:
            return gain > wanted
        if count < _MAX_PAIRS:
            return None
        # What stays in doubt is not worth a longer wait of the demands.
        return gain > wanted + doubt if self._step > 0 else gain > wanted

    def _settle(self, better: bool) -> None:
        self._before = None
        self._gains = []
        if better:
            self._home += self._step
            self._refused = 0
            self._next_rest = _FIRST_REST
            return
        self._step = -self._step
        self._refused += 1
        if self._refused == 2:
            self._refused = 0
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
