"""The CPU's share of passes that a device runs by itself: which misses are left to it, and how it is asked for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from moert.device.base import Device, PinningRefusedError
from moert.errors import KernelUnavailableError
from moert.kernels.cpu_ffn import ExpertFfn
from moert.runtime.device_cache import DeviceCache
from moert.schedule import Costs, Item, Place, make_scheduler
from moert.types import ExpertId

if TYPE_CHECKING:
    from moert.kernels.planning import Plan, Split
    from moert.runtime.device_triton import RowByPick


def fetch_table(top_k: int, costs: Costs) -> list[int]:
    """Of how many misses of a token so many are fetched, by the exact scheduler: [top_k + 1], by the misses.

    The others of the token's experts are taken to be resident.
    """
    exact = make_scheduler("exact")

    def fetched(misses: int) -> int:
        places = [Place.HOST] * misses + [Place.DEVICE] * (top_k - misses)
        items = [Item(ExpertId(0, number), 1, place) for number, place in enumerate(places)]
        return len(exact.plan(items, costs).fetch)

    return [fetched(misses) for misses in range(top_k + 1)]


class Sharing:
    """Has the CPU compute what a table says of each layer's misses, while the device fetches and computes the others.

    A thread of csrc/ answers the device: no Python runs for it. Used between `enter` and `leave` of `PlannedPasses`.
    """

    def __init__(
        self,
        device: Device,
        caches: Sequence[DeviceCache],
        costs: Callable[[], Costs | None],
        *,
        most_polls: int | None = None,
    ) -> None:
        """Takes some kilobytes on the device and of page-locked memory.

        Args:
            caches: of the layers, each with fused kernels.
            costs: what is known of an expert's costs by now; all misses are fetched as long as that is nothing.
            most_polls: see `moert.kernels.collect`; None: the default.

        Raises:
            ValueError: layers that differ in the hidden states that they take, or no memory can be page-locked.
        """
        from moert.kernels.mailbox import MOST_POLLS, Mailbox, new_letters
        from moert.kernels.planning import Split

        takes = {(of.dtype, of.hidden) for of in map(_ffn, caches)}
        if len(takes) > 1:
            raise ValueError(f"the layers take hidden states of {len(takes)} kinds")
        ((self.dtype, hidden),) = takes
        self._device, self._costs = device, costs
        self.most_polls = MOST_POLLS if most_polls is None else most_polls
        where = device.torch_device
        top_ks = {cache.spec.top_k for cache in caches}
        try:
            self.letters = new_letters(hidden, max(top_ks), self.dtype, where, device.allocate_pinned)
        except PinningRefusedError as error:
            raise ValueError(str(error)) from error
        self.mailbox = Mailbox(self.letters)
        self._places = {cache.spec.index: place for place, cache in enumerate(caches)}
        self._caches = tuple(caches)
        self._tables = {k: torch.arange(k + 1, dtype=torch.int32, device=where) for k in top_ks}
        self._current: Costs | Callable[[int], Sequence[int]] | None = None
        """What the tables are of; None: all is fetched."""
        self._splits = {
            cache.spec.index: Split(self._tables[cache.spec.top_k], torch.zeros(1, dtype=torch.int64, device=where))
            for cache in caches
        }
        self._counted = dict.fromkeys(self._splits, 0)
        self._knows_addresses = False
        self.forced: Callable[[int], Sequence[int]] | None = None
        """Top-k -> table, in the place of what the costs say; for checks."""

    def enter(self) -> None:
        """All experts are in host memory from here on, and stay where they are."""
        from moert.kernels.moe_block import ExpertTable

        if self._knows_addresses:
            return
        for place, cache in enumerate(self._caches):
            host, ffn = cache.host.cache, _ffn(cache)
            self.mailbox.set_layer(place, ffn, ExpertTable(ffn, host.fused_experts(host.ids)))
        self._knows_addresses = True

    def leave(self) -> None:
        """The device has done everything; nothing of host memory is read any more when this returns."""
        self.mailbox.pause()

    def forget_addresses(self) -> None:
        """Host memory has moved, or is going to."""
        self._knows_addresses = False

    def begin(self, shares: bool) -> None:
        """A pass begins: with a share for the CPU, or with all misses fetched. Waits for nothing."""
        of = (self.forced or self._costs()) if shares else None
        if of is not self._current:
            self._current = of
            copies = [(there, torch.tensor(_table(k, of), dtype=torch.int32)) for k, there in self._tables.items()]

            def work() -> None:
                for there, here in copies:
                    there.copy_(here)

            self._device.compute.launch(work)
        if shares:
            self.mailbox.arm()

    def split(self, layer: int) -> Split:
        """What a layer's planner goes by."""
        return self._splits[layer]

    def post(self, layer: int, plan: Plan, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Ask for what the plan leaves to the CPU; within a launch."""
        from moert.kernels.post import post

        assert plan.on_cpu is not None and plan.on_cpu_count is not None
        post(self.letters, self._places[layer], hidden, ids, weights, plan.on_cpu, plan.on_cpu_count)

    def compute(
        self,
        plan: Plan,
        kernels: RowByPick,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        slot_of: torch.Tensor,
    ) -> torch.Tensor:
        """What the experts on the device give, and the CPU's: one sum in fp32, rounded once; within a launch."""
        from moert.kernels.collect import collect
        from moert.kernels.device_experts import device_experts

        assert plan.on_cpu_count is not None
        sums = torch.empty_like(hidden, dtype=torch.float32)
        device_experts(kernels.bank, hidden, ids, weights, slot_of, out=sums)
        return collect(self.letters, sums, plan.on_cpu_count, dtype=hidden.dtype, most_polls=self.most_polls)

    def count(self, layer: int) -> int:
        """How many experts of a layer were left to the CPU since the last time; blocks until the device has got
        there."""
        now = int(self._device.to_host(self._splits[layer].left))
        before, self._counted[layer] = self._counted[layer], now
        return now - before

    def check(self) -> None:
        """
        Raises:
            KernelUnavailableError: an answer did not come, or was none. It is said once.
        """
        why = self.mailbox.failure
        if why is not None:
            self.letters.failed.zero_()
            raise KernelUnavailableError(
                f"the CPU did not give its share of a token that {self._device.name} computes by itself ({why}), so "
                "the results of that token are NaN; from here on the CPU gets no share of such tokens. Generate again"
            )

    def close(self) -> None:
        """The device does nothing any more. Idempotent."""
        self.mailbox.close()


def _ffn(cache: DeviceCache) -> ExpertFfn:
    fused = cache.spec.fused
    assert fused is not None
    return fused.ffn


def _table(top_k: int, of: Costs | Callable[[int], Sequence[int]] | None) -> Sequence[int]:
    if of is None:
        return range(top_k + 1)
    return fetch_table(top_k, of) if isinstance(of, Costs) else of(top_k)
