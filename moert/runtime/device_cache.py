"""One layer's experts on a device: who is resident, in which row of a bank, and how one takes another's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moert.residency import Residency
from moert.runtime.device_host import HostLayer
from moert.runtime.device_rows import RowBank
from moert.runtime.layer import LayerSpec
from moert.runtime.stats import LayerStats
from moert.types import ExpertId


class DeviceCache:
    """The residents of one layer in a bank that other layers may share.

    An expert comes up in a row of its own, beside the residents, and is computed there. It becomes resident by
    `install`, which swaps rows: nothing is copied, and nothing is overwritten that a step still needs.
    """

    def __init__(self, spec: LayerSpec, residency: Residency, bank: RowBank, host: HostLayer) -> None:
        """`residency` is empty; the bank has rows for all its slots besides those that experts come up in."""
        self.spec, self.residency, self.bank, self.host = spec, residency, bank, host
        self._row_of: dict[ExpertId, int] = {}
        self.version = 0
        """Changes whenever a resident comes or goes."""

    @property
    def stats(self) -> LayerStats:
        """The layer's; hits and misses in it are those of the device."""
        return self.host.cache.stats

    @property
    def expert_bytes(self) -> int:
        """What copying one expert moves."""
        return self.spec.expert_bytes

    @property
    def rows(self) -> list[int]:
        """Those of its residents."""
        return list(self._row_of.values())

    def row_of(self, expert: ExpertId) -> int:
        """Where a resident is."""
        return self._row_of[expert]

    def weakest(self) -> ExpertId | None:
        """Who would leave next; None if there is a free slot. Between steps."""
        if len(self.residency) < self.residency.capacity:
            return None
        return self.residency.policy.victim(frozenset())

    def install(self, expert: ExpertId, row: int) -> bool:
        """Make `expert`, whose bytes are in `row` or on their way there, resident if it is worth it. The row is the
        bank's again if not, and so is that of whoever left for it."""
        residency = self.residency
        admission = residency.admit(expert) if residency.wants(expert) else None
        if admission is None:
            self.bank.give_back(row)
            return False
        if admission.victim is not None:
            self.bank.give_back(self._row_of.pop(admission.victim))
        self._row_of[expert] = row
        residency.arrive(expert)
        self._changed()
        return True

    def replace(self, expert: ExpertId, row: int, victim: ExpertId | None) -> None:
        """Make `expert` resident in the place of `victim`, or in a free slot. Between steps."""
        if victim is not None:
            self.residency.drop(victim)
            self.bank.give_back(self._row_of.pop(victim))
        admission = self.residency.admit(expert)
        assert admission is not None and admission.victim is None
        self._row_of[expert] = row
        self.residency.arrive(expert)
        self._changed()

    def resize(self, capacity: int) -> None:
        """Have `capacity` slots from now on, between steps; the policy says who leaves if they become fewer."""
        for expert in self.residency.resize(capacity).victims:
            self.bank.give_back(self._row_of.pop(expert))
        self._changed()

    def drop(self, experts: Iterable[ExpertId]) -> None:
        """These residents are lost, between steps."""
        for expert in list(experts):
            self.residency.drop(expert)
            self.bank.give_back(self._row_of.pop(expert))
        self._changed()

    def take_over(self, rows: Mapping[ExpertId, int]) -> None:
        """These are the residents now, in these rows, whoever was before: something else than steps brought them."""
        for expert in self.residency.residents:
            if expert not in rows:
                self.residency.drop(expert)
        for expert in rows:
            if expert not in self.residency:
                admission = self.residency.admit(expert)
                assert admission is not None and admission.victim is None
                self.residency.arrive(expert)
        self._row_of = dict(rows)
        self._changed()

    def recover(self) -> None:
        """Put the books in order after a step that was cut short anywhere: whoever has a row and a slot is resident.

        The bank's free rows are the caller's to find anew.
        """
        kept = self._row_of
        self.residency.recover(self.residency.capacity, keep=True)
        for expert in self.residency.residents:
            if expert not in kept:
                self.residency.drop(expert)
        self._row_of = {expert: row for expert, row in kept.items() if expert in self.residency}
        self._changed()

    def _changed(self) -> None:
        self.version += 1

    def check_integrity(self) -> None:
        """Assert that residents have rows, each its own."""
        self.residency.check_integrity()
        assert set(self._row_of) == set(self.residency.residents), f"rows of {self._row_of}, {self.residency.residents}"
        assert len(set(self._row_of.values())) == len(self._row_of), f"a row twice: {self._row_of}"
