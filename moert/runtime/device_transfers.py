"""Experts on their way from host memory to a device: what a step waits for, and what may be needed later.

Three classes, each in a stream of its own: demands, promotions and prefetches. An expert has one row that it comes up
in and one transfer at most: asking again for one that is under way makes it a demand, and the step waits for the rest.
What is on disk is read into host memory first, by the pipeline of that tier and in the same class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from moert.device.base import Device, Event
from moert.runtime.device_by_layer import caches_by_layer
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_rows import RowBank
from moert.runtime.pipeline import Pipeline
from moert.tiers.read import Priority
from moert.types import ExpertId

MAX_BYTES_IN_FLIGHT = 512 << 20
"""Of copies that have been handed to the device; what nobody waits for is half as much at most."""

EXPERTS_IN_FLIGHT = 4
"""As many may be under way however large they are: so that the link has the next one when one is over, of what a step
waits for and of what nobody does."""


@dataclass
class Coming:
    """An expert that has a row beside the residents."""

    expert: ExpertId
    row: int
    priority: Priority
    parts: int = 1
    started: int = 0
    """Of its parts."""
    event: Event | None = None
    """After the last part that was started."""
    is_computed: bool = False
    """A step has launched what reads it."""

    @property
    def is_whole(self) -> bool:
        """Whether all its bytes are on their way, or there."""
        return self.started == self.parts


@dataclass
class _Copy:
    """What the device reads from host memory."""

    expert: ExpertId
    nbytes: int
    priority: Priority
    event: Event


@dataclass
class TransferCounts:
    """What has been done so far."""

    copies: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))
    nbytes: int = 0
    forwarded: int = 0
    """Demands for what was under way already."""
    cancelled: int = 0
    """Prefetches that had not started when nobody wanted them any more."""
    given_up: int = 0
    """Experts that came and went without having been computed or become resident."""


class DeviceTransfers:
    """The transfers of one model to one device. One thread at a time.

    Nothing blocks but what is called waiting and `drain`; copies from memory that is not page-locked may, too.
    """

    def __init__(
        self,
        device: Device,
        layers: Iterable[DeviceCache],
        pinned: PinnedHost,
        from_disk: Pipeline | None,
        max_bytes: int | None = None,
    ) -> None:
        """`from_disk` brings up what is not in host memory; None: everything is."""
        self._device, self._layers, self._pinned, self._from_disk = device, caches_by_layer(layers), pinned, from_disk
        if max_bytes is None:
            largest = max(layer.expert_bytes for layer in self._layers)
            max_bytes = max(MAX_BYTES_IN_FLIGHT, EXPERTS_IN_FLIGHT * largest)
        self._max_bytes = max_bytes
        self._queue: dict[ExpertId, bool] = {}
        """Prefetches that have not started, and whether the disk has been asked for them."""
        self._coming: dict[ExpertId, Coming] = {}
        self._copies: list[_Copy] = []
        self.bytes_in_flight = 0
        self.counts = TransferCounts()
        self.given_up: Callable[[ExpertId], None] | None = None
        """Told of each expert whose row was taken from it before it was needed."""

    @property
    def busy(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._queue or self._copies)

    @property
    def copying(self) -> bool:
        """Whether a copy has been started and is not known to be over."""
        return bool(self._copies)

    def coming(self, expert: ExpertId) -> Coming | None:
        """The expert's row beside the residents, if it has one."""
        return self._coming.get(expert)

    def all_coming(self) -> list[Coming]:
        """Every expert with such a row, the oldest first."""
        return list(self._coming.values())

    def rows_beside(self, bank: RowBank) -> int:
        """How many rows of a bank are not residents'."""
        coming = (self._layers[expert.layer].bank for expert in self._coming)
        return bank.n_free + sum(one is bank for one in coming)

    def prefetch(self, experts: Iterable[ExpertId]) -> None:
        """These are wanted, the first one first, by nobody who waits. Starts nothing; see `pump`."""
        for expert in experts:
            if expert not in self._layers[expert.layer].residency and expert not in self._coming:
                self._queue.setdefault(expert, False)

    def withdraw(self, experts: Iterable[ExpertId]) -> None:
        """Nobody wants these any more: what has not started is cancelled, the rest goes on while there is room."""
        gone = [expert for expert in experts if self._queue.pop(expert, None) is not None]
        self.counts.cancelled += len(gone)
        if self._from_disk is not None and gone:
            self._from_disk.withdraw(gone)

    def demand(self, expert: ExpertId) -> Coming | None:
        """A step needs `expert`, which is in host memory and not resident: start its copy, or the rest of it.

        Returns:
            None while there is no row for it: something that came up must be computed and installed first.
        """
        self._queue.pop(expert, None)
        known = self._coming.get(expert)
        if known is not None:
            self.counts.forwarded += 1
            known.priority = Priority.DEMAND
            while not known.is_whole:
                self._start_part(known)
            return known
        row = self._row_for(self._layers[expert.layer].bank, Priority.DEMAND)
        if row is None:
            return None
        coming = self._coming[expert] = Coming(expert, row, Priority.DEMAND)
        self._start_part(coming)
        return coming

    def promote(self, expert: ExpertId, parts: int) -> Coming | None:
        """Start the next part of `expert`, which is in host memory; None: there is no row for it, or no room.

        Whoever calls it does so while nothing else is under way.
        """
        coming = self._coming.get(expert)
        if coming is None:
            cache = self._layers[expert.layer]
            if not self._has_room(cache.expert_bytes // parts):
                return None
            row = self._row_for(cache.bank, Priority.PROMOTION)
            if row is None:
                return None
            coming = self._coming[expert] = Coming(expert, row, Priority.PROMOTION, parts)
            if parts > 1:
                cache.host.hold(expert)  # until its last part has been started
        if not coming.is_whole:
            self._start_part(coming)
        return coming

    def pump(self) -> None:
        """Start the prefetches that may be started now. Returns at once."""
        for expert, is_asked in list(self._queue.items()):
            cache = self._layers[expert.layer]
            if expert in cache.residency or expert in self._coming:
                del self._queue[expert]
            elif not cache.host.has(expert):
                self._ask_disk(expert, is_asked)
            elif not self._has_room(cache.expert_bytes):
                return
            else:
                row = self._row_for(cache.bank, Priority.PREFETCH)
                if row is None:
                    continue
                del self._queue[expert]
                coming = self._coming[expert] = Coming(expert, row, Priority.PREFETCH)
                self._start_part(coming)

    def _ask_disk(self, expert: ExpertId, is_asked: bool) -> None:
        assert self._from_disk is not None, f"{expert} is nowhere"
        if not is_asked:
            self._queue[expert] = True
            self._from_disk.prefetch([expert])
            self._from_disk.pump()
        elif not self._from_disk.busy:
            del self._queue[expert]  # it could not be read, or has left host memory again: whoever needs it asks anew

    def _has_room(self, nbytes: int) -> bool:
        """For what nobody waits for, of which what a step waits for takes none."""
        ahead = sum(copy.nbytes for copy in self._copies if copy.priority is not Priority.DEMAND)
        return not self._copies or 2 * (ahead + nbytes) <= self._max_bytes

    def _row_for(self, bank: RowBank, priority: Priority) -> int | None:
        row = bank.take()
        if row is None and priority is Priority.DEMAND and self._give_one_up(bank):
            row = bank.take()
        return row

    def _give_one_up(self, bank: RowBank) -> bool:
        """Take the row of what nobody waits for: prefetches before promotions, the oldest first."""
        of_bank = [
            coming
            for coming in self._coming.values()
            if coming.priority is not Priority.DEMAND and self._layers[coming.expert.layer].bank is bank
        ]
        victim = max(of_bank, key=lambda coming: coming.priority, default=None)
        if victim is None:
            return False
        self.discard(victim.expert)
        return True

    def discard(self, expert: ExpertId) -> None:
        """Nobody will compute with what came up for `expert`: its row is free."""
        coming = self._coming.pop(expert)
        self._layers[expert.layer].bank.give_back(coming.row)
        if not coming.is_whole and coming.parts > 1:
            self._layers[expert.layer].host.let_go(expert)
        if not coming.is_computed:
            self.counts.given_up += 1
        if self.given_up is not None:
            self.given_up(expert)

    def forget_guesses(self, layer: int) -> None:
        """A step of `layer` has been: what was prefetched for it and not needed is given up."""
        self.withdraw([expert for expert in self._queue if expert.layer == layer])
        for coming in self.all_coming():
            if coming.expert.layer == layer and coming.priority is Priority.PREFETCH:
                self.discard(coming.expert)

    def demote(self, layer: int) -> None:
        """Nobody waits any more for what comes up for a layer."""
        for coming in self._coming.values():
            if coming.expert.layer == layer and coming.priority is Priority.DEMAND:
                coming.priority, coming.is_computed = Priority.PREFETCH, False

    def take(self, expert: ExpertId) -> Coming:
        """What came up for `expert`; its row is the caller's now."""
        return self._coming.pop(expert)

    def _start_part(self, coming: Coming) -> None:
        expert, cache = coming.expert, self._layers[coming.expert.layer]
        host, bank = cache.host, cache.bank
        weights, buffer = self._pinned.source(host.weights(expert), bank.specs, bank.row_bytes)
        host.hold(expert)
        try:
            stream = self._device.copies[coming.priority]
            pageable = buffer is not None and not buffer.is_pinned
            event = bank.fill(coming.row, stream, weights, coming.started, coming.parts, pageable=pageable)
        except BaseException:
            host.let_go(expert)
            raise
        if buffer is not None:
            buffer.until = event
        nbytes = cache.expert_bytes // coming.parts
        coming.started += 1
        coming.event = event
        if coming.is_whole and coming.parts > 1:
            host.let_go(expert)
        self._copies.append(_Copy(expert, nbytes, coming.priority, event))
        self.bytes_in_flight += nbytes
        self.counts.nbytes += nbytes
        self.counts.copies[coming.priority] += 1

    def collect(self) -> None:
        """Let go of what has been copied. Never blocks.

        Raises:
            DeviceLostError: the device is gone.
        """
        done = [copy for copy in self._copies if copy.event.ready]
        for copy in done:
            self._over(copy)

    def wait_for_room(self, nbytes: int) -> None:
        """Block until so many bytes more may be under way."""
        while self._copies and self.bytes_in_flight + nbytes > self._max_bytes:
            self.wait_for_one()

    def wait_for_one(self) -> None:
        """Block until a copy is over, the oldest demand if there is one."""
        demands = [copy for copy in self._copies if copy.priority is Priority.DEMAND]
        copy = (demands or self._copies)[0]
        copy.event.wait()
        self._over(copy)

    def _over(self, copy: _Copy) -> None:
        self._copies.remove(copy)
        self.bytes_in_flight -= copy.nbytes
        self._layers[copy.expert.layer].host.let_go(copy.expert)

    def give_up_parts(self) -> bool:
        """Give up what is there in part, whose other parts keep their slots in host memory; False if nothing is."""
        parts = [coming for coming in self._coming.values() if not coming.is_whole]
        for coming in parts:
            self.discard(coming.expert)
        return bool(parts)

    def drain(self) -> None:
        """Cancel what has not started, give up what is there in part, and wait for the rest: when this returns, nothing
        reads from host memory or holds it."""
        self.withdraw(list(self._queue))
        self.give_up_parts()
        while self._copies:
            self.wait_for_one()

    def recover(self) -> None:
        """Forget everything; the device has done all it was told, and the layers have recovered."""
        self._queue.clear()
        self._coming.clear()
        self._copies.clear()
        self.bytes_in_flight = 0

    def check_integrity(self) -> None:
        """Assert that nobody is both resident and coming, and that what is copied is held."""
        assert self.bytes_in_flight == sum(copy.nbytes for copy in self._copies)
        assert not self._queue.keys() & self._coming.keys(), "queued and under way"
        copied = {copy.expert for copy in self._copies}
        copied |= {coming.expert for coming in self._coming.values() if not coming.is_whole}
        for cache in self._layers:
            index = cache.spec.index
            for expert in self._coming:
                assert expert.layer != index or expert not in cache.residency, f"{expert} is resident and coming"
            held = cache.host.held()
            assert held <= {expert for expert in copied if expert.layer == index}, f"{held} are held for nothing"
        for bank in {id(cache.bank): cache.bank for cache in self._layers}.values():
            rows = [row for cache in self._layers if cache.bank is bank for row in cache.rows]
            rows += [one.row for one in self._coming.values() if self._layers[one.expert.layer].bank is bank]
            bank.check_integrity(rows)
