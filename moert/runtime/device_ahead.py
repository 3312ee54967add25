"""What the link does while a prompt's layer is being computed: it brings up what the next layer will need.

What a layer needs is known when its step begins, and then only that is copied, however long the prompt. Of the layer
after it nothing is known but the number of picks; it is decided here whether that is enough to copy its experts ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from moert.runtime.device_by_layer import ByLayer
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_transfers import DeviceTransfers
from moert.schedule import Costs, Item, Place, Scheduler
from moert.types import ExpertId

PICKS_OF_EACH = 3
"""From so many picks for each of its experts on, a layer is taken to need all of them: of picks that are spread evenly
none falls on one in e^3, 5 %. Copying ahead for shorter prompts as well can cost more than it gives: measurements in
llama.cpp's pull request 21067 have twice the bytes, and half as long again to the first token."""

NEEDED_SHARE = 0.9
"""Picks are not spread evenly where the layer before needed less than this of its experts, and then it is not done."""


class LayerAhead:
    """Brings up experts of the layer that comes next on the device, as prefetches: what is copied of them depends on
    the free rows, and each is a demand once the step that needs it begins."""

    def __init__(self, caches: ByLayer[DeviceCache], transfers: DeviceTransfers) -> None:
        self._caches, self._transfers = caches, transfers
        self._next = dict(pairwise(caches.layers))

    def start(
        self,
        layer: int,
        picks: int,
        needed: int,
        scheduler: Scheduler,
        costs: Costs,
        value: Callable[[ExpertId], float],
    ) -> None:
        """A step of `layer` with so many picks, which fall on `needed` of its experts, has started all its copies.

        Of the next layer's experts those are brought up that `scheduler` would fetch, the first by `value` before the
        others. Returns at once.
        """
        if layer not in self._next or needed < NEEDED_SHARE * self._caches[layer].spec.num_experts:
            return
        cache = self._caches[self._next[layer]]
        spec, host = cache.spec, cache.host
        if picks < PICKS_OF_EACH * spec.num_experts:
            return
        experts = [ExpertId(spec.index, expert) for expert in range(spec.num_experts)]
        experts.sort(key=lambda expert: -value(expert))
        # What is on disk is read whoever computes it, which is the disk's business alone.
        places = (Place.DEVICE if self._is_up(cache, expert) else Place.HOST for expert in experts)
        items = [
            Item(expert, picks // spec.num_experts, place, value(expert))
            for expert, place in zip(experts, places, strict=True)
        ]
        wanted = [item.expert for item in scheduler.plan(items, costs).fetch]
        there = [expert for expert in wanted if host.has(expert)]
        # Reads for the next layer may displace what it does not need from there, and nothing else.
        room = host.expect(there)
        on_disk = [expert for expert in wanted if not host.has(expert)]
        self._transfers.prefetch([*on_disk[:room], *there[: cache.bank.n_free]])
        self._transfers.pump()

    def _is_up(self, cache: DeviceCache, expert: ExpertId) -> bool:
        return expert in cache.residency or self._transfers.coming(expert) is not None
