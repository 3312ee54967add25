"""How long tokens take while a model decodes, and what its caches do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

PAUSE_S = 1.0
"""A step that took longer than this and than ten others was one of the user's."""


@dataclass(frozen=True)
class Decoding:
    """Steps of one token, each from its first layer to that of the next; prompts are not in it."""

    tokens: int = 0
    """Those whose next one has begun, so that it is known how long they took."""
    seconds: float = 0.0
    """They took."""
    steps: int = 0
    """All tokens; the counts below are of these."""
    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0
    compute_s: float = 0.0
    bytes_read: int = 0
    """What nobody waited for too."""
    repeated: int = 0
    """Steps that a GPU ran by itself, and the host once more, as an expert that they needed was on disk."""

    @property
    def tokens_per_s(self) -> float:
        """0.0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0


Sums = tuple[int, int, float, float, int]
"""Hits, misses, stall_s, compute_s and bytes_read of all layers so far."""


class Pace:
    """Told of each forward pass; looks at the layers' counts only where decoding begins and ends."""

    def __init__(self, sums: Callable[[], Sums], clock: Callable[[], float] = perf_counter) -> None:
        self._sums = sums
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """From here on."""
        self._tokens = self._steps = self._repeated = 0
        self._seconds = 0.0
        self._done: Sums = (0, 0, 0.0, 0.0, 0)
        self._base: Sums | None = None
        self._last = 0.0

    def begin(self, tokens: int) -> None:
        """The first layer's step begins, with so many tokens."""
        now = self._clock()
        if tokens == 1:
            self._steps += 1
            if self._base is None:
                self._base = self._sums()
            else:
                seconds = now - self._last
                if seconds < PAUSE_S or seconds * self._tokens < 10 * self._seconds:
                    self._tokens += 1
                    self._seconds += seconds
        elif self._base is not None:
            self._done, self._base = self._now(), None
        self._last = now

    def repeat(self, is_repeated: bool = True) -> None:
        """Whether the pass that began last has to be run once more."""
        self._repeated += is_repeated

    def _now(self) -> Sums:
        """The counts of all decoding so far."""
        if self._base is None:
            return self._done
        hits, misses, stall_s, compute_s, bytes_read = (
            done + now - before for done, now, before in zip(self._done, self._sums(), self._base, strict=True)
        )
        return int(hits), int(misses), stall_s, compute_s, int(bytes_read)

    def decoding(self) -> Decoding:
        """What there has been since `reset`."""
        return Decoding(self._tokens, self._seconds, self._steps, *self._now(), self._repeated)
