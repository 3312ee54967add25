"""When a device runs passes by itself, and when the host has to know again what is where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moert.device.base import Device, Graph, OutOfDeviceMemoryError
from moert.errors import KernelUnavailableError
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_counts import DeviceCounts
from moert.runtime.device_kernels import LayerKernels
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_planned import PlannedPasses
from moert.runtime.device_sharing import Sharing
from moert.runtime.device_transfers import DeviceTransfers
from moert.runtime.device_ways import BY_ITSELF, HYBRID, Ways
from moert.runtime.layer import LayerSpec
from moert.schedule import Costs


class PlannedWay:
    """Goes by `PlannedPasses` for the passes that `ways` wants to run so, and leaves it for every other use."""

    def __init__(self, ways: Ways, counts: DeviceCounts) -> None:
        """It takes no pass until it is made."""
        self.ways, self.counts = ways, counts
        self._passes: PlannedPasses | None = None
        self._device: Device | None = None
        self._layers = 0
        self.why_not: str | None = "it was not asked for"
        """Why the device will run no pass by itself; None: it may."""
        self.why_not_shared: str | None = "it was not asked for"
        """Why the CPU has no share of such passes; None: it may."""
        self._has_begun = False
        self._is_captured = False

    def make(
        self,
        device: Device,
        caches: Sequence[DeviceCache],
        kernels: Sequence[LayerKernels],
        pinned: PinnedHost,
        transfers: DeviceTransfers,
        costs: Callable[[], Costs | None] | None = None,
    ) -> None:
        """Get ready, if it can be done at all.

        Args:
            costs: of an expert, as far as they are known, by which the CPU gets a share; None: it gets none.
        """
        try:
            self._passes = PlannedPasses(device, caches, kernels, pinned, transfers)
        except (ValueError, ImportError) as error:
            self._never(str(error))
            return
        self._device, self._layers, self.why_not = device, len(caches), None
        if costs is not None:
            try:
                self._passes.sharing = Sharing(device, caches, costs)
            except ValueError as error:
                self.why_not_shared = str(error)
            else:
                self.why_not_shared = None
        if self.sharing is None:
            self.ways.do_not_share()

    @property
    def sharing(self) -> Sharing | None:
        """The CPU's share of such passes; None: it has none."""
        return None if self._passes is None else self._passes.sharing

    @property
    def is_on(self) -> bool:
        """Whether the host's books are not to be relied upon."""
        return self._passes is not None and self._passes.is_entered

    @property
    def has_begun(self) -> bool:
        """Whether the pass that begins has been told of already, or is none."""
        return self._has_begun or self._is_captured

    def pass_begins(self, tokens: int) -> None:
        """The first layer of a pass is to run."""
        if not self.has_begun:
            self.ways.begin(tokens)
        self._has_begun = False

    def begin(self) -> bool:
        """A pass of one token begins, before its first layer; whether a graph may do all of it."""
        self.ways.begin(1)
        is_planned = self.is_on and self.ways.way in BY_ITSELF
        if is_planned:
            self._begin_pass()
            self._count_steps(self._layers)
        self._has_begun = not is_planned
        return is_planned

    def takes(self, spec: LayerSpec, ids: torch.Tensor) -> bool:
        """Whether a step is run here. If not, the host knows everything there is to know when this returns."""
        if self._passes is None:
            if self.ways.way in BY_ITSELF:
                self.ways.do_not_plan(ever=True)
            return False
        if self._is_captured:
            return True
        is_wanted = self.ways.way in BY_ITSELF and ids.shape == (1, spec.top_k)
        if is_wanted and (self.is_on or (spec.index == 0 and self._enter())):
            if spec.index == 0:
                self._begin_pass()
            return True
        self.settle()
        self.ways.do_not_plan()
        return False

    def _enter(self) -> bool:
        assert self._passes is not None
        why_not = self._passes.why_not()
        if why_not is None and self._passes.is_ready:
            try:
                self._passes.enter()
            except ValueError as error:
                why_not = str(error)
            else:
                self.ways.forget()  # this takes longer than a pass
                return True
        if why_not is not None:
            self._never(why_not)
        return False

    def _begin_pass(self) -> None:
        if self.sharing is not None:
            self._check_share()
            self.sharing.begin(self.ways.way == HYBRID)

    def _check_share(self) -> None:
        """
        Raises:
            KernelUnavailableError: the CPU has not given its share of a pass.
        """
        if self.sharing is None:
            return
        try:
            self.sharing.check()
        except KernelUnavailableError as error:
            self.why_not_shared = str(error)
            self.ways.do_not_share()
            raise

    def _never(self, why_not: str) -> None:
        self._passes, self.why_not = None, why_not
        self.ways.do_not_plan(ever=True)

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """See `PlannedPasses.run`; None: there was no memory for it, no expert is resident any more, and rows are
        nobody's."""
        assert self._passes is not None
        if self._is_captured:
            return self._passes.run(layer, hidden, ids, weights)
        try:
            out = self._passes.run(layer, hidden, ids, weights)
        except OutOfDeviceMemoryError:
            self._passes.abandon()
            self.ways.do_not_plan()
            return None
        self._count_steps(1)
        return out

    def _count_steps(self, steps: int) -> None:
        way = self.ways.way
        self.counts.ways[way] = self.counts.ways.get(way, 0) + steps

    def capture(self, work: Callable[[], object]) -> Graph:
        """Make a graph of a pass that is run here; its steps count as none."""
        assert self._device is not None and self.is_on
        self.ways.forget()  # this takes longer than a pass
        self._begin_pass()
        self._is_captured = True
        try:
            return self._device.capture(work)
        finally:
            self._is_captured = False

    def count(self) -> None:
        """Bring all counts up to date; blocks until the device has got there."""
        if self._passes is not None and self._passes.is_entered:
            self._count()
            self._check_share()

    def _count(self) -> None:
        assert self._passes is not None
        uses, misses, on_cpu = self._passes.count()
        self.counts.on_device += uses - on_cpu
        self.counts.fetched += misses - on_cpu
        self.counts.on_cpu += on_cpu

    def settle(self) -> None:
        """Have the host know everything that there is to know; blocks until the device has got there."""
        if self._passes is not None and self._passes.is_entered:
            self._count()
            self._passes.leave()
            self.ways.forget()
            self._check_share()

    def forget_addresses(self) -> None:
        """Host memory has moved, or is going to."""
        if self._passes is not None:
            self._passes.forget_addresses()

    def recover(self) -> None:
        """After an interrupt that came nobody knows where: what the device was changing is lost."""
        self._has_begun = self._is_captured = False
        self.forget_addresses()
        if self._passes is not None and self._passes.is_entered:
            self._passes.abandon()

    def close(self) -> None:
        """The device does nothing any more. Idempotent."""
        if self.sharing is not None:
            self.sharing.close()
