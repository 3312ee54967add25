"""Everything that keeps one model's experts: the arena, the reader, the files, and a cache for each layer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import torch

from moert.config import OffloadConfig
from moert.errors import MoertError
from moert.plan import LayerNeed, default_budget, plan_slots
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime.compute import Compute
from moert.runtime.layer import LayerCache, LayerSpec, ParameterLayer, SlotLayer, Weights
from moert.runtime.preload import Progress, preload
from moert.runtime.records import RecordSource
from moert.runtime.staging import StagingPool
from moert.runtime.stats import LayerStats, Stats
from moert.runtime.step import run_step
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import DiskReader
from moert.tiers.memory import available_bytes
from moert.types import ExpertId


class OffloadRuntime:
    """The experts of one model. Owns its memory, threads and files until `close`; one step runs at a time."""

    def __init__(
        self,
        layers: Sequence[LayerCache],
        config: OffloadConfig,
        *,
        arena: HostArena | None = None,
        reader: DiskReader | None = None,
        source: RecordSource | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.config = config
        self._arena = arena
        self._reader = reader
        self._source = source
        self._lock = threading.Lock()
        self._closed: str | None = None
        self._read_s_at_reset = 0.0

    @classmethod
    def in_parameters(
        cls, specs: Sequence[LayerSpec], weights: Sequence[Sequence[Weights]], config: OffloadConfig
    ) -> OffloadRuntime:
        """All experts stay where they are; `weights[layer][expert]` are views the caller owns."""
        layers = [
            ParameterLayer(spec, Residency(spec.num_experts, make_policy(config.policy, spec.num_experts)), views)
            for spec, views in zip(specs, weights, strict=True)
        ]
        return cls(layers, config)

    @classmethod
    def in_slots(
        cls,
        specs: Sequence[LayerSpec],
        source: RecordSource,
        config: OffloadConfig,
        progress: Progress | None = None,
    ) -> OffloadRuntime:
        """Experts come from `source`, which the runtime owns (and closes) once this has returned.

        Allocates the host tier, and blocks while experts are preloaded if `config.preload` asks for it.

        Raises:
            CapacityError: the budget is too small for one token, or the memory cannot be had.
            CorruptFileError, TransferError: a preloaded expert could not be read.
        """
        opened: list[Callable[[], None]] = []
        try:
            records = [[source.record(spec.index, expert) for expert in range(spec.num_experts)] for spec in specs]
            slot_bytes = [max(record.slot_bytes for record in layer) for layer in records]
            slots = cls.plan(specs, source, config, available_bytes())
            staged = [record.buffer_bytes for layer in records for record in layer if not record.is_direct]
            n_staging, staging_bytes = (2 * config.io_depth, max(staged)) if staged else (0, 0)
            total = sum(n * size for n, size in zip(slots, slot_bytes, strict=True))
            arena = HostArena(total + n_staging * staging_bytes)
            opened.append(arena.close)
            reader = DiskReader(depth=config.io_depth)
            opened.append(reader.close)
            staging = StagingPool(SlotBank(arena, total, staging_bytes, n_staging)) if staged else None
            layers: list[LayerCache] = []
            offset = 0
            for spec, size, n in zip(specs, slot_bytes, slots, strict=True):
                residency = Residency(n, make_policy(config.policy, n))
                layers.append(
                    SlotLayer(
                        spec, residency, SlotBank(arena, offset, size, n), source, reader, staging, poison=config.debug
                    )
                )
                offset += n * size
            fits = all(n == spec.num_experts for n, spec in zip(slots, specs, strict=True))
            if config.preload if config.preload is not None else fits:
                preload(layers, 2 * config.io_depth, progress)
            return cls(layers, config, arena=arena, reader=reader, source=source)
        except BaseException:
            for close in reversed(opened):
                close()
            raise

    @staticmethod
    def plan(
        specs: Sequence[LayerSpec], source: RecordSource, config: OffloadConfig, available_bytes: int
    ) -> list[int]:
        """Slots of each layer in `in_slots`, with `available_bytes` of memory to be had; nothing is allocated.

        Raises:
            CapacityError: the budget is too small for one token.
        """
        needs = [
            LayerNeed(
                name=spec.name,
                num_experts=spec.num_experts,
                slot_bytes=max(source.record(spec.index, expert).slot_bytes for expert in range(spec.num_experts)),
                expert_bytes=spec.expert_bytes,
                top_k=spec.top_k,
            )
            for spec in specs
        ]
        return plan_slots(needs, config.host_budget or default_budget(needs, available_bytes))

    def run(
        self,
        layer: int,
        compute: Compute,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """One step of one layer; see `run_step`.

        Raises:
            MoertError: the runtime has been closed.
        """
        with self._lock:
            self._check_open()
            return run_step(
                self.layers[layer],
                compute,
                hidden,
                top_k_index,
                top_k_weights,
                reads_in_flight=2 * self.config.io_depth,
                check=self.config.debug,
            )

    def weights(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """A copy of one expert's tensors, wherever they are; blocks while they are read. New memory is the caller's."""
        with self._lock:
            self._check_open()
            cache = self.layers[layer]
            identity = ExpertId(layer, expert)
            try:
                if cache.residency.begin([identity]).misses:
                    fetch = cache.start(identity)
                    assert fetch is not None, "nothing is locked, so there is a slot"
                    cache.arrive(identity, fetch)
                return {name: tensor.clone() for name, tensor in cache.weights(expert).items()}
            finally:
                cache.residency.end()

    def stats(self) -> Stats:
        """A snapshot of the counts."""
        layers = tuple(replace(layer.stats) for layer in self.layers)
        return Stats(
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            bytes_read=sum(layer.bytes_read for layer in layers),
            read_s=self._read_s() - self._read_s_at_reset,
            stall_s=sum(layer.stall_s for layer in layers),
            compute_s=sum(layer.compute_s for layer in layers),
            resident_bytes=sum(layer.resident_bytes for layer in layers),
            expert_bytes=sum(layer.spec.num_experts * layer.spec.expert_bytes for layer in self.layers),
            slot_bytes=self._arena.nbytes if self._arena is not None else 0,
            layers=layers,
        )

    def reset_stats(self) -> None:
        """Start all counts at zero; what is resident stays resident."""
        for layer in self.layers:
            layer.stats = LayerStats(layer.stats.name, resident_bytes=layer.stats.resident_bytes)
        self._read_s_at_reset = self._read_s()

    def _read_s(self) -> float:
        return self._reader.totals().read_s if self._reader is not None else 0.0

    def _check_open(self) -> None:
        if self._closed is not None:
            raise MoertError(self._closed)
        if self._arena is not None and self._arena.closed:
            # Neither the slots' contents nor the reader's threads come along into a forked child.
            raise MoertError(
                f"this model's experts belong to the process that loaded it, and this is a fork of it ({os.getpid()}); "
                "load the model in the process that runs it"
            )

    def close(self, why: str = "this model's experts were closed; load or patch the model again") -> None:
        """Stop the threads, close the files and free the memory; waits for reads in flight. Idempotent."""
        with self._lock:
            if self._closed is not None:
                return
            self._closed = why
            if self._reader is not None:
                self._reader.close()
            for layer in self.layers:
                if isinstance(layer, SlotLayer):
                    layer.close()
            if self._source is not None:
                self._source.close()
            if self._arena is not None:
                self._arena.close()

    def __enter__(self) -> OffloadRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
