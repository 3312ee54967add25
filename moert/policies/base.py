"""The interface of a cache policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from moert.types import ExpertId


class Policy(ABC):
    """Decides which resident expert leaves. It owns no memory and moves nothing.

    One step of a MoE layer is one event, and the cache (`moert.residency.Residency`) drives a policy like this:

        access(event)                      # every expert of the event, hits and misses, before anything moves
        for each miss:
            if full: evict(victim_for(miss, locked))  # never a member of the event that is still to be computed
            admit(miss)

    So an expert counts once an event, however many tokens chose it; hits are promoted before any miss is admitted, and
    both by ascending id. A policy published for single accesses is what it was published as where each event is one
    expert. Experts are also admitted without an event (prefetched, preloaded), and evicted without having been the
    victim. One object serves one cache: of one layer, or of several, whose events come in the order in which they run.

    Between steps the cache may get another number of slots. Those that have to leave are asked for one by one, each
    with those before it locked, and evicted; then `capacity` changes.

    A policy whose rule is a score only has to keep the scores in `access`, `admit` and `evict`, and return the
    lowest resident in `victim`. Constructor parameters after `capacity` whose default is a number, a text or a truth
    value can be chosen by name, `policy="NAME,PARAMETER=VALUE"`; the constructor raises `ConfigError` for values that
    make no sense.
    """

    needs_future: ClassVar[bool] = False
    """Whether `foresee` must be called before the first event. Such a policy is a bound and cannot run live."""

    parameters: Mapping[str, Any] = {}
    """What the constructor was given besides the capacity, if the policy was made by name."""

    tokens_ahead: int = 0
    """Of how many of a layer's next events `observe_ahead` is to tell; 0: it is not called."""

    sizes: Callable[[ExpertId], int] | None = None
    """Bytes of an expert, where they differ; `capacity` is then in bytes too. Set before the first event or never.

    Several victims may then be asked for before one expert is admitted."""

    def __init__(self, capacity: int) -> None:
        """A policy for a cache of `capacity` experts, empty."""
        self.capacity = capacity

    @abstractmethod
    def access(self, event: Sequence[ExpertId]) -> None:
        """The experts that one step needs, each once, in ascending order; some are resident, some are not."""

    @abstractmethod
    def admit(self, expert: ExpertId) -> None:
        """`expert` has become resident."""

    @abstractmethod
    def evict(self, expert: ExpertId) -> None:
        """`expert` is resident no longer, because it was the victim or because reading it failed."""

    @abstractmethod
    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        """The resident expert to evict next. Asking changes nothing; the same answer may be asked for twice.

        Args:
            locked: residents that must stay; membership tests are O(1). At least one resident is not in it.
        """

    def victim_for(self, expert: ExpertId, locked: Collection[ExpertId]) -> ExpertId:
        """The victim that makes room for `expert`, for policies to which it matters who comes."""
        return self.victim(locked)

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        """Whether `expert` is worth more than the resident that would leave for it. Asking changes nothing.

        This is advice for whoever can compute a missing expert without a slot, say on the CPU from the tier below, and
        so may let it pass by. Who cannot admits it all the same, and every policy must take that.
        """
        return True

    def observe_scores(self, layer: int, scores: Sequence[float]) -> None:
        """The router's probabilities in the step whose `access` follows, one for each expert of the layer.

        Averaged over the step's tokens. Called where they are known; a trace may lack them.
        """
        return

    def observe_ahead(self, layer: int, chances: Sequence[Sequence[float]]) -> None:
        """What is predicted for the events of `layer` after the one whose `access` follows, the next of them first.

        Called where there is a predictor, and where it has something to say. Kept, and not written to afterwards. Where
        the future is known, chances are 0 and 1, and there may be more of them than were asked for.

        Args:
            chances: [n][E] of each event, the probabilities that it needs each expert of the layer; finite.
        """
        return

    def worth(self, expert: ExpertId) -> float | None:
        """What it is worth to keep `expert`, or to bring it in, on the scale of the share of events that need it.

        Whoever moves experts in the background weighs them by it, so that it brings what stays. Asking changes nothing.
        None: this policy does not know, and whoever asks goes by its own averages.
        """
        return None

    def begin_sequence(self) -> None:
        """The events from here on belong to another sequence, or batch of sequences, than those before.

        Called where that is known; it ends the sequence before. Experts stay resident.
        """
        return

    def foresee(self, events: Iterable[Sequence[ExpertId]]) -> None:
        """Every event to come, in order, before the first one; only called where `needs_future` says so."""
        return

    def size(self, expert: ExpertId) -> int:
        """What `expert` takes of `capacity`."""
        return 1 if self.sizes is None else self.sizes(expert)

    def fresh(self, capacity: int) -> Policy:
        """A policy like this one that has seen nothing, for another cache."""
        other = type(self)(capacity, **self.parameters)
        other.parameters, other.sizes = self.parameters, self.sizes
        return other
