"""The host tier as the source of a device's copies: residents stay where they are while they are copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch

from moert.policies.base import Policy
from moert.residency import Residency
from moert.runtime.layer import LayerCache, Weights
from moert.types import ExpertId


class HeldResidency(Residency):
    """A `Residency` whose residents may also be held, by whoever copies them, beyond the end of a step.

    Steps over it must not `promise`: that lets residents go without asking who holds them.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        super().__init__(capacity, policy)
        self._holds: Counter[ExpertId] = Counter()

    def hold(self, expert: ExpertId) -> None:
        """`expert`, which is resident, keeps its slot until it has been let go as often."""
        assert expert in self, f"{expert} is held and not resident"
        self._holds[expert] += 1

    def let_go(self, expert: ExpertId) -> None:
        """Undo one `hold`."""
        assert self._holds[expert] > 0, f"{expert} is not held"
        self._holds[expert] -= 1
        if not self._holds[expert]:
            del self._holds[expert]

    @property
    def held(self) -> AbstractSet[ExpertId]:
        """Those that are held."""
        return self._holds.keys()

    def _held(self) -> AbstractSet[ExpertId]:
        return super()._held() | self._holds.keys() if self._holds else super()._held()

    def recover(self, capacity: int, *, keep: bool) -> None:
        self._holds.clear()
        super().recover(capacity, keep=keep)

    def check_integrity(self) -> None:
        super().check_integrity()
        assert all(expert in self for expert in self._holds), f"held but absent: {set(self._holds)}"


class HostLayer:
    """One layer's experts in host memory, all of them or those that have slots there."""

    def __init__(self, cache: LayerCache) -> None:
        """`cache` has a `HeldResidency`, unless all its experts are resident for good."""
        self.cache = cache
        residency = cache.residency
        self._held = residency if isinstance(residency, HeldResidency) else None
        assert self._held is not None or len(residency) == cache.spec.num_experts, "residents could go while copied"

    def has(self, expert: ExpertId) -> bool:
        """Whether it can be copied from or computed with now."""
        return expert in self.cache.residency

    def weights(self, expert: ExpertId) -> Weights:
        """Its tensors as they are stored; valid while it is locked or held."""
        return self.cache.weights(expert.expert)

    def hold(self, expert: ExpertId) -> None:
        if self._held is not None:
            self._held.hold(expert)

    def let_go(self, expert: ExpertId) -> None:
        if self._held is not None:
            self._held.let_go(expert)

    def observe(self, event: Sequence[ExpertId]) -> None:
        """Something else than a step has taken these experts from here, ascending; the policy is told."""
        if event:
            self.cache.residency.policy.access(event)

    def expect(self, experts: Collection[ExpertId]) -> int:
        """The next step is expected to need these, which are there: what is read until then takes the place of others.
        How many places there are for it. Between steps."""
        if self._held is None:
            return 0
        self._held.expect(experts)
        return self._held.capacity - len(self._held.held | self._held.arriving | set(experts))

    def held(self) -> frozenset[ExpertId]:
        return frozenset() if self._held is None else frozenset(self._held.held)


def tensor_ranges(weights: Weights) -> Iterator[tuple[int, int]]:
    """(address, bytes) of each tensor."""
    for tensor in weights.values():
        assert tensor.is_cpu and isinstance(tensor, torch.Tensor)
        yield tensor.data_ptr(), tensor.nbytes
