"""One layer's experts where compute finds them: in slots filled from disk, or in the model's own parameters."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moert.errors import MoertError
from moert.formats import RecordLayout, TensorSpec
from moert.kernels.cpu_ffn import Expert
from moert.kernels.moe_block import ExpertTable
from moert.residency import Residency, Resize
from moert.runtime.fused import FusedExperts
from moert.runtime.moves import moves_of
from moert.runtime.records import Record, RecordSource
from moert.runtime.slot import Slot
from moert.runtime.staging import StagingBuffer, StagingPool
from moert.runtime.stats import LayerStats
from moert.runtime.storage import Storage
from moert.tiers.arena import SlotBank
from moert.tiers.disk import Buffer, DiskReader, PlannedRead, Priority, ReadHandle, ReadPlan, Window
from moert.types import ExpertId

Weights = Mapping[str, torch.Tensor]

Place = tuple[int, int]
"""An expert and the slot it is read into."""


class Fetch(NamedTuple):
    """An expert on its way into its slot."""

    handle: ReadHandle
    read_bytes: int
    staging: StagingBuffer | None = None

    def finish(self) -> None:
        """Give back what the fetch held besides the slot; once, when it has arrived, failed or been cancelled."""
        if self.staging is not None:
            self.staging.release()


@dataclass(frozen=True)
class LayerSpec:
    """One experts module as the runtime sees it."""

    index: int
    name: str
    num_experts: int
    tensors: tuple[TensorSpec, ...]
    """The tensors of one expert."""
    top_k: int = 1
    """Experts that one token needs at once, as far as the model's configuration says."""
    num_identity: int = 0
    """Experts after the last real one that return their input and have no weights (zero-computation experts)."""
    fused: FusedExperts | None = field(default=None, compare=False)
    """The kernels that compute this layer's experts whole; None: they are computed one by one, through the module."""
    unfused_reason: str | None = None
    """Why not."""
    storage: Storage | None = field(default=None, compare=False)
    """How the experts are stored; None: as `tensors` says."""

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors of one expert in its slot."""
        return self.tensors if self.storage is None else self.storage.stored

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in its slot, without alignment."""
        return sum(spec.nbytes for spec in self.stored)


class LayerCache(ABC):
    """One layer's experts: who is resident, and how the others come up. Used by one step at a time."""

    def __init__(self, spec: LayerSpec, residency: Residency) -> None:
        self.spec = spec
        self.residency = residency
        self.ids = tuple(ExpertId(spec.index, expert) for expert in range(spec.num_experts))
        self.stats = LayerStats(spec.name)
        self._table: ExpertTable | None = None
        self._expert_bytes = spec.expert_bytes

    @abstractmethod
    def weights(self, expert: int) -> Weights:
        """A resident expert's tensors as they are stored; valid while it is locked, read-only."""

    def own_weights(self, expert: int) -> Weights:
        """A resident expert's tensors as its module has them: `weights`, or new memory where those are encoded."""
        storage, weights = self.spec.storage, self.weights(expert)
        return weights if storage is None else storage.decode(weights)

    def fused_expert(self, expert: int) -> Expert:
        """A resident expert as the layer's fused kernels take it; valid while it is locked."""
        assert self.spec.fused is not None
        return self.spec.fused.expert(self.weights(expert))

    def fused_experts(self, experts: Sequence[ExpertId]) -> list[Expert]:
        """`fused_expert` of several."""
        return [self.fused_expert(expert.expert) for expert in experts]

    def table(self) -> ExpertTable | None:
        """All experts for the layer's fused kernels, as long as all are resident; valid until one is evicted."""
        if self.spec.fused is None or len(self.residency) < self.spec.num_experts:
            self._table = None
        elif self._table is None:
            self._table = ExpertTable(self.spec.fused.ffn, self.fused_experts(self.ids))
        return self._table

    @abstractmethod
    def _can_submit(self, others: int = 0) -> bool:
        """Whether there are now the buffers that one expert needs, beside so many others."""

    @abstractmethod
    def _submit(self, places: Sequence[Place], priority: Priority) -> list[Fetch]:
        """Start reading experts into slots, in this order, all of them or none; returns at once."""

    @abstractmethod
    def read_bytes(self, expert: int) -> int:
        """What bringing `expert` up reads, alignment included."""

    def start(self, experts: Iterable[ExpertId], priority: Priority) -> list[tuple[ExpertId, Fetch]]:
        """Admit missing experts and start reading them, in this order; returns at once. Settle each with `arrive`.

        Returns:
            Those for which there was a slot and a buffer; of demands none after the first for which there was not.
            Settle or release others before the rest is asked for again.

        Raises:
            MoertError: their reads cannot even be queued; none of them is admitted.
        """
        started: list[ExpertId] = []
        places: list[Place] = []
        for expert in experts:
            if not self._can_submit(len(started)):
                break
            admission = self.residency.admit(expert)
            if admission is not None:
                started.append(expert)
                places.append((expert.expert, admission.slot))
            elif priority is Priority.DEMAND:
                break
        if not started:
            return []
        try:
            fetches = self._submit(places, priority)
        except Exception:
            for expert in started:
                self.residency.abandon(expert)
            self.count_residents()
            raise
        self.count_residents()
        return list(zip(started, fetches, strict=True))

    def arrive(self, expert: ExpertId, fetch: Fetch) -> None:
        """Block until a started expert is resident.

        Raises:
            CorruptFileError, TransferError, MoertError: it could not be read, or was cancelled; its slot is free again.
        """
        try:
            fetch.handle.wait()
        except Exception:
            if not fetch.handle.ready:
                raise  # a signal's handler raised it, and the record may still be read into its slot
            self.stats.bytes_read += fetch.handle.wasted
            fetch.finish()
            self.residency.abandon(expert)
            raise
        fetch.finish()
        self.residency.arrive(expert)
        self.stats.bytes_read += fetch.read_bytes
        self.stats.read_s += fetch.handle.read_s
        self.count_residents()

    def restart(self, expert: ExpertId, fetch: Fetch) -> Fetch:
        """Read a started expert anew, into the slot that it has, as a demand; its record was given up.

        Blocks for what had been begun of that.

        Raises:
            TransferError, MoertError: the read cannot even be queued; its slot is free again.
        """
        with contextlib.suppress(MoertError):
            fetch.handle.wait()
        self.stats.bytes_read += fetch.handle.wasted
        fetch.finish()
        slot = self.residency.slot_of(expert)
        assert slot is not None, f"{expert} has not been started"
        try:
            return self._submit([(expert.expert, slot)], Priority.DEMAND)[0]
        except Exception:
            self.residency.abandon(expert)
            raise

    def recover(self, *, keep: bool) -> None:
        """Put the books in order after something that was cut short; see `Residency.recover`."""
        self.residency.recover(self.residency.capacity, keep=keep)
        self.count_residents()

    def count_residents(self) -> None:
        """Bring `stats.resident_bytes` up to date."""
        self.stats.resident_bytes = len(self.residency) * self._expert_bytes


