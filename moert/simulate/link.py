"""The link to the device while events are replayed in time: their fetches, and promotions in between."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.schedule import Costs, Promotion
from moert.types import ExpertId


class Link:
    """One copy after the other. Of promotions a chunk is under way at most; it has moved when its time is over."""

    def __init__(self, costs: Sequence[Costs], promotion: Promotion | None) -> None:
        """`costs`: of each layer's experts."""
        self._costs = costs
        self._promotion = promotion
        self._moving: tuple[ExpertId, float] | None = None
        """What is being promoted, and when the chunk of it that is under way has moved."""
        self.free_s = 0.0
        """When what has begun is over."""
        self.busy_s = 0.0

    def carry(self, begin_s: float, seconds: float) -> None:
        """What an event waits for: from `begin_s` on, or after what is under way."""
        self.free_s = max(self.free_s, begin_s) + seconds
        self.busy_s += seconds

    def promote_until(self, now: float) -> None:
        """Chunks of promotions while the link is idle before `now`; a fetch waits for the end of the last."""
        if self._promotion is None:
            return
        while True:
            if self._moving is not None:
                if self._moving[1] > now:
                    return
                self._moving = None
                self._promotion.chunk_done()
            if self.free_s >= now:
                return
            expert = self._promotion.next_chunk()
            if expert is None:
                self.free_s = now
                return
            self.carry(self.free_s, self._costs[expert.layer].move_s / self._promotion.chunks)
            self._moving = (expert, self.free_s)

    def take_over(self, experts: Collection[ExpertId], begin_s: float) -> list[float]:
        """An event waits for these, which are being promoted: when each is there, the oldest first.

        What of them has not begun to move does so from `begin_s` on, or after what is under way. They are no promotions
        any more.
        """
        assert self._promotion is not None
        there = []
        for expert, chunks in self._promotion.coming.items():
            if expert not in experts:
                continue
            if chunks:
                begun = self._moving is not None and self._moving[0] == expert
                self.carry(begin_s, (chunks - begun) * self._costs[expert.layer].move_s / self._promotion.chunks)
            there.append(self.free_s if chunks else begin_s)
        self.drop(experts)
        return there

    def drop(self, experts: Collection[ExpertId]) -> None:
        """These come, or have come, by other ways; a chunk of one that is under way goes to its end for nothing."""
        assert self._promotion is not None
        self._promotion.drop(experts)
        if self._moving is not None and self._moving[0] in experts:
            self._moving = None
