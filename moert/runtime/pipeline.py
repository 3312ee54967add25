"""Experts on their way into slots: what a step waits for first, what may be needed later when there is nothing else.

A transfer is queued until its layer has a slot and a buffer for it and the bytes in flight allow it; then it is in
flight until it is settled, which makes the expert resident. Each expert has one transfer at most: asking again for one
that is under way only raises its class, so a demand waits for the rest of a prefetch and not for a second read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

from moert.errors import MoertError
from moert.runtime.layer import Fetch, LayerCache
from moert.runtime.link import Link
from moert.tiers.disk import Priority
from moert.types import ExpertId


class _Transfer(NamedTuple):
    priority: Priority
    fetch: Fetch
    given_up: bool = False
    """Its record will not be whole, and is over soon."""
    then: tuple[Priority, int] | None = None
    """It has been asked for since, when nothing of the record was left to take up: the class, and when it is due."""

    @property
    def urgency(self) -> int:
        """Which to wait for before others, the lowest first."""
        return 0 if self.priority is Priority.DEMAND else 2 - self.given_up


class Pipeline:
    """The transfers of one model. Used by one thread at a time; the reads themselves run on the reader's threads."""

    def __init__(
        self,
        layers: Sequence[LayerCache],
        max_in_flight: int,
        max_bytes: int | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """At most `max_in_flight` transfers and `max_bytes` of reads are in flight at once, but always one.

        Half of either is all that transfers which nobody waits for may take.
        """
        assert max_in_flight >= 1
        self._layers = {layer.spec.index: layer for layer in layers}
        self._max_in_flight = max_in_flight
        self._max_bytes = max_bytes
        self._queues: dict[Priority, dict[ExpertId, int]] = {priority: {} for priority in sorted(Priority)}
        """What is queued, and when it is due."""
        self._in_flight: dict[ExpertId, _Transfer] = {}
        self._clock = clock
        self.bytes_in_flight = 0
        self.link = Link()

    @property
    def busy(self) -> bool:
        """Whether anything is queued or in flight."""
        return bool(self._in_flight) or any(self._queues.values())

    @property
    def has_queued_demands(self) -> bool:
        """Whether a step needs an expert whose transfer has not started."""
        return bool(self._queues[Priority.DEMAND])

    @property
    def bytes_ahead(self) -> int:
        """Of the records that are queued or in flight and that nobody waits for."""
        queued = sum(
            self._layers[expert.layer].read_bytes(expert.expert)
            for priority, queue in self._queues.items()
            if priority is not Priority.DEMAND
            for expert in queue
        )
        return queued + sum(
            transfer.fetch.read_bytes
            for transfer in self._in_flight.values()
            if transfer.priority is not Priority.DEMAND and (not transfer.given_up or transfer.then is not None)
        )

    def is_in_flight(self, expert: ExpertId) -> bool:
        """Whether `expert` has a slot and its record is being read, or will be."""
        return expert in self._in_flight

    def is_coming(self, expert: ExpertId) -> bool:
        """Whether `expert` is in flight and has not been given up."""
        transfer = self._in_flight.get(expert)
        return transfer is not None and not transfer.given_up

    def demand(self, experts: Iterable[ExpertId]) -> None:
        """A step needs these experts, none of them resident, in this order. Starts nothing; see `pump`."""
        for expert in experts:
            self._request(expert, Priority.DEMAND)
        if self.waits:
            self.link.demand(self._clock())

    def prefetch(self, experts: Iterable[ExpertId], priority: Priority = Priority.PREFETCH, due: int = 0) -> None:
        """These experts are wanted, the first one first, by nobody who waits. Starts nothing; residents are skipped.

        `due` says by when: of one class, what is due sooner comes before what was asked for earlier.
        """
        for expert in experts:
            if expert not in self._layers[expert.layer].residency:
                self._request(expert, priority, due)
        queue = self._queues[priority]
        dues = list(queue.values())
        if any(later < sooner for sooner, later in pairwise(dues)):
            self._queues[priority] = dict(sorted(queue.items(), key=lambda item: item[1]))

    def _request(self, expert: ExpertId, priority: Priority, due: int = 0) -> None:
        transfer = self._in_flight.get(expert)
        if transfer is not None:
            if transfer.given_up:
                self._take_up(expert, transfer, priority, due)
            elif priority < transfer.priority:
                transfer.fetch.handle.promote(priority)
                self._in_flight[expert] = transfer._replace(priority=priority)
            return
        for queued, queue in self._queues.items():
            if expert in queue:
                if priority >= queued:
                    return
                del queue[expert]
        self._queues[priority][expert] = due

    def _take_up(self, expert: ExpertId, transfer: _Transfer, priority: Priority, due: int) -> None:
        """What was given up is wanted after all: the rest of its record, or all of it anew."""
        if not transfer.fetch.handle.promote(priority):
            if priority is not Priority.DEMAND:
                # Nobody waits for it, so nobody is to wait for what is ending either.
                then = (priority, due) if transfer.then is None else min(transfer.then, (priority, due))
                self._in_flight[expert] = transfer._replace(then=then)
                return
            transfer = transfer._replace(fetch=self._again(expert, transfer))
        self._layers[expert.layer].residency.take_up(expert)
        self._in_flight[expert] = _Transfer(priority, transfer.fetch)

    def _again(self, expert: ExpertId, transfer: _Transfer) -> Fetch:
        """The whole record for one that was given up and is over, or as good as that."""
        try:
            return self._layers[expert.layer].restart(expert, transfer.fetch)
        except MoertError:
            self._forget(expert)
            raise

    def pump(self) -> None:
        """Start what may be started now, class by class, in the order asked for. Returns at once.

        Raises:
            TransferError, MoertError: a read cannot even be queued.
        """
        for priority, queue in self._queues.items():
            if queue and not self._start(priority, queue):
                return

    def _start(self, priority: Priority, queue: dict[ExpertId, int]) -> bool:
        """Start what may be started of one class; whether those of the classes below may be."""
        waiting = list(queue)
        while waiting:
            batch = self._batch(waiting, priority)
            if not batch:
                return False
            started = self._layers[batch[0].layer].start(batch, priority)
            for expert, fetch in started:
                del queue[expert]
                self._in_flight[expert] = _Transfer(priority, fetch)
                self.bytes_in_flight += fetch.read_bytes
            if priority is Priority.DEMAND and len(started) < len(batch):
                return False  # what nobody waits for must not take the slot or buffer that is freed next
            del waiting[: len(batch)]
        return True

    def _batch(self, waiting: Sequence[ExpertId], priority: Priority) -> list[ExpertId]:
        """The first of these, as far as they are of one layer and there is room for all of them."""
        share = 1 if priority is Priority.DEMAND else 2
        layer = self._layers[waiting[0].layer]
        in_flight, nbytes = len(self._in_flight), self.bytes_in_flight
        batch: list[ExpertId] = []
        for expert in waiting:
            if expert.layer != waiting[0].layer:
                break
            nbytes += layer.read_bytes(expert.expert)
            in_flight += 1
            if in_flight > 1 and (
                share * in_flight > self._max_in_flight
                or (self._max_bytes is not None and share * nbytes > self._max_bytes)
            ):
                break
            batch.append(expert)
        return batch

    def records(self, experts: Iterable[ExpertId]) -> list[object] | None:
        """What the extension's threads read each of these experts from; None where others read one of them, and while
        anything is queued, which may go on as soon as the first has come.

        Raises:
            MoertError: the threads that read them belong to another process.
        """
        if any(self._queues.values()):
            return None
        records = []
        for expert in experts:
            transfer = self._in_flight.get(expert)
            record = None if transfer is None else transfer.fetch.handle.native
            if record is None:
                return None
            records.append(record)
        return records

    def collect(self) -> list[ExpertId]:
        """Settle what has arrived; the experts that are resident now. Never blocks.

        Raises:
            CorruptFileError, TransferError: an expert that was demanded could not be read. One that was not is only
                dropped: whoever needs it will ask for it.
        """
        return self._settle([expert for expert, one in self._in_flight.items() if one.fetch.handle.ready])

    def wait(self) -> list[ExpertId]:
        """Block until a transfer in flight is over, if possible the oldest demand, and `collect`."""
        assert self._in_flight, "nothing is in flight"
        # One that was given up ends soonest, and may be all that a demand still waits for: its slot.
        first = min(self._in_flight, key=lambda expert: self._in_flight[expert].urgency)
        return [*self._settle([first]), *self.collect()]

    def _settle(self, experts: list[ExpertId]) -> list[ExpertId]:
        arrived = []
        for expert in experts:
            transfer, layer = self._in_flight[expert], self._layers[expert.layer]
            try:
                layer.arrive(expert, transfer.fetch)
            except Exception:
                if not transfer.fetch.handle.ready:
                    raise  # a signal's handler raised it, and the record may still be read into its slot
                self._forget(expert)
                if transfer.priority is Priority.DEMAND:
                    self.link.forget()
                    raise
                layer.stats.failed_prefetches += not transfer.given_up
                if transfer.then is not None:
                    self.prefetch([expert], *transfer.then)
                continue
            self._forget(expert)
            arrived.append(expert)
            self.link.arrive(transfer.fetch.read_bytes, not self.waits, self._clock())
        return arrived

    @property
    def waits(self) -> bool:
        """Whether somebody waits for a transfer."""
        return self.has_queued_demands or any(
            transfer.priority is Priority.DEMAND for transfer in self._in_flight.values()
        )

    def _forget(self, expert: ExpertId) -> None:
        self.bytes_in_flight -= self._in_flight.pop(expert).fetch.read_bytes

    def withdraw(self, experts: Iterable[ExpertId]) -> None:
        """Nobody waits for these experts any more: nothing more is read of them, unless all has been begun."""
        for expert in experts:
            for queue in self._queues.values():
                queue.pop(expert, None)
            transfer = self._in_flight.get(expert)
            if transfer is None:
                continue
            given_up = transfer.given_up or transfer.fetch.handle.give_up()
            self._in_flight[expert] = _Transfer(Priority.PREFETCH, transfer.fetch, given_up)
            if given_up and not transfer.given_up:
                self._layers[expert.layer].residency.give_up(expert)
            if given_up and transfer.fetch.handle.ready:
                with contextlib.suppress(MoertError):
                    self._layers[expert.layer].arrive(expert, transfer.fetch)
                self._forget(expert)
        if not self.waits:
            self.link.forget()

    def dequeue(self, experts: Iterable[ExpertId]) -> None:
        """Withdraw those of these experts that are queued; what is in flight goes on as it is."""
        for expert in experts:
            for queue in self._queues.values():
                queue.pop(expert, None)
            transfer = self._in_flight.get(expert)
            if transfer is not None and transfer.then is not None:
                self._in_flight[expert] = transfer._replace(then=None)

    def drain(self) -> None:
        """Cancel what has not started and wait for the rest: when this returns, nothing writes into any slot."""
        self.withdraw([*(expert for queue in self._queues.values() for expert in queue), *self._in_flight])
        while self._in_flight:
            self._settle([next(iter(self._in_flight))])

    def recover(self) -> None:
        """Forget every transfer; nothing is read any more, and the layers have recovered."""
        for queue in self._queues.values():
            queue.clear()
        self._in_flight.clear()
        self.bytes_in_flight = 0
        self.link.forget()

    def check_integrity(self) -> None:
        """Assert that each expert has one transfer, and that it has a slot exactly while that is in flight."""
        queued = [expert for queue in self._queues.values() for expert in queue]
        assert len(set(queued)) == len(queued), f"queued twice: {queued}"
        assert not self._in_flight.keys() & set(queued), f"queued and in flight: {queued}"
        again = [expert for expert, one in self._in_flight.items() if one.then is not None and not one.given_up]
        assert not again, f"in flight and to be read again: {again}"
        assert self.bytes_in_flight == sum(transfer.fetch.read_bytes for transfer in self._in_flight.values())
        for index, layer in self._layers.items():
            arriving = {expert for expert in self._in_flight if expert.layer == index}
            assert layer.residency.arriving == arriving, f"{layer.residency.arriving} arrive, {arriving} are in flight"
