"""Experts in order: what most policies are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

from moert.types import ExpertId


class Queue:
    """Experts from the oldest to the newest. All but iteration is O(1)."""

    def __init__(self, size: Callable[[ExpertId], int]) -> None:
        """An empty queue; `size` says what an expert adds to `used`."""
        self.used = 0
        self._size = size
        self._order: OrderedDict[ExpertId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, expert: object) -> bool:
        return expert in self._order

    def __iter__(self) -> Iterator[ExpertId]:
        return iter(self._order)

    def push(self, expert: ExpertId) -> None:
        """Add `expert`, which is not in here, as the newest."""
        assert expert not in self._order, f"{expert} is in the queue already"
        self._order[expert] = None
        self.used += self._size(expert)

    def remove(self, expert: ExpertId) -> None:
        """Take `expert` out, wherever it is."""
        del self._order[expert]
        self.used -= self._size(expert)

    def renew(self, expert: ExpertId) -> None:
        """Make `expert` the newest."""
        self._order.move_to_end(expert)

    def pop(self) -> ExpertId:
        """Take the oldest out."""
        expert, _ = self._order.popitem(last=False)
        self.used -= self._size(expert)
        return expert

    def oldest(self, locked: Collection[ExpertId] = ()) -> ExpertId | None:
        """The oldest that is not locked, or None. O(number of locked ones that are older)."""
        return next((expert for expert in self._order if expert not in locked), None)

    def first(self, locked: Collection[ExpertId]) -> ExpertId:
        """The oldest that is not locked; there must be one."""
        expert = self.oldest(locked)
        assert expert is not None, "every expert of the queue is locked"
        return expert
