"""What each step of running an expert takes on a machine, in seconds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moert.errors import ConfigError


@dataclass(frozen=True)
class Curve:
    """Seconds as a function of tokens: straight lines between measured points, the last one going on beyond them."""

    tokens: tuple[int, ...]
    """Ascending, from 1 on."""
    seconds: tuple[float, ...]
    """At those, none less than the one before."""

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.seconds):
            raise ConfigError(f"a cost curve needs as many times as token counts, not {self.seconds} for {self.tokens}")
        if any(b <= a for a, b in zip(self.tokens, self.tokens[1:], strict=False)) or self.tokens[0] < 1:
            raise ConfigError(f"a cost curve's token counts must ascend from 1, not {self.tokens}")
        if not all(math.isfinite(s) and s >= 0 for s in self.seconds):
            raise ConfigError(f"a cost curve's times must be finite and not negative, not {self.seconds}")
        if any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ConfigError(f"more tokens cannot take less time: {self.seconds} for {self.tokens} tokens")

    @classmethod
    def constant(cls, seconds: float) -> Curve:
        """The same for any number of tokens."""
        return cls((1,), (seconds,))

    @classmethod
    def proportional(cls, seconds: float) -> Curve:
        """`seconds` for each token."""
        return cls((1, 2), (seconds, 2 * seconds))

    def __call__(self, tokens: int) -> float:
        """Seconds for so many tokens, at least one."""
        at = min(max(bisect_right(self.tokens, tokens), 1), max(len(self.tokens) - 1, 1))
        if len(self.tokens) == 1 or tokens <= self.tokens[0]:
            return self.seconds[0]
        left, right = self.tokens[at - 1], self.tokens[at]
        slope = (self.seconds[at] - self.seconds[at - 1]) / (right - left)
        return self.seconds[at - 1] + slope * (tokens - left)


@dataclass(frozen=True)
class Costs:
    """The times of one machine for experts of one shape; a time that is not given is none at all."""

    cpu: Curve
    """One expert on the CPU, all of its threads at work on it."""
    device: Curve | None = None
    """One expert on the device; None: there is no device."""
    move_s: float = 0.0
    """One expert from host memory to the device, while nothing else is on that link."""
    read_s: float = 0.0
    """One expert from disk into host memory, while as many are read as the disk likes best."""
    cpu_start_s: float = 0.0
    """Before the first expert that the CPU computes for an event: handing it over."""
    merge_s: float = 0.0
    """After the last one: waiting for it, and adding up what both computed."""
    read_start_s: float = 0.0
    """Before the first byte of an event's reads is there. This and what follows is of machines without a device."""
    miss_start_s: float = 0.0
    """What the CPU takes for an event that misses something, once, while it neither reads nor computes: it goes another
    way than one that finds all."""
    miss_s: float = 0.0
    """The same for each miss: making room, asking for it, and whatever is slower because of it."""
    read_few: int | None = None
    """Events with more reads than so many, as a prompt's, take `read_many_s` for each instead of `read_s`. None: no
    event does. Of those neither of the two before counts: there is enough to do beside them."""
    read_many_s: float = 0.0
    cpu_slowdown: float = 1.0
    """How many times as long the CPU takes while the disk reads."""
    read_slowdown: float = 1.0
    """How many times as long a read takes while the CPU computes."""

    def __post_init__(self) -> None:
        for name in (
            "move_s",
            "read_s",
            "cpu_start_s",
            "merge_s",
            "read_start_s",
            "read_many_s",
            "miss_start_s",
            "miss_s",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value} must be finite and not negative")
        for name in ("cpu_slowdown", "read_slowdown"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 1):
                raise ConfigError(f"{name}={value} must be finite and at least 1")

    def is_many(self, misses: int) -> bool:
        """Whether an event with so many reads takes `read_many_s` for each."""
        return self.read_few is not None and misses > self.read_few

    def each_read_s(self, misses: int) -> float:
        """What each read takes of an event with so many."""
        return self.read_many_s if self.is_many(misses) else self.read_s

    def lead_s(self, misses: int, asked: int | None = None) -> float:
        """Before an event with so many misses reads anything; `asked`: of them, those not asked for before."""
        if not misses or self.is_many(misses):
            return 0.0
        return self.miss_start_s + self.miss_s * (misses if asked is None else asked)

    def cpu_s(self, tokens: int) -> float:
        """One expert on the CPU for so many tokens."""
        return self.cpu_times[tokens]

    def device_s(self, tokens: Sequence[int] | int) -> float:
        """One expert on the device for so many tokens; for several numbers, their mean."""
        if isinstance(tokens, int):
            return self._device_times[tokens]
        return sum(map(self._device_times.__getitem__, tokens)) / len(tokens) if tokens else 0.0

    @cached_property
    def cpu_times(self) -> Mapping[int, float]:
        """`cpu_s` by tokens."""
        return _Times(self.cpu)

    @cached_property
    def _device_times(self) -> _Times:
        assert self.device is not None, "there is no device"
        return _Times(self.device)


class _Times(dict[int, float]):
    """A curve's seconds by tokens, each worked out once."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self._curve = curve

    def __missing__(self, tokens: int) -> float:
        seconds = self[tokens] = self._curve(tokens)
        return seconds
