"""One layer's experts: what every cache of them does, and those in the parameters of the model itself."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moert.errors import MoertError
from moert.formats import TensorSpec
from moert.kernels.cpu_ffn import Expert
from moert.kernels.moe_block import ExpertTable
from moert.residency import Residency
from moert.runtime.fused import FusedExperts
from moert.runtime.staging import StagingBuffer
from moert.runtime.stats import LayerStats
from moert.runtime.storage import Storage
from moert.tiers.disk import Priority, ReadHandle
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

    @property
    def is_complete(self) -> bool:
        """Whether every expert is resident."""
        return len(self.residency) >= self.spec.num_experts

    def table(self) -> ExpertTable | None:
        """All experts for the layer's fused kernels, as long as all are resident; valid until one is evicted."""
        if self.spec.fused is None or not self.is_complete:
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

    def begun_bytes(self, expert: int) -> int:
        """Of a read of `expert` that nobody waits for and that is given up, what is read nevertheless at most."""
        return self.read_bytes(expert)

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
