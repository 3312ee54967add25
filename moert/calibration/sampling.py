"""One quantity, sampled until it is steady or has been tried often enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from moert.errors import ConfigError

Key = TypeVar("Key", bound=Hashable)

REPEATS = 7
ROUNDS = 2
"""So many times as many samples at most, while they disagree; all is measured again later in any case
(`moert.calibration.repeating`)."""

SPREAD = 0.2
"""Samples whose middle half lies within this share of their median agree."""


@dataclass(frozen=True)
class Measured:
    """Seconds, and between which of them others would be."""

    seconds: float
    low: float
    high: float
    repeats: int = 1
    is_steady: bool = True
    """Whether samples agreed; else the machine was busy, and `low` and `high` hold nearly all of them."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(s) and s >= 0 for s in (self.seconds, self.low, self.high)):
            raise ConfigError(f"a measured time must be finite and not negative, not {self}")
        if not self.low <= self.seconds <= self.high or self.repeats < 1:
            raise ConfigError(f"a measured time must lie within its interval and come of some samples, not {self}")

    @classmethod
    def exactly(cls, seconds: float) -> Measured:
        """Without any doubt, as what follows from other numbers."""
        return cls(seconds, seconds, seconds)


def sampled(sample: Callable[[], float], repeats: int = REPEATS, rounds: int = ROUNDS) -> Measured:
    """The median of what `sample` returns, in seconds; blocks for as often as that takes.

    After `repeats` samples whose middle half is within a fifth of their median it is done; else as many follow, up to
    `rounds` times, and the interval becomes that of nearly all samples instead of the middle half.

    Raises:
        ConfigError: a sample is negative or no number.
    """
    return sampled_together(lambda: {"": sample()}, repeats, rounds)[""]


def sampled_together(
    turn: Callable[[], Mapping[Key, float]], repeats: int = REPEATS, rounds: int = ROUNDS
) -> dict[Key, Measured]:
    """Several quantities by turns that give one sample of each; until all of them agree, as `sampled` has it.

    Raises:
        ConfigError: as `sampled`.
    """
    found: dict[Key, list[float]] = {}
    for _ in range(rounds):
        for _ in range(repeats):
            for key, seconds in turn().items():
                if not (math.isfinite(seconds) and seconds >= 0):
                    raise ConfigError(f"a time was measured as {seconds} s: the clock is broken")
                found.setdefault(key, []).append(seconds)
        measured = {key: _measured(samples) for key, samples in found.items()}
        if all(one.is_steady for one in measured.values()):
            break
    return measured


def _measured(samples: list[float]) -> Measured:
    low, middle, high = _quantiles(samples, 0.25)
    if high - low <= SPREAD * middle:
        return Measured(middle, low, high, len(samples))
    low, middle, high = _quantiles(samples, 0.05)
    return Measured(middle, low, high, len(samples), is_steady=False)


def _quantiles(found: list[float], share: float) -> tuple[float, float, float]:
    ordered = sorted(found)
    aside = int(share * len(ordered))
    return ordered[aside], statistics.median(ordered), ordered[-1 - aside]
