"""A piece of a simulated device's work, and what carries such pieces out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from moert.device.base import Lease


@dataclass(eq=False)
class Done:
    """When a piece of work was over."""

    at_s: float | None = None
    """None: it is not yet."""


@dataclass(eq=False)
class Link:
    """One direction between host and device. It carries one copy after the other."""

    name: str
    free_at_s: float = 0.0
    is_busy: bool = False
    busy_s: float = 0.0
    """It has been so far."""
    nbytes: int = 0
    """It has carried."""


@dataclass(eq=False)
class Lane:
    """The queue of one stream."""

    name: str
    urgency: int
    """Which of several that wait for a link goes first: the lowest."""
    queue: deque[Work] = field(default_factory=deque)
    free_at_s: float = 0.0


@dataclass(eq=False)
class Work:
    """One copy, launch or mark in a stream's order."""

    lane: Lane
    number: int
    """Ascending over all streams, as they were asked for."""
    action: Callable[[], object]
    seconds: float
    link: Link | None = None
    nbytes: int = 0
    prepare: Callable[[], object] | None = None
    """Done as it begins."""
    reads: tuple[Lease, ...] = ()
    writes: Lease | None = None
    fills: bool = False
    """Whether the slot that it writes is whole afterwards."""
    after: tuple[Done, ...] = ()
    submitted_s: float = 0.0
    end_s: float | None = None
    """When it will be over, once it has begun."""
    done: Done = field(default_factory=Done)

    @property
    def may_begin(self) -> bool:
        return all(before.at_s is not None for before in self.after)


class Access(Protocol):
    """What is told of each piece of work as it begins and ends; raises SlotAccessError if it must not."""

    def begin(self, work: Work) -> None: ...

    def end(self, work: Work) -> None: ...


class Engine(ABC):
    """Carries out the work of all lanes, each in its order."""

    failure: BaseException | None = None
    """The first thing that went wrong; nothing is done any more after it."""

    @abstractmethod
    def now(self) -> float:
        """Seconds."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Let the caller's time pass."""

    @abstractmethod
    def add_lane(self, name: str, urgency: int) -> Lane:
        """A new stream's queue."""

    @abstractmethod
    def submit(self, work: Work) -> None:
        """Put it last in its lane; returns at once."""

    @abstractmethod
    def is_done(self, done: Done) -> bool:
        """Whether it is over by now."""

    @abstractmethod
    def wait(self, done: Done) -> None:
        """Block until it is over, or `failure` is set."""

    @abstractmethod
    def drain(self) -> None:
        """Block until all is over, or `failure` is set."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Nothing is done from here on."""

    @abstractmethod
    def close(self) -> None:
        """End what has been started; nothing touches any memory afterwards."""
