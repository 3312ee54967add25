"""One layer's experts where compute finds them: in slots filled from disk, or in the model's own parameters."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moert.errors import MoertError
from moert.formats import TensorSpec
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
from moert.tiers.disk import DiskReader, Moving, Priority, Read, ReadHandle
from moert.types import ExpertId

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Fetch:
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
    def _can_submit(self) -> bool:
        """Whether `_submit` has the buffers it needs now."""

    @abstractmethod
    def _submit(self, expert: int, slot: int, priority: Priority) -> Fetch:
        """Start reading `expert` into `slot`; returns at once."""

    @abstractmethod
    def read_bytes(self, expert: int) -> int:
        """What bringing `expert` up reads, alignment included."""

    def start(self, expert: ExpertId, priority: Priority) -> Fetch | None:
        """Admit a missing expert and start reading it; returns at once. Settle it with `arrive`.

        Returns:
            None while there is no slot or no buffer for it: settle or release another expert first.
        """
        if not self._can_submit():
            return None
        admission = self.residency.admit(expert)
        if admission is None:
            return None
        self.count_residents()
        try:
            return self._submit(expert.expert, admission.slot, priority)
        except Exception:
            self.residency.abandon(expert)
            raise

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
            return self._submit(expert.expert, slot, Priority.DEMAND)
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

    def _can_submit(self) -> bool:
        return True

    def _submit(self, expert: int, slot: int, priority: Priority) -> Fetch:
        raise AssertionError(f"expert {expert} of {self.spec.name} is in memory and was fetched")

    def read_bytes(self, expert: int) -> int:
        return 0


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
        self._read_bytes: dict[int, int] = {}
        self._moves: dict[int, object | None] = {}
        """How the extension converts an expert's record; None: it cannot."""
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

    def _can_submit(self) -> bool:
        return self._staging is None or self._staging.can_acquire()

    def read_bytes(self, expert: int) -> int:
        known = self._read_bytes.get(expert)
        if known is None:
            known = self._read_bytes[expert] = self._source.record(self.spec.index, expert).read_bytes
        return known

    def _submit(self, expert: int, slot: int, priority: Priority) -> Fetch:
        self._table = None
        record = self._source.record(self.spec.index, expert)
        if self._poison:
            self._bank.poison(slot)
        self._slots[slot].lay_out(record.layout)
        check = None if record.check is None or record.check.is_over else record.check
        if record.is_direct:
            reads = self._reads(record, self._bank.slot(slot))
            finish = None if check is None else lambda _: check(reads)
            return Fetch(self._reader.submit_read(reads, priority, finish=finish), self.read_bytes(expert))
        assert self._staging is not None
        staging = self._staging.acquire()
        target = self._slots[slot].bytes
        reads = self._reads(record, staging.memory)

        def convert(_: tuple[int, ...]) -> None:
            if record.check is not None:
                record.check(reads)
            record.fill(staging.tensor, target)

        moving = None
        if check is None:
            if expert not in self._moves:
                self._moves[expert] = moves_of(record)
            moves = self._moves[expert]
            moving = None if moves is None else Moving(moves, staging.memory, self._bank.slot(slot))
        try:
            handle = self._reader.submit_read(reads, priority, finish=convert, moving=moving)
        except BaseException:
            staging.release()
            raise
        return Fetch(handle, self.read_bytes(expert), staging)

    def _reads(self, record: Record, buffer: memoryview) -> list[Read]:
        return [
            Read(
                self._source.files[span.file],
                span.offset,
                span.nbytes,
                buffer[position : position + span.window_bytes],
            )
            for span, position in zip(record.reads, record.positions, strict=True)
        ]

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
            del self._slots[n_slots:]
        self._take_slots()
        return change

    def recover_slots(self, reader: DiskReader, *, keep: bool) -> None:
        """As `recover`, with as many slots as the bank has now, and another reader from now on."""
        self._reader = reader
        self._table = None
        if not keep:
            self.residency.capacity = self._bank.n_slots
        self.recover(keep=keep)
        self._slots = []
        self._take_slots()
        for expert in self.residency.residents:
            layout = self._source.record(self.spec.index, expert.expert).layout
            self._slot_of(expert.expert).lay_out(layout)

    def _take_slots(self) -> None:
        """Views of the residency's slots that have none yet."""
        for slot in range(len(self._slots), self.residency.capacity):
            self._slots.append(Slot(self._bank.slot(slot)))

    def close(self) -> None:
        """Drop every view of the bank's memory."""
        self._table = None
        self._slots = []