class ParameterLayer(LayerCache):
    """Every expert resident in the parameters of the model's own experts module; there is never a miss."""

    def __init__(self, spec: LayerSpec, residency: Residency, weights: Sequence[Weights]) -> None:
        """`residency` has room for every expert and is filled here; `weights[e]` are views the caller owns."""
        super().__init__(spec, residency)
        self.stats.resident_bytes = spec.num_experts * spec.expert_bytes
        self._weights = weights
        self._fused: dict[int, Expert] = {}
        for expert in range(spec.num_experts):
            residency.admit(ExpertId(spec.index, expert))
            residency.arrive(ExpertId(spec.index, expert))

    def weights(self, expert: int) -> Weights:
        return self._weights[expert]

    def fused_expert(self, expert: int) -> Expert:
        if expert not in self._fused:
            self._fused[expert] = super().fused_expert(expert)
        return self._fused[expert]

    def _can_submit(self, others: int = 0) -> bool:
        return True

    def _submit(self, places: Sequence[Place], priority: Priority) -> list[Fetch]:
        raise AssertionError(f"experts {places} of {self.spec.name} are in memory and were fetched")

    def read_bytes(self, expert: int) -> int:
        return 0


class _Known(NamedTuple):
    """What there is to know of an expert's reads."""

    read_bytes: int
    layout: RecordLayout
    """As in `record`."""
    plan: ReadPlan
    record: Record
    is_plain: bool
    """Its bytes are used as they are read."""


