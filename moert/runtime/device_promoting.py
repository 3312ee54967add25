"""Background promotion, carried out: parts of an expert over a link that has nothing else to do."""

from __future__ import annotations

from collections.abc import Sequence

from moert.device.base import Event
from moert.runtime.device_by_layer import ByLayer
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_transfers import DeviceTransfers
from moert.schedule import Promotion
from moert.tiers.read import Priority
from moert.types import ExpertId


class Promoting:
    """Drives a `Promotion` with real copies; steps call it between each other."""

    def __init__(
        self, caches: ByLayer[DeviceCache], transfers: DeviceTransfers, promotion: Promotion | None = None
    ) -> None:
        self._caches, self._transfers = caches, transfers
        self._promotion = promotion or Promotion()
        self._promotion.rate.worth = lambda expert: caches[expert.layer].residency.policy.worth(expert)
        self._moving: tuple[ExpertId, Event] | None = None
        """The part under way."""
        self.promoted = 0
        """Experts that have become resident this way."""
        transfers.given_up = self._given_up

    def rate(self, expert: ExpertId) -> float:
        """How often its layer has needed it lately, from 0 to 1."""
        return self._promotion.rate(expert)

    def observe(self, event: Sequence[ExpertId]) -> None:
        """A step that needs these experts begins."""
        self._promotion.observe(event)

    def after(self, cache: DeviceCache, missed: Sequence[ExpertId], resident: Sequence[ExpertId]) -> None:
        """A step of a layer is over that `missed` these experts, of which some have become resident."""
        promotion = self._promotion
        # What was demanded on its way up is no promotion any more, wherever it is now.
        overtaken = [
            expert
            for expert in missed
            if (coming := self._transfers.coming(expert)) is None or coming.priority is not Priority.PROMOTION
        ]
        promotion.drop({*resident, *overtaken})
        if self._moving is not None and self._moving[0] in overtaken:
            self._moving = None
        left = [e for e in missed if e not in cache.residency and self._transfers.coming(e) is None]
        promotion.offer(cache.spec.index, left, cache.weakest())
        self._install()

    def _install(self) -> None:
        arrived = [
            coming
            for coming in self._transfers.all_coming()
            if coming.priority is Priority.PROMOTION and coming.is_whole and self._is_over(coming.expert)
        ]
        for expert, victim in self._promotion.install(lambda expert: self._caches[expert.layer].weakest()):
            known = self._transfers.coming(expert)
            if known is None or known.priority is not Priority.PROMOTION:
                continue  # a step has used it, and failed before it could say so
            coming = self._transfers.take(expert)
            self._caches[expert.layer].replace(expert, coming.row, victim)
            self.promoted += 1
        for coming in arrived:
            if self._transfers.coming(coming.expert) is coming:
                self._transfers.discard(coming.expert)  # it is worth no more than who would leave for it

    def _is_over(self, expert: ExpertId) -> bool:
        return self._moving is None or self._moving[0] != expert

    def pump(self) -> None:
        """Start the next part if nothing else is on the link. Returns at once."""
        if self._moving is not None:
            _, event = self._moving
            if not event.ready:
                return
            self._moving = None
            self._promotion.chunk_done()
        self._transfers.collect()
        if self._transfers.copying:
            return
        wanted = self._promotion.next_chunk()
        while wanted is not None:
            cache = self._caches[wanted.layer]
            if wanted not in cache.residency and cache.host.has(wanted):
                break
            # It has come another way, or has left host memory: a promotion does not read from disk.
            self._void(wanted)
            wanted = self._promotion.next_chunk()
        if wanted is None:
            return
        coming = self._transfers.promote(wanted, self._promotion.chunks)
        if coming is not None and coming.event is not None:
            self._moving = (wanted, coming.event)

    def _void(self, expert: ExpertId) -> None:
        self._promotion.drop([expert])
        if self._transfers.coming(expert) is not None:
            self._transfers.discard(expert)

    def _given_up(self, expert: ExpertId) -> None:
        """Its row was needed for something else."""
        self._promotion.drop([expert])
        if self._moving is not None and self._moving[0] == expert:
            self._moving = None
