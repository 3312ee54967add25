"""Never slower: which way to run, by what each has taken lately."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from moert.errors import ConfigError

WORSE = 0.03
"""What is slower than another way by more than this share..."""

PATIENCE = 32
"""...for so many steps is left for it."""

BETTER = 0.01
"""A trial must show at least this gain to change anything."""

ALLOWANCE = 0.005
"""The share of all time that trials of other ways may cost, in what they take longer."""

TRIAL = 8
"""Steps of a trial, if it does not cost too much before. The first ones, which still show what went before, are not
looked at."""

SETTLING = 3

SOON = 64
LATE = 4096
"""Steps from one trial of a way to the next: at least the one, and while it stays clearly slower up to the other."""


CHANGE = 0.25
"""If the way in use takes so much more or less than it did, nothing that was known of the others counts any more..."""

BETWEEN_CHANGES = 1024
"""...but not again within so many steps, or trying them all would cost too much."""


class _Way:
    """One way to run, and what is known of it."""

    def __init__(self, predicted: float, *, is_uneven: bool = False) -> None:
        self.predicted = predicted
        self.is_uneven = is_uneven
        self.times: deque[float] = deque(maxlen=PATIENCE)
        self.seen_s: float | None = None
        """What its latest trial's steps took, or its latest ones."""
        self.next_trial = 0
        self.rest = SOON

    @property
    def expected(self) -> float:
        """Seconds of a step; a guess as long as it has not run."""
        return self.predicted if self.seen_s is None else self.seen_s

    def typical(self, times: Sequence[float]) -> float:
        """What some of its steps took, each."""
        return statistics.fmean(times) if self.is_uneven else statistics.median(times)


