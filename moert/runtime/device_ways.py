"""Which scheduler the next forward pass goes by: the preferred one, unless it is seen to be slower than a pure way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moert.schedule import Guard, Scheduler, make_scheduler

PURE = ("cpu_all", "fetch_all")
"""All that is missing on the CPU, wherever it is; all of it on the device."""

PLANNED = "planned"
"""Passes of one token that the device runs by itself; see `PlannedPasses`. It is no scheduler: it asks none."""

PAUSE_S = 1.0
"""A pass that took longer than this has waited for its user."""


class Ways:
    """Looks at forward passes, from one beginning of the first layer to the next: those of one token by themselves, and
    those of more by the time for each of their tokens."""

    def __init__(
        self,
        preferred: str,
        clock: Callable[[], float],
        pure: Sequence[str] = PURE,
        planned: bool | None = None,
    ) -> None:
        """
        Args:
            planned: whether single tokens go by `PLANNED`; None: if they are seen to be faster so.

        Raises:
            ConfigError: there is no such scheduler.
        """
        names = list(dict.fromkeys([preferred, *pure]))
        self._schedulers: dict[str, Scheduler] = {name: make_scheduler(name) for name in names}
        self._preferred, self._names = preferred, names
        self._clock = clock
        alone = [*names, PLANNED] if planned is None and len(names) > 1 else names
        self._guards = (Guard(alone), Guard(names)) if len(names) > 1 else None
        """Of single tokens, and of more."""
        self._always_planned = bool(planned)
        self._last: tuple[int, float] | None = None
        self._now = preferred

    @property
    def way(self) -> str:
        """That of the pass under way."""
        return self._now

    @property
    def scheduler(self) -> Scheduler:
        """It, or the preferred one if it is none."""
        return self._schedulers.get(self._now) or self._schedulers[self._preferred]

    @property
    def switches(self) -> int:
        """How often another way has become the one in use."""
        return 0 if self._guards is None else sum(guard.switches for guard in self._guards)

    def begin(self, tokens: int) -> None:
        """A forward pass of so many tokens begins."""
        if not tokens:
            return
        if tokens == 1 and self._always_planned:
            self._now = PLANNED
            self.forget()
            return
        if self._guards is None:
            self._now = self._preferred
            return
        now = self._clock()
        if self._last is not None:
            before, then = self._last
            # After a prompt comes what its user thinks about, and what the model does once for each prompt.
            if before == tokens and now - then < PAUSE_S * max(1, tokens):
                self._guards[before > 1].note((now - then) / before)
        self._last = (tokens, now)
        self._now = self._guards[tokens > 1].way

    def do_not_plan(self, *, ever: bool = False) -> None:
        """`PLANNED` is not to be had for this pass, or, with `ever`, for any from here on."""
        if self._now == PLANNED:
            self._now = self._preferred
        if ever and (self._guards is not None or self._always_planned):
            self._always_planned = False
            self._guards = None if self._guards is None else (Guard(self._names), self._guards[1])
        self.forget()

    def forget(self) -> None:
        """The pass under way will not be comparable with others."""
        self._last = None
