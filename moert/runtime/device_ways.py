"""Which scheduler the next forward pass goes by: the preferred one, unless it is seen to be slower than a pure way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moert.errors import ConfigError
from moert.schedule import Guard, Scheduler, make_scheduler

PURE = ("cpu_all", "fetch_all")
"""All that is missing on the CPU, wherever it is; all of it on the device."""

PLANNED = "planned"
"""Passes of one token that the device runs by itself; see `PlannedPasses`. It is no scheduler: it asks none."""

HYBRID = "planned_hybrid"
"""The same with a share of what is missing for the CPU; see `Sharing`."""

BY_ITSELF = (PLANNED, HYBRID)

_PROMPT, _TOKEN = "prompt", "token"
"""Passes that the host decides about: of several tokens, and of one."""
_EVEN, _UNEVEN = "even", "uneven"
"""Of one token, that the device may run by itself: surely, and perhaps once more in another way."""

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
        planned: bool | str | None = None,
    ) -> None:
        """
        Args:
            planned: whether single tokens go by `PLANNED`, or by `HYBRID`, which is said by its name; None: if they are
                seen to be faster so.

        Raises:
            ConfigError: there is no such scheduler, or no such way.
        """
        if isinstance(planned, str) and planned not in BY_ITSELF:
            raise ConfigError(f"planned={planned!r} is no way that a device runs by itself: {', '.join(BY_ITSELF)}")
        names = list(dict.fromkeys([preferred, *pure]))
        self._schedulers: dict[str, Scheduler] = {name: make_scheduler(name) for name in names}
        self._preferred = preferred
        self._clock = clock
        self._guards: dict[str, Guard] = {}
        if len(names) > 1:
            self._guards = {_PROMPT: Guard(names), _TOKEN: Guard(names)}
            if planned is None:
                alone = [*names, PLANNED]
                self._guards |= {_EVEN: Guard([*alone, HYBRID]), _UNEVEN: Guard(alone, uneven=(PLANNED,))}
        self._alone = [*names, PLANNED]
        self._always = planned if isinstance(planned, str) else PLANNED if planned else None
        self._last: tuple[int, str, float] | None = None
        self._kind = _PROMPT
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
        return sum(guard.switches for guard in self._guards.values())

    @property
    def _guard(self) -> Guard | None:
        """That of the passes of this kind."""
        return self._guards.get(self._kind) or self._guards.get(_TOKEN)

    def begin(self, tokens: int, *, may_plan: bool = True, may_miss: bool = False) -> None:
        """A forward pass of so many tokens begins.

        Args:
            may_plan: the device may run it by itself.
            may_miss: and would have to be helped if it needed what is on disk.
        """
        if not tokens:
            return
        if tokens == 1 and self._always is not None and may_plan:
            self._now = PLANNED if may_miss else self._always
            self.forget()
            return
        kind = _PROMPT if tokens > 1 else _TOKEN if not may_plan else _UNEVEN if may_miss else _EVEN
        self._kind = kind
        guard = self._guard
        if guard is None:
            self._now = self._preferred
            return
        now = self._clock()
        if self._last is not None:
            before, of, then = self._last
            # After a prompt comes what its user thinks about, and what the model does once for each prompt.
            if (before, of) == (tokens, kind) and now - then < PAUSE_S * max(1, tokens):
                guard.note((now - then) / before)
        self._last = (tokens, kind, now)
        self._now = guard.way

    def do_not_plan(self, *, ever: bool = False) -> None:
        """The device can run nothing by itself for this pass, or, with `ever`, for any from here on."""
        if ever:
            self._always = None
            self._guards.pop(_EVEN, None)
            self._guards.pop(_UNEVEN, None)
        if ever or self._now in BY_ITSELF:
            self.forget()
        self.go_on()

    def go_on(self) -> None:
        """What is left of the pass, or what of it has to be done again, is the host's, by the scheduler that has been
        the fastest. It is still the same pass, and all the time that it takes is that of the way it began with."""
        if self._now in BY_ITSELF:
            guard = self._guard
            self._now = self._preferred if guard is None else guard.best(self._schedulers)

    def do_not_share(self) -> None:
        """The CPU can have no share of what the device runs by itself, from here on."""
        if self._now == HYBRID:
            self._now = PLANNED
        if self._always == HYBRID:
            self._always = PLANNED
        if _EVEN in self._guards:
            self._guards[_EVEN] = Guard(self._alone)
        self.forget()

    def forget(self) -> None:
        """The pass under way will not be comparable with others."""
        self._last = None
