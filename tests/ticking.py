"""Whether other Python threads run while something computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EDGE_S = 0.005


class Ticks:
    """When another thread had its turn, from when to when."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.began = self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def well_within(self) -> int:
        """Turns that were neither just begun before nor just after."""
        return sum(self.began + EDGE_S < at < self.ended - EDGE_S for at in self.at)


@contextmanager
def ticking() -> Iterator[Ticks]:
    """A thread that wants a turn every millisecond while the body runs."""
    ticks = Ticks()
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.at.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    ticks.began = time.perf_counter()
    try:
        yield ticks
    finally:
        ticks.ended = time.perf_counter()
        stop.set()
        thread.join()
