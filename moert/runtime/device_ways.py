"""Which scheduler the next forward pass goes by: the preferred one, unless it is seen to be slower than a pure way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moert.schedule import Guard, Scheduler, make_scheduler

PURE = ("cpu_all", "fetch_all")
"""All that is missing on the CPU, wherever it is; all of it on the device."""

PAUSE_S = 1.0
"""A pass that took longer than this has waited for its user."""


class Ways:
    """Looks at forward passes, from one beginning of the first layer to the next: those of one token by themselves, and
    those of more by the time for each of their tokens."""

    def __init__(self, preferred: str, clock: Callable[[], float], pure: Sequence[str] = PURE) -> None:
        """
        Raises:
            ConfigError: there is no such scheduler.
        """
        names = list(dict.fromkeys([preferred, *pure]))
        self._schedulers: dict[str, Scheduler] = {name: make_scheduler(name) for name in names}
        self._preferred = preferred
        self._clock = clock
        self._guards = (Guard(names), Guard(names)) if len(names) > 1 else None
        """Of single tokens, and of more."""
        self._last: tuple[int, float] | None = None
        self._now = preferred

    @property
    def way(self) -> str:
        """That of the pass under way."""
        return self._now

    @property
    def scheduler(self) -> Scheduler:
        """It."""
        return self._schedulers[self._now]

    @property
    def switches(self) -> int:
        """How often another way has become the one in use."""
        return 0 if self._guards is None else sum(guard.switches for guard in self._guards)

    def begin(self, tokens: int) -> None:
        """A forward pass of so many tokens begins."""
        if self._guards is None or not tokens:
            return
        now = self._clock()
        if self._last is not None:
            before, then = self._last
            # After a prompt comes what its user thinks about, and what the model does once for each prompt.
            if before == tokens and now - then < PAUSE_S * max(1, tokens):
                self._guards[before > 1].note((now - then) / before)
        self._last = (tokens, now)
        self._now = self._guards[tokens > 1].way

    def forget(self) -> None:
        """The pass under way will not be comparable with others."""
        self._last = None
