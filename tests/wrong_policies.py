"""Policies that do what they must not; in a module of their own, for processes that replay them to import no more."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies.lru import LRU
from moert.types import ExpertId


class Nobody(LRU):
    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return None  # type: ignore[return-value]


class Absent(LRU):
    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return ExpertId(0, 77)


class Locked(LRU):
    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return max(self._queue)


class Number(LRU):
    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return super().victim(locked).expert  # type: ignore[return-value]


class Raises(LRU):
    def access(self, event: Sequence[ExpertId]) -> None:
        raise KeyError("the key")


class FailsToAdmit(LRU):
    def admit(self, expert: ExpertId) -> None:
        raise ValueError("no")


class FailsLater(LRU):
    """Fails when much has been read already."""

    events = 0

    def access(self, event: Sequence[ExpertId]) -> None:
        self.events += 1
        assert self.events < 4, "enough"
        super().access(event)