class Guard:
    """Chooses between a scheduler and the pure ways beside it, such as all on the CPU or all fetched, step by step.

    A scheduler trusts its costs. Where these are wrong, because CPU and link slow each other down, or a wait takes
    longer than was measured, it can be many times slower than no scheduler at all. This looks at the steps themselves:
    the way in use against what the others took when they were last tried. A way that has been more than 3 % slower than
    another for 32 steps is left for it. The others are tried now and then, for a few steps each, as often as the time
    that costs stays below half a percent of all: one that is forty times slower is tried for a step every few
    thousand, one that is nearly as fast every 64. So it notices when things change, either way.

    It compares medians, so a pause does not decide, but of ways that it is told are uneven. Steps should be alike: for
    others, give each its own guard (as for prompts and for single tokens), or times per unit of work. No clock, no
    thread; one thread at a time.

    The rule of 3 % for 32 steps is of no paper. What it is for: FreeToken's users saw it 8 to 40 times slower than the
    CPU alone.
    """

    def __init__(
        self, ways: Sequence[str], predicted_s: Mapping[str, float] | None = None, *, uneven: Collection[str] = ()
    ) -> None:
        """
        Args:
            ways: names, the preferred one first: it is used until others are known to be better.
            uneven: those of which some steps take a multiple of others by their nature: it is their means that count,
                and trials of them take as many steps as patience does.
            predicted_s: what a step is expected to take each of them. Ways that are expected to be slower are tried
                later. None: nothing is.

        Raises:
            ConfigError: less than two ways, or a prediction that is no time.
        """
        if len(set(ways)) < 2 or len(set(ways)) != len(ways):
            raise ConfigError(f"a guard needs at least two different ways, not {', '.join(ways) or 'none'}")
        known = dict(predicted_s or {})
        if any(name not in ways or not (math.isfinite(s) and s >= 0) for name, s in known.items()):
            raise ConfigError(f"predictions must be finite times of {', '.join(ways)}, not {known}")
        self._ways = {name: _Way(known.get(name, 0.0), is_uneven=name in uneven) for name in ways}
        self._home = ways[0]
        self._trial: str | None = None
        self._trial_times: list[float] = []
        self._steps = 0
        self._usual_s: float | None = None
        self._next_change = 0
        self._spent_s = 0.0
        self._allowed_s = 0.0
        self.switches = 0
        """How often another way has become the one in use."""

    @property
    def way(self) -> str:
        """How to run the next step."""
        return self._trial or self._home

    def best(self, among: Collection[str]) -> str:
        """The fastest of some of the ways, as far as is known; of equal ones the first, also if none has been tried."""
        ways = {name: way for name, way in self._ways.items() if name in among}
        seen = {name: math.inf if way.seen_s is None else way.seen_s for name, way in ways.items()}
        return next(name for name, seen_s in seen.items() if (1 - BETTER) * seen_s <= min(seen.values()))

    @property
    def is_trying(self) -> bool:
        """Whether that is a trial."""
        return self._trial is not None

    def note(self, seconds: float) -> None:
        """A step, run as `way` said, has taken so long.

        Raises:
            ConfigError: that is no time.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"a step cannot take {seconds} s")
        self._steps += 1
        self._allowed_s += ALLOWANCE * seconds
        if self._trial is not None:
            self._note_trial(self._trial, seconds)
            return
        home = self._ways[self._home]
        home.times.append(seconds)
        if len(home.times) >= TRIAL - SETTLING or home.seen_s is None:
            home.seen_s = home.typical(list(home.times))
        is_sure = len(home.times) == PATIENCE
        if is_sure:
            self._notice_change(home.expected)
        best_s, best = self._best_other()
        if is_sure and home.expected > (1 + WORSE) * best_s:
            self._begin(best)
        else:
            self._consider()

    def _notice_change(self, now_s: float) -> None:
        """Where the way in use has become faster or slower, what is known of the others is of the past."""
        if self._usual_s is None:
            self._usual_s = now_s
        elif abs(now_s - self._usual_s) > CHANGE * self._usual_s and self._steps >= self._next_change:
            self._usual_s, self._next_change = now_s, self._steps + BETWEEN_CHANGES
            for name, way in self._ways.items():
                if name != self._home:
                    way.seen_s, way.rest, way.next_trial = None, SOON, self._steps

    def _best_other(self) -> tuple[float, str]:
        """Of those that have been seen; the fastest."""
        seen = [(way.seen_s, name) for name, way in self._ways.items() if name != self._home and way.seen_s is not None]
        return min(seen, default=(math.inf, self._home))

    def _consider(self) -> None:
        """Begin a trial if there is one that is due and may cost what it is expected to."""
        home = self._ways[self._home]
        if len(home.times) < TRIAL:
            return
        due = [(way.expected, name) for name, way in self._ways.items() if name != self._home]
        for expected, name in sorted(due):
            way = self._ways[name]
            if self._steps < way.next_trial:
                continue
            extra = max(0.0, expected - home.expected)
            is_new = way.seen_s is None and expected <= 2 * home.expected
            if is_new or self._spent_s + extra <= self._allowed_s:
                self._begin(name)
                return

    def _begin(self, name: str) -> None:
        self._trial, self._trial_times = name, []

    def _note_trial(self, name: str, seconds: float) -> None:
        way, home = self._ways[name], self._ways[self._home]
        self._trial_times.append(seconds)
        self._spent_s += max(0.0, seconds - home.expected)
        taken = way.typical(self._trial_times) if way.is_uneven else seconds
        is_far_off = taken > 2 * home.expected and len(self._trial_times) > (1 if way.seen_s is None else 0)
        # A few steps are no mean.
        if len(self._trial_times) < (PATIENCE if way.is_uneven else TRIAL) and not is_far_off:
            return
        settled = self._trial_times[SETTLING:] or self._trial_times[0 if way.is_uneven else -1 :]
        way.seen_s = way.typical(settled)
        self._trial = None
        if way.seen_s < (1 - BETTER) * home.expected:
            # Not a change of the machine: the next one is seen against what this way takes.
            self._home, self._usual_s = name, None
            way.times.clear()
            way.times.extend(settled)
            home.rest = SOON
            home.next_trial = self._steps + SOON
            self.switches += 1
            return
        # What is known of the way in use may be old by now: it is measured anew before the next trial.
        home.times.clear()
        is_close = way.seen_s <= (1 + 4 * WORSE) * home.expected
        way.rest = SOON if is_close else min(2 * way.rest, LATE)
        way.next_trial = self._steps + way.rest
