"""Static profile: the experts that were used most stay, whatever comes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moert.policies._checks import check_at_least
from moert.policies._ranking import Ranking
from moert.policies.base import Policy
from moert.types import ExpertId


class Static(Policy):
    """Evicts the resident with the fewest uses in a profile that does not change.

    The profile is given as `counts`, or counted over the first `warm_up_events` of each layer and frozen then; of equal
    ones the lower id leaves. It wants an expert only if its count is above that of who would leave. Where every miss
    has to be admitted all the same, one slot takes them in turn and the others keep the greatest counts. Where sizes
    differ it is the count per byte.
    """

    def __init__(
        self, capacity: int, warm_up_events: int = 256, counts: Mapping[ExpertId, float] | None = None
    ) -> None:
        """With `counts` there is no warm-up; an expert that is not among them counts 0."""
        super().__init__(capacity)
        self._warm_up = check_at_least("static", "warm_up_events", warm_up_events, 0) if counts is None else 0
        self._counts: dict[ExpertId, float] = dict(counts or {})
        self._events: dict[int, int] = {}
        self._residents = Ranking()

    def access(self, event: Sequence[ExpertId]) -> None:
        if not event or self._is_frozen(event[0].layer):
            return
        self._events[event[0].layer] = self._events.get(event[0].layer, 0) + 1
        for expert in event:
            self._counts[expert] = self._counts.get(expert, 0.0) + 1
            if expert in self._residents:
                self._residents.set(expert, self._score(expert))

    def _is_frozen(self, layer: int) -> bool:
        return self._events.get(layer, 0) >= self._warm_up

    def _score(self, expert: ExpertId) -> float:
        return self._counts.get(expert, 0.0) / self.size(expert)

    def admit(self, expert: ExpertId) -> None:
        self._residents.set(expert, self._score(expert))

    def evict(self, expert: ExpertId) -> None:
        self._residents.remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        lowest = self._residents.lowest(locked)
        assert lowest is not None, "every resident is locked"
        return lowest.expert

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        return not self._is_frozen(expert.layer) or self._score(expert) > self._score(self.victim(locked))
