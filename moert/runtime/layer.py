"""One layer's experts where compute finds them: in slots filled from disk, or in the model's own parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moert.formats import TensorSpec
from moert.kernels.cpu import Expert
from moert.residency import Residency
from moert.runtime.fused import FusedExperts
from moert.runtime.records import Record, RecordSource
from moert.runtime.staging import StagingBuffer, StagingPool
from moert.runtime.stats import LayerStats
from moert.tiers.arena import SlotBank
from moert.tiers.disk import DiskReader, Priority, Read, ReadHandle
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

    @property
    def expert_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


class LayerCache(ABC):
    """One layer's experts: who is resident, and how the others come up. Used by one step at a time."""

    def __init__(self, spec: LayerSpec, residency: Residency) -> None:
        self.spec = spec
        self.residency = residency
        self.stats = LayerStats(spec.name)
        self._fused: dict[int, Expert] = {}

    @abstractmethod
    def weights(self, expert: int) -> Weights:
        """A resident expert's tensors; valid while it is locked, read-only."""

    def fused_expert(self, expert: int) -> Expert:
        """A resident expert as the layer's fused kernels take it; valid while it is locked."""
        found = self._fused.get(expert)
        if found is None:
            assert self.spec.fused is not None
            found = self._fused[expert] = self.spec.fused.expert(self.weights(expert))
        return found

    @abstractmethod
    def _can_submit(self) -> bool:
        """Whether `_submit` has the buffers it needs now."""

    @abstractmethod
    def _submit(self, expert: int, slot: int) -> Fetch:
        """Start reading `expert` into `slot`; returns at once."""

    def start(self, expert: ExpertId) -> Fetch | None:
        """Admit a missing expert and start reading it; returns at once. Settle it with `arrive`.

        Returns:
            None while there is no slot or no buffer for it: settle or release another expert first.
        """
        if not self._can_submit():
            return None
        admission = self.residency.admit(expert)
        if admission is None:
            return None
        if admission.victim is not None:
            self.stats.resident_bytes -= self.spec.expert_bytes
            self._fused.pop(admission.victim.expert, None)
        try:
            return self._submit(expert.expert, admission.slot)
        except BaseException:
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
            fetch.finish()
            self.residency.abandon(expert)
            raise
        fetch.finish()
        self.stats.bytes_read += fetch.read_bytes
        self.stats.read_s += fetch.handle.read_s
        self.stats.resident_bytes += self.spec.expert_bytes


class ParameterLayer(LayerCache):
    """Every expert resident in the parameters of the model's own experts module; there is never a miss."""

    def __init__(self, spec: LayerSpec, residency: Residency, weights: Sequence[Weights]) -> None:
        """`residency` has room for every expert and is filled here; `weights[e]` are views the caller owns."""
        super().__init__(spec, residency)
        self.stats.resident_bytes = spec.num_experts * spec.expert_bytes
        self._weights = weights
        experts = [ExpertId(spec.index, expert) for expert in range(spec.num_experts)]
        residency.begin(experts)
        for expert in experts:
            residency.admit(expert)
        residency.end()

    def weights(self, expert: int) -> Weights:
        return self._weights[expert]

    def _can_submit(self) -> bool:
        return True

    def _submit(self, expert: int, slot: int) -> Fetch:
        raise AssertionError(f"expert {expert} of {self.spec.name} is in memory and was fetched")


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
        self._slots = [torch.frombuffer(bank.slot(slot), dtype=torch.uint8) for slot in range(bank.n_slots)]
        self._views: list[Weights] = [{} for _ in self._slots]

    def weights(self, expert: int) -> Weights:
        slot = self.residency.slot_of(ExpertId(self.spec.index, expert))
        assert slot is not None, f"expert {expert} of {self.spec.name} is not resident"
        return self._views[slot]

    def _can_submit(self) -> bool:
        return self._staging is None or self._staging.can_acquire()

    def _submit(self, expert: int, slot: int) -> Fetch:
        record = self._source.record(self.spec.index, expert)
        if self._poison:
            self._bank.poison(slot)
        self._views[slot] = record.layout.views(self._slots[slot])
        if record.is_direct:
            reads = self._reads(record, self._bank.slot(slot))
            return Fetch(self._reader.submit_read(reads, Priority.DEMAND), record.read_bytes)
        assert self._staging is not None
        staging = self._staging.acquire()
        target = self._slots[slot]

        def convert(_: tuple[int, ...]) -> None:
            record.fill(staging.tensor, target)

        try:
            handle = self._reader.submit_read(self._reads(record, staging.memory), Priority.DEMAND, finish=convert)
        except BaseException:
            staging.release()
            raise
        return Fetch(handle, record.read_bytes, staging)

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

    def close(self) -> None:
        """Drop every view of the bank's memory."""
        self._fused = {}
        self._views = []
        self._slots = []
