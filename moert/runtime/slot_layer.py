"""One layer's experts in slots that are filled from disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moert.formats import RecordLayout
from moert.kernels.cpu_ffn import Expert
from moert.residency import Residency, Resize
from moert.runtime.layer import Fetch, LayerCache, LayerSpec, Place, Weights
from moert.runtime.moves import moves_of
from moert.runtime.records import Record, RecordSource
from moert.runtime.slot import Slot
from moert.runtime.staging import StagingBuffer, StagingPool
from moert.tiers.arena import SlotBank
from moert.tiers.disk import Buffer, DiskReader, PlannedRead, Priority, ReadPlan, Window
from moert.types import ExpertId


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

    def begun_bytes(self, expert: int) -> int:
        known = self._known[expert] or self._know(expert)
        record, plan = known.record, known.plan
        check_follows = record.check is not None and not record.check.is_over
        is_in_pieces = (
            (record.is_direct or plan.moves is not None)
            and not check_follows
            and all(file.direct for file in plan.files)
        )
        return min(known.read_bytes, self._reader.begun_bytes) if is_in_pieces else known.read_bytes

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