class SlotLayer(LayerCache):
    """Experts in the slots of a bank, filled from disk on demand."""

    def __init__(
        self,
        spec: LayerSpec,
        residency: Residency,
        bank: SlotBank,
        source: RecordSource,
        reader: DiskReader,
        staging: StagingPool | None,
        *,
        poison: bool = False,
    ) -> None:
        """Views of the bank's memory are handed out by `weights`; the bank must outlive them.

        `poison` fills every slot with NaN before it is filled anew, so that reading it too early is loud.
        """
        super().__init__(spec, residency)
        self._bank = bank
        self._source = source
        self._reader = reader
        self._staging = staging
        self._poison = poison
        self._slots: list[Slot] = []
        self._buffers: list[Buffer] = []
        """The same slots, as records are read into them."""
        self._known: list[_Known | None] = [None] * spec.num_experts
        """How each expert is read, once somebody has asked for it."""
        self._take_slots()

    def _slot_of(self, expert: int) -> Slot:
        slot = self.residency.slot_of(ExpertId(self.spec.index, expert))
        assert slot is not None, f"expert {expert} of {self.spec.name} is not resident"
        return self._slots[slot]

    def weights(self, expert: int) -> Weights:
        return self._slot_of(expert).weights

    def fused_expert(self, expert: int) -> Expert:
        assert self.spec.fused is not None
        return self._slot_of(expert).expert(self.spec.fused)

    def fused_experts(self, experts: Sequence[ExpertId]) -> list[Expert]:
        fused, slots = self.spec.fused, self._slots
        assert fused is not None
        return [slots[slot].expert(fused) for slot in self.residency.slots_of(experts)]

    def _can_submit(self, others: int = 0) -> bool:
        return self._staging is None or self._staging.can_acquire(others + 1)

    def read_bytes(self, expert: int) -> int:
        return (self._known[expert] or self._know(expert)).read_bytes

    def _know(self, expert: int) -> _Known:
        record = self._source.record(self.spec.index, expert)
        windows = [
            Window(self._source.files[span.file], span.offset, span.nbytes, position)
            for span, position in zip(record.reads, record.positions, strict=True)
        ]
        is_plain = record.is_direct and record.check is None
        known = _Known(record.read_bytes, record.layout, ReadPlan(windows, moves_of(record)), record, is_plain)
        self._known[expert] = known
        return known

    def _submit(self, places: Sequence[Place], priority: Priority) -> list[Fetch]:
        self._table = None
        buffers = self._buffers
        wanted: list[PlannedRead] = []
        staged: dict[int, StagingBuffer] = {}
        try:
            for expert, slot in places:
                if self._poison:
                    self._bank.poison(slot)
                known = self._known[expert] or self._know(expert)
                if known.is_plain:
                    wanted.append(PlannedRead(known.plan, buffers[slot]))
                else:
                    wanted.append(self._planned(known, expert, slot, staged))
            handles = self._reader.submit_planned(wanted, priority)
        except BaseException:
            for staging in staged.values():
                staging.release()
            raise
        fetches = []
        for (expert, slot), handle in zip(places, handles, strict=True):
            read_bytes, layout = (self._known[expert] or self._know(expert))[:2]
            # Nobody looks at a slot before it is filled.
            self._slots[slot].lay_out(layout)
            fetches.append(Fetch(handle, read_bytes, staged.get(expert)))
        return fetches

    def _planned(self, known: _Known, expert: int, slot: int, staged: dict[int, StagingBuffer]) -> PlannedRead:
        """The read of a record of which more is to be done than reading it; `staged` gets the buffer that it takes."""
        record, plan = known.record, known.plan
        check = None if record.check is None or record.check.is_over else record.check
        if record.is_direct:
            buffer = self._buffers[slot]
            finish = None if check is None else lambda _: check(plan.reads(buffer.memory))
            return PlannedRead(plan, buffer, finish=finish)
        assert self._staging is not None
        staging = staged[expert] = self._staging.acquire()
        target = self._slots[slot].bytes

        def convert(_: tuple[int, ...]) -> None:
            if record.check is not None:
                record.check(plan.reads(staging.buffer.memory))
            record.fill(staging.tensor, target)

        if check is not None:
            # The extension's threads know of no check.
            plan = ReadPlan(plan.windows)
        return PlannedRead(plan, staging.buffer, self._buffers[slot], convert)

    def resize(self, n_slots: int) -> Resize:
        """Have `n_slots` slots from now on, between steps; the caller has grown the bank before, or shrinks it after.

        Blocks while residents of the slots that go are copied into others; their weights are the same as before.
        """
        self._table = None
        change = self.residency.resize(n_slots)
        waiting = list(change.moves)
        try:
            while waiting:
                move = waiting[-1]
                self._slots[move.to_slot].bytes.copy_(self._slots[move.from_slot].bytes)
                self._slots[move.to_slot].lay_out(self._source.record(self.spec.index, move.expert.expert).layout)
                waiting.pop()
        finally:
            # Interrupted: those whose bytes are not where the table says are as good as evicted.
            for move in waiting:
                self.residency.drop(move.expert)
            self.count_residents()
            del self._slots[n_slots:], self._buffers[n_slots:]
        self._take_slots()
        return change

    def recover_slots(self, reader: DiskReader, *, keep: bool) -> None:
        """As `recover`, with as many slots as the bank has now, and another reader from now on."""
        self._reader = reader
        self._table = None
        if not keep:
            self.residency.capacity = self._bank.n_slots
        self.recover(keep=keep)
        self._slots, self._buffers = [], []
        self._take_slots()
        for expert in self.residency.residents:
            layout = self._source.record(self.spec.index, expert.expert).layout
            self._slot_of(expert.expert).lay_out(layout)

    def _take_slots(self) -> None:
        """Views of the residency's slots that have none yet."""
        for slot in range(len(self._slots), self.residency.capacity):
            memory = self._bank.slot(slot)
            self._slots.append(Slot(memory))
            self._buffers.append(Buffer(memory, self._bank.address(slot)))

    def close(self) -> None:
        """Drop every view of the bank's memory."""
        self._table = None
        self._slots, self._buffers = [], []
