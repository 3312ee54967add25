"""Where experts are in host memory, for kernels that read them there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_pinning import PinnedHost
from moert.types import ExpertId


class HostAddresses:
    """One layer's experts in host memory, as a table that is looked after when it is asked for."""

    def __init__(self, cache: DeviceCache, pinned: PinnedHost) -> None:
        self._cache, self._pinned = cache, pinned
        self.table = torch.zeros(len(cache.bank.specs), cache.spec.num_experts, dtype=torch.int64)
        """[P, E]: where each expert has each of its tensors, 0 if it is not in host memory."""
        self._slots: Mapping[ExpertId, int] = {}

    def look(self) -> None:
        """Bring `table` up to date; only experts that came or went since the last time cost anything.

        Raises:
            ValueError: one is where kernels cannot read it; the table is as it was, or in between.
        """
        slots = self._cache.host.cache.residency.slots()
        if slots == self._slots:
            return
        known = self._slots
        table = self.table.numpy()
        for expert, slot in slots.items():
            if known.get(expert) != slot:
                table[:, expert.expert] = self._addresses(expert)
        for expert in known.keys() - slots.keys():
            table[:, expert.expert] = 0
        self._slots = slots

    def _addresses(self, expert: ExpertId) -> list[int]:
        from moert.kernels.copy_rows import SCATTERED_ALIGNMENT

        cache = self._cache
        weights = cache.host.weights(expert)
        tensors = [weights[spec.name] for spec in cache.bank.specs]
        if not all(map(self._pinned.is_locked, tensors)):
            raise ValueError(f"expert {expert.expert} of {cache.spec.name} is not in page-locked memory")
        addresses = [tensor.data_ptr() for tensor in tensors]
        if any(address % SCATTERED_ALIGNMENT for address in addresses):
            where = f"at a multiple of {SCATTERED_ALIGNMENT} bytes"
            raise ValueError(f"expert {expert.expert} of {cache.spec.name} does not begin {where}")
        return addresses

    def forget(self) -> None:
        """Host memory has moved, or is going to."""
        self._slots = {}
        self.table.zero_()
