"""MIN with bypass: the fewest misses where a miss need not be admitted."""

from __future__ import annotations

from collections.abc import Collection

from moert.policies.belady import Belady
from moert.types import ExpertId


class MinBypass(Belady):
    """Belady's MIN that wants an expert only if it is needed again before the resident that would leave for it.

    If misses are computed without a slot and those that are wanted are admitted once the event is over, no policy at
    all has fewer misses, also where events do not fit: with room for C experts of one size, it keeps those C of the
    residents and the event that are needed again first. Where every miss is admitted it is `belady`.
    """

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        return self.next_use(expert) < self.next_use(self.victim(locked))

    def worth(self, expert: ExpertId) -> float | None:
        return 1 / (self.next_use(expert) - self._now)
