"""SIEVE."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies.base import Policy
from moert.types import ExpertId


class _Node:
    __slots__ = ("expert", "newer", "older", "visited")

    def __init__(self, expert: ExpertId, older: _Node | None) -> None:
        self.expert = expert
        self.older = older
        self.newer: _Node | None = None
        self.visited = False


class SIEVE(Policy):
    """A queue in order of admission and a hand that goes from old to new (Zhang, Yang, Yue, Vigfusson, Rashmi, 2024).

    A hit sets an expert's mark and moves nothing. The hand clears the marks that it meets and stops at the first expert
    without one, which leaves; from the newest it goes on to the oldest. It passes by locked experts and leaves their
    marks alone. The marks of an event's hits are set before its first victim is looked for.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._nodes: dict[ExpertId, _Node] = {}
        self._oldest: _Node | None = None
        self._newest: _Node | None = None
        self._hand: _Node | None = None
        self._scan: tuple[ExpertId, set[ExpertId]] | None = None
        """The last answer of `victim`, and the marks that are cleared if it is evicted."""

    def access(self, event: Sequence[ExpertId]) -> None:
        self._scan = None
        for expert in event:
            node = self._nodes.get(expert)
            if node is not None:
                node.visited = True

    def admit(self, expert: ExpertId) -> None:
        self._scan = None
        node = self._nodes[expert] = _Node(expert, self._newest)
        if self._newest is None:
            self._oldest = node
        else:
            self._newest.newer = node
        self._newest = node

    def evict(self, expert: ExpertId) -> None:
        node = self._nodes.pop(expert)
        if self._scan is not None and self._scan[0] == expert:
            for passed in self._scan[1] - {expert}:
                self._nodes[passed].visited = False
            self._hand = node.newer
        elif self._hand is node:
            self._hand = node.newer
        self._scan = None
        if node.older is None:
            self._oldest = node.newer
        else:
            node.older.newer = node.newer
        if node.newer is None:
            self._newest = node.older
        else:
            node.newer.older = node.older

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        passed: set[ExpertId] = set()
        node = self._hand or self._oldest
        assert node is not None
        while node.expert in locked or (node.visited and node.expert not in passed):
            if node.expert not in locked:
                passed.add(node.expert)
            node = node.newer or self._oldest
            assert node is not None
        self._scan = (node.expert, passed)
        return node.expert
