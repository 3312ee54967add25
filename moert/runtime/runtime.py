"""Everything that keeps one model's experts: the host tier, the reader, the files, and a cache for each layer."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from moert.config import Budget, OffloadConfig
from moert.errors import MoertError
from moert.kernels.moe_block import BlockOutput, ExpertTable
from moert.kernels.token_layer import LayerOutput
from moert.runtime.compute import Compute, Scratch
from moert.runtime.counts import sums, total
from moert.runtime.device_layer import DeviceLayer, Forward
from moert.runtime.host_tier import HostTier, Resized
from moert.runtime.layer import LayerCache
from moert.runtime.look_ahead import LookAhead
from moert.runtime.one_token import TokenArguments, TokenKernel, count_whole, run_whole_layer
from moert.runtime.pace import Pace
from moert.runtime.pipeline import Pipeline
from moert.runtime.planned_calls import PlannedCalls
from moert.runtime.records import RecordSource
from moert.runtime.sizing import HostSizing
from moert.runtime.slot_layer import SlotLayer
from moert.runtime.staging import StagingPool
from moert.runtime.stats import LayerStats, Stats
from moert.runtime.step import SHOWN_TOKENS, run_step
from moert.runtime.uses import whole
from moert.tiers.depth import START_DEPTH
from moert.tiers.disk import DiskReader, Priority
from moert.types import ExpertId

if TYPE_CHECKING:
    from moert.runtime.device_group import DeviceGroup
    from moert.runtime.device_tier import DeviceTier

R = TypeVar("R")

MAX_BYTES_IN_FLIGHT = 1 << 30
"""Of a few huge experts it is not worth reading many at once."""


class OffloadRuntime(PlannedCalls):
    """The experts of one model. Owns its memory, threads and files until `close`; one step runs at a time.

    `moert.runtime.building` makes them.
    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        config: OffloadConfig,
        *,
        tier: HostTier | None = None,
        reader: DiskReader | None = None,
        source: RecordSource | None = None,
        staging: StagingPool | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.config = config
        self.pipeline = Pipeline(self.layers, reads_ahead(config), MAX_BYTES_IN_FLIGHT)
        self._tier = tier
        self._sizing = None if tier is None else HostSizing(tier, self.layers, self.pipeline, config)
        self._pace = Pace(functools.partial(sums, self.layers))
        self._reader = reader
        self._source = source
        self._staging = staging
        self._scratch = Scratch()
        self.look_ahead: LookAhead | None = None
        """Prefetches what the next layers are expected to need; None: nothing is predicted."""
        self._all_rest = False
        """Whether the latest `run_ahead` was of all layers, and no predictor need be told."""
        self._closed: str | None = None
        self._read_s_before = 0.0
        self._read_s_at_reset = 0.0

    def attach(self, device: DeviceTier | DeviceGroup) -> None:
        """Run every step over a device from now on, and own it."""
        assert self.device is None, "there is a device already"
        self.device = device
        if self._sizing is not None:
            self._sizing.device = device
        self.look_ahead = None  # it would prefetch into host memory for steps that it is told nothing of

    def slot_ranges(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of the slots in host memory that are in use."""
        for bank in self._tier.banks if self._tier is not None else ():
            if bank.n_slots:
                yield bank.address(0), bank.n_slots * bank.slot_bytes

    @whole
    def run(
        self,
        layer: int,
        compute: Compute,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        scores: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """One step of one layer; see `run_step`.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self._sizing is not None:
            self._sizing.relieve()
        if layer == 0 and not (self.device is not None and self.device.has_begun):
            self._pace.begin(len(hidden))
        return self._step(layer, compute, hidden, top_k_index, top_k_weights, scores)

    def _step(
        self,
        layer: int,
        compute: Compute,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        scores: Sequence[float] | None = None,
    ) -> torch.Tensor:
        if self.device is not None:
            return self.device.run(layer, compute, hidden, top_k_index, top_k_weights, scores)
        return run_step(
            self.layers[layer],
            compute,
            hidden,
            top_k_index,
            top_k_weights,
            pipeline=self.pipeline,
            scratch=self._scratch,
            look_ahead=self.look_ahead,
            scores=scores,
            check=self.config.debug,
        )

    @whole
    def run_token(
        self, layer: int, kernel: TokenKernel, arguments: TokenArguments, compute: Compute
    ) -> LayerOutput | BlockOutput | None:
        """One token through a whole layer of the model, attention and all, or its block; the output is always there.

        Returns:
            None, and nothing has happened, where the kernel is not for these tensors.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self._sizing is not None:
            self._sizing.relieve()
        is_plain = self.device is None and not self.config.debug
        found = run_whole_layer(self.layers[layer], kernel, arguments, self.pipeline, self.look_ahead, is_plain)
        if found is None:
            return None
        if layer == 0:
            self._pace.begin(1)
        if found.output is not None:
            return found
        output = self._step(layer, compute, found.normed[0], found.ids, found.weights)
        return found._replace(output=kernel.finish(found, output))

    @whole
    def run_ahead(self, layers: Sequence[int], run: Callable[[Sequence[ExpertTable]], R], least: int = 2) -> R | None:
        """Call `run` with the experts of as many of these layers, from the first on, as need nothing but kernels for a
        token: every expert is resident and nothing else to be done. Tell `note_ahead` of each layer that counts.

        Returns:
            None, and `run` is not called, if they are fewer than `least`.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self._sizing is not None:
            self._sizing.relieve()
        tables: list[ExpertTable] = []
        if self.device is None and not self.config.debug and not self.pipeline.busy:
            for layer in layers:
                table = self.layers[layer].table()
                if table is None:
                    break
                tables.append(table)
            # Between two layers that have everything there is nothing to look for.
            if tables and self.look_ahead is not None and not self.look_ahead.rests(layers[len(tables) - 1]):
                tables.pop()
        self._all_rest = len(tables) == len(self.layers) and (self.look_ahead is None or self.look_ahead.rest())
        return run(tables) if len(tables) >= least else None

    def may_run_ahead(self, layers: Iterable[int]) -> bool:
        """Whether `run_ahead` may take all of these layers; asked at any time, without waiting for another use. No: it
        takes fewer."""
        return self._torn or (self.device is None and all(self.layers[layer].is_complete for layer in layers))

    @whole
    def note_ahead(self, layers: Sequence[tuple[int, list[int], float]]) -> None:
        """Layers that `run_ahead` ran, as their turn has come: each with the token's K picks and the seconds that its
        experts took.

        Raises:
            MoertError: the runtime has been closed.
        """
        look_ahead = None if self._all_rest else self.look_ahead
        for layer, picks, experts_s in layers:
            if layer == 0:
                self._pace.begin(1)
            count_whole(self.layers[layer], picks, experts_s, look_ahead)

    @whole
    def run_on_device(
        self,
        layer: int,
        own_forward: Forward,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """One step of a layer on a GPU; see `DeviceLayer.run`. Does not wait for the GPU.

        Raises:
            MoertError: the runtime has been closed.
        """
        cache = self.layers[layer]
        assert isinstance(cache, DeviceLayer)
        return cache.run(own_forward, hidden, top_k_index, top_k_weights)

    def enters(self, layer: int) -> bool:
        """Whether `enter` would do anything; asked at any time, without waiting for another use."""
        # Half-written books say nothing; `enter` puts them in order first.
        return self.look_ahead is not None and (self._torn or self.look_ahead.enters(layer))

    @whole
    def enter(self, layer: int, residual: torch.Tensor) -> None:
        """The block that holds `layer` is given `residual` [T, D]: prefetch what that tells. Returns at once.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self.look_ahead is not None:
            self.look_ahead.enter(layer, residual[-SHOWN_TOKENS:])
            self.pipeline.pump()

    @whole
    def begin_sequence(self) -> None:
        """The steps from here on are of another sequence, or batch of them: every layer's policy is told.

        Raises:
            MoertError: the runtime has been closed.
        """
        for layer in self.layers:
            layer.residency.policy.begin_sequence()
        if self.device is not None:
            self.device.begin_sequence()

    @whole
    def hint(self, token_ids: Sequence[int]) -> None:
        """These tokens are expected after those of the next forward pass, of one sequence.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self.look_ahead is not None:
            self.look_ahead.hint(np.asarray(token_ids, np.int64))

    @property
    def reads(self) -> bool:
        """Whether experts come from disk."""
        return self._reader is not None

    @whole
    def prefetch(self, experts: Sequence[ExpertId], priority: Priority = Priority.PREFETCH) -> None:
        """Bring experts up that may be needed soon, the first one first, when no step waits for others. Returns at
        once; a step that needs one of them waits for the rest of its read only.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self.device is not None:
            self.device.prefetch(experts)
            return
        self.pipeline.prefetch(experts, priority)
        self.pipeline.pump()

    @whole
    def withdraw(self, experts: Iterable[ExpertId]) -> None:
        """These experts are not expected any more: a prefetch whose read has not started is cancelled. Returns at once.

        Raises:
            MoertError: the runtime has been closed.
        """
        if self.device is not None:
            self.device.withdraw(experts)
        self.pipeline.withdraw(experts)

    @whole
    def weights(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """A copy of one expert's tensors as its module has them, wherever they are; blocks while they are read.

        New memory is the caller's.
        """
        cache = self.layers[layer]
        identity = ExpertId(layer, expert)
        if self.device is not None and identity not in cache.residency:
            self.device.settle()  # it reads from where another expert may have to go
        misses = cache.residency.begin([identity]).misses
        try:
            self.pipeline.demand(misses)
            while identity not in cache.residency:
                self.pipeline.pump()
                self.pipeline.wait()
        except MoertError:
            self.pipeline.withdraw([identity])
            cache.residency.end()
            raise
        copies = {name: tensor.clone() for name, tensor in cache.own_weights(expert).items()}
        cache.residency.end()
        return copies

    def stats(self) -> Stats:
        """A snapshot of the counts."""
        with self._lock:
            if self.device is not None and self._closed is None and not self._torn:
                self.device.count()
        return total(
            self.layers,
            read_s=self._read_s() - self._read_s_at_reset,
            slot_bytes=self._slot_bytes(),
            shrinks=0 if self._sizing is None else self._sizing.shrinks,
            decoding=self._pace.decoding(),
        )

    def reset_stats(self) -> None:
        """Start all counts at zero; what is resident stays resident."""
        for layer in self.layers:
            kept = layer.stats
            layer.stats = LayerStats(kept.name, resident_bytes=kept.resident_bytes, fallback=kept.fallback)
        self._read_s_at_reset = self._read_s()
        if self._sizing is not None:
            self._sizing.shrinks = 0
        self._pace.reset()

    @whole
    def resize(self, budget: Budget | None, reserved_bytes: int = 0) -> Resized:
        """Give the host tier another size, between two steps; see `moert.resize` and `HostSizing.resize`."""
        if self._sizing is None:
            raise MoertError(
                "this model's experts are all in its own parameters, where moert.patch left them, so there are no "
                "slots to resize; unpatch it and patch it with a smaller host_memory"
            )
        return self._sizing.resize(budget, reserved_bytes)

    def _recover(self) -> None:
        """Go on after an interrupt that came nobody knows where: what is surely whole stays resident.

        Blocks until no read is under way: a slot whose transfer was lost may still be written.
        """
        if self.device is not None:
            self.device.recover()
        if self._reader is not None:
            self._reader.close()
            self._read_s_before += self._reader.totals().read_s
            self._reader = DiskReader(depth=self.config.io_depth)
        keep = self._sizing is None or self._sizing.recover()
        if self._staging is not None:
            self._staging.recover()
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                assert self._reader is not None
                layer.recover_slots(self._reader, keep=keep)
            else:
                layer.recover(keep=True)
        self.pipeline.recover()
        if self.device is not None:
            self.device.after_host_changes()
        if self._sizing is not None:
            self._sizing.settle()

    def _slot_bytes(self) -> int:
        return self._tier.arena.committed_bytes if self._tier is not None else 0

    def _read_s(self) -> float:
        return self._read_s_before + (self._reader.totals().read_s if self._reader is not None else 0.0)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise MoertError(self._closed)
        if self._tier is not None and self._tier.arena.closed:
            # Neither the slots' contents nor the reader's threads come along into a forked child.
            raise MoertError(
                f"this model's experts belong to the process that loaded it, and this is a fork of it ({os.getpid()}); "
                "load the model in the process that runs it"
            )

    def close(self, why: str = "this model's experts were closed; load or patch the model again") -> None:
        """Stop the threads, close the files and free the memory; waits for reads in flight. Idempotent."""
        with self._lock:
            # All of it again if it has been closed before: that may have been interrupted.
            self._closed = self._closed or why
            if self.device is not None:
                self.device.close()  # it may be reading the slots
            if self._reader is not None:
                self._reader.close()
            for layer in self.layers:
                if isinstance(layer, SlotLayer):
                    layer.close()
            if self._source is not None:
                self._source.close()
            if self._staging is not None:
                self._staging.close()
            if self._tier is not None:
                self._tier.close()

    def __enter__(self) -> OffloadRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def reads_ahead(config: OffloadConfig) -> int:
    """How many records to submit at once, so that no lane of the reader is idle between two of them."""
    return 2 * (config.io_depth or START_DEPTH)
