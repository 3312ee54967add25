"""When a device runs passes by itself, and when the host has to know again what is where."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from moert.device.base import Device, Graph, Lease, OutOfDeviceMemoryError
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
        self._costs: Callable[[], Costs | None] | None = None
        self.why_not: str | None = "it was not asked for"
        """Why the device will run no pass by itself; None: it may."""
        self.why_not_shared: str | None = "it was not asked for"
        """Why the CPU has no share of such passes; None: it may."""
        self._is_said = False
        """That there was no memory."""
        self._has_begun = False
        self._is_captured = False
        self._captured: Counter[int] = Counter()
        """Steps of each layer in what is captured."""
        self._is_tried = False
        """Whether the pass under way is one that may turn out to be void."""
        self._was_void = False
        """Whether the host is in charge because of that, for the rest of one pass."""
        self._again: Callable[[], None] | None = None
        """Makes it as it was made before `unmake`."""

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
        except (OutOfDeviceMemoryError, torch.OutOfMemoryError) as error:
            # Where banks become smaller, or larger again, there may be some.
            self.why_not = str(error)
            self._again = lambda: self.make(device, caches, kernels, pinned, transfers, costs)
            return
        self._device, self._costs, self.why_not = device, costs, None
        if costs is not None:
            try:
                self._passes.sharing = Sharing(device, caches, costs)
            except (ValueError, OutOfDeviceMemoryError, torch.OutOfMemoryError) as error:
                self.why_not_shared = str(error)
            else:
                self.why_not_shared = None
        if self.sharing is None:
            self.ways.do_not_share()

    def unmake(self) -> None:
        """Let go of everything on the device, between passes; all of what `capture` gave is gone already. None is run
        before `remake`. Idempotent."""
        passes, device = self._passes, self._device
        if passes is None or device is None:
            return
        parts, costs = passes.parts, self._costs
        self._again = lambda: self.make(device, *parts, costs)
        if passes.sharing is not None:
            passes.sharing.close()
        self._passes, self.why_not = None, "its slots are being made anew"

    def remake(self) -> None:
        """Get ready again after `unmake`, if it was ready before. Idempotent."""
        again, self._again = self._again, None
        if again is not None:
            again()

    @property
    def sharing(self) -> Sharing | None:
        """The CPU's share of such passes; None: it has none."""
        return None if self._passes is None else self._passes.sharing

    def go_by(self, ways: Ways) -> None:
        """Between passes: run them as `ways` says from here on."""
        self.ways, self._has_begun = ways, False

    @property
    def is_on(self) -> bool:
        """Whether the host's books are not to be relied upon."""
        return self._passes is not None and self._passes.is_entered

    @property
    def has_begun(self) -> bool:
        """Whether the pass that begins has been told of already, or is none."""
        return self._has_begun or self._is_captured

    @property
    def may_miss(self) -> bool:
        """Whether passes that are run here now may need what is on disk."""
        return self._passes is not None and self._passes.may_miss

    def pass_begins(self, tokens: int) -> None:
        """The first layer of a pass is to run."""
        if not self.has_begun:
            self._was_void = False
            # Nobody will ask whether it was void.
            self.ways.begin(tokens, may_plan=self._passes is not None and self._passes.is_complete)
        if not self._is_captured:
            self._has_begun = False

    def begin(self, can_repeat: Callable[[], bool]) -> bool:
        """A pass of one token begins, before its first layer, of somebody who will ask `is_void` when it is over and
        then do it again, if he `can_repeat` it; whether a graph may do all of it."""
        passes, charged, self._was_void = self._passes, self._was_void, False
        # Where the one before was cut short and void, this one is too: that stays until somebody enters anew.
        self._is_tried = False
        may_miss = passes is not None and not passes.is_complete
        may_plan = passes is not None and (not may_miss or can_repeat())
        self.ways.begin(1, may_plan=may_plan, may_miss=may_miss)
        self._has_begun = True
        if passes is None or self.ways.way not in BY_ITSELF:
            return False
        if not self.is_on and not self._enter(charged=charged):
            self.ways.do_not_plan()
            return False
        self._is_tried = passes.may_miss
        if self._is_tried:
            passes.begin_pass()
        self._begin_share()
        assert self._device is not None
        _ = self._device.compute  # a graph's inputs come next, which a pass in another stream may be reading
        return True

    def is_void(self) -> bool:
        """Whether the pass that is over, of which `begin` was told, has to be done again, by the host; blocks until it
        is over, unless it cannot be."""
        if not self._is_tried:
            return False
        assert self._passes is not None
        self._is_tried = False
        if not self._passes.is_void():
            return False
        if self.is_on:
            self._leave(again=True)
        self.ways.go_on()
        self._was_void = self._has_begun = True
        return True

    def takes(self, spec: LayerSpec, ids: torch.Tensor) -> bool:
        """Whether a step is run here. If not, the host knows everything there is to know when this returns."""
        if self._passes is None:
            return False
        if self._is_captured:
            return True
        is_wanted = self.ways.way in BY_ITSELF and ids.shape == (1, spec.top_k)
        begins = spec.index == 0 and self._passes.is_complete
        if is_wanted and (self.is_on or (begins and self._enter())):
            if begins:
                self._begin_share()
            return True
        self.settle()
        self.ways.do_not_plan()
        return False

    def _enter(self, *, charged: bool = False) -> bool:
        """`charged`: the time that it takes is part of what the passes take."""
        assert self._passes is not None
        try:
            self._passes.enter()
        except ValueError as error:
            self._never(str(error))
            return False
        except OutOfDeviceMemoryError as error:
            self._say(error)
            return False
        if not charged:
            self.ways.forget()
        return True

    def _begin_share(self) -> None:
        if self.sharing is not None and not self.may_miss:
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
            self._captured[layer] += 1
            return self._passes.run(layer, hidden, ids, weights, is_captured=True)
        try:
            out = self._passes.run(layer, hidden, ids, weights)
        except OutOfDeviceMemoryError as error:
            self._say(error)
            self._passes.abandon()
            self.ways.do_not_plan()
            return None
        self._count_steps([layer])
        return out

    def _say(self, error: OutOfDeviceMemoryError) -> None:
        if not self._is_said:
            self._is_said = True
            warnings.warn(
                f"{error}: the device cannot run single tokens by itself while that is so, and the host decides about "
                "them, which is slower; end what else uses the device, or give device_memory less",
                RuntimeWarning,
                stacklevel=2,
            )

    def _count_steps(self, layers: Sequence[int]) -> None:
        assert self._passes is not None
        self._passes.asked.update(layers)
        way = self.ways.way
        self.counts.ways[way] = self.counts.ways.get(way, 0) + len(layers)

    def capture(self, work: Callable[[], object]) -> Graph:
        """Make a graph of a pass that is run here; its steps count when it is replayed."""
        assert self._device is not None and self.is_on
        self.ways.forget()  # this takes longer than a pass
        self._begin_share()
        self._is_captured = True
        self._captured.clear()
        try:
            graph = self._device.capture(work)
        finally:
            self._is_captured = False
        return _CountedGraph(self, graph, list(self._captured.elements()))

    def replays(self, layers: Sequence[int]) -> list[Lease]:
        """A graph of steps of these layers does a pass that `begin` was told of; returns what it reads."""
        assert self._passes is not None
        self._has_begun = False
        self._count_steps(layers)
        return self._passes.leases(layers)

    def count(self) -> None:
        """Bring all counts up to date; blocks until the device has got there."""
        if self._passes is not None and self._passes.is_entered:
            self._add(*self._passes.count())
            self._check_share()

    def _add(self, uses: int, misses: int, on_cpu: int) -> None:
        self.counts.on_device += uses - on_cpu
        self.counts.fetched += misses - on_cpu
        self.counts.on_cpu += on_cpu

    def settle(self) -> None:
        """Have the host know everything that there is to know; blocks until the device has got there."""
        if self.is_on:
            self._leave()
            self.ways.forget()
            self._check_share()

    def _leave(self, *, again: bool = False) -> None:
        assert self._passes is not None
        self._add(*self._passes.leave(again=again))

    def forget_addresses(self) -> None:
        """Host memory has moved, or is going to."""
        if self._passes is not None:
            self._passes.forget_addresses()

    def recover(self) -> None:
        """After an interrupt that came nobody knows where: what the device was changing is lost."""
        self._has_begun = self._is_captured = self._is_tried = self._was_void = False
        self.forget_addresses()
        if self._passes is not None and self._passes.is_entered:
            self._passes.abandon()

    def close(self) -> None:
        """The device does nothing any more; let go of what is there. Idempotent."""
        if self.sharing is not None:
            self.sharing.close()
        self._passes = None


class _CountedGraph(Graph):
    """A pass whose steps count at each replay."""

    def __init__(self, way: PlannedWay, graph: Graph, layers: Sequence[int]) -> None:
        self._way, self._graph, self._layers = way, graph, layers

    def replay(self, reads: Sequence[Lease] = ()) -> None:
        self._graph.replay([*reads, *self._way.replays(self._layers)])
