"""Policies that a device can carry out by itself, so that nobody has to tell the host what a token chose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from moert.policies.base import Policy
from moert.policies.ema import EMA
from moert.policies.lru import LRU
from moert.types import ExpertId

if TYPE_CHECKING:
    from moert.kernels.planning import Plan, Reach, Residents, Split


Copy = tuple[torch.Tensor, torch.Tensor]
"""To the first, on the device, from the second, in host memory."""


class Slots(NamedTuple):
    """A layer's slots on a device."""

    layer: int
    experts: int
    """Of the layer."""
    rows: torch.Tensor
    """int32 [S]: the row of a bank that each slot is."""
    n_rows: int
    """Of the bank."""
    log: torch.Tensor
    """int32 [N, K]: for the layer's last events."""


class Planner(ABC):
    """What one layer's policy would decide, decided by a kernel from tables on the device."""

    residents: Residents

    @property
    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """All that the kernel knows, on the device; each is its own memory, until somebody packs them."""

    @abstractmethod
    def plan(self, ids: torch.Tensor, reach: Reach | None = None, split: Split | None = None) -> Plan:
        """Take an event's ids, on the device; see `Plan`, `Reach` and `Split` of `moert.kernels.planning`. Waits for
        nothing."""

    @abstractmethod
    def begin(self, policy: Policy, residents: Mapping[ExpertId, int], free_rows: Sequence[int]) -> list[Copy]:
        """What to copy to the device, so that it goes on where the policy is: `residents` have those rows."""

    def _tables(self, residents: Mapping[ExpertId, int], free_rows: Sequence[int]) -> list[Copy]:
        """What every planner has; it counts on from as many uses as there are residents."""
        tables = self.residents
        assert tables.rows is not None
        rows_of = dict.fromkeys(range(tables.experts), -1)
        rows_of.update((expert.expert, row) for expert, row in residents.items())
        slot_of = torch.tensor(list(rows_of.values()), dtype=torch.int32)
        owners = [expert.expert for expert in residents] + [-1] * len(free_rows)
        return [
            (tables.rows, torch.tensor([*residents.values(), *free_rows], dtype=torch.int32)),
            (tables.slot_of, slot_of),
            (tables.owner, torch.tensor(owners, dtype=torch.int32)),
            (tables.marks, torch.zeros_like(tables.marks, device="cpu")),
            (tables.counters, torch.tensor([0, len(residents), 0])),
        ]


class EmaPlanner(Planner):
    """`ema`. How long ago an expert was used last is not known at the beginning: its next use counts in full."""

    def __init__(self, policy: EMA, slots: Slots) -> None:
        from moert.kernels.plan_ema import new_ema

        self._ids = [ExpertId(slots.layer, expert) for expert in range(slots.experts)]
        rows, log = slots.rows, slots.log
        # A bonus is for those of the latest event, of whom none leaves while it is planned.
        known = {name: policy.parameters[name] for name in ("alpha", "burst")}
        self._state = new_ema(slots.experts, rows.numel(), rows.device, **known, rows=rows, log=log)
        self.residents = self._state.residents

    @property
    def tensors(self) -> list[torch.Tensor]:
        return _tensors_of(self.residents, self._state)

    def plan(self, ids: torch.Tensor, reach: Reach | None = None, split: Split | None = None) -> Plan:
        from moert.kernels.plan_ema import plan_ema

        return plan_ema(self._state, ids, reach=reach, split=split)

    def begin(self, policy: Policy, residents: Mapping[ExpertId, int], free_rows: Sequence[int]) -> list[Copy]:
        assert isinstance(policy, EMA)
        state = self._state
        return [
            *self._tables(residents, free_rows),
            (state.scores, torch.tensor(list(map(policy.score, self._ids)), dtype=torch.float64)),
            (state.bursts, torch.zeros_like(state.bursts, device="cpu")),
            (state.last_uses, torch.zeros_like(state.last_uses, device="cpu")),
        ]


class LruPlanner(Planner):
    """`lru`."""

    def __init__(self, policy: LRU, slots: Slots) -> None:
        from moert.kernels.plan_lru import new_lru

        rows = slots.rows
        self._state = new_lru(slots.experts, rows.numel(), rows.device, rows, slots.log, slots.n_rows)
        self.residents = self._state.residents

    @property
    def tensors(self) -> list[torch.Tensor]:
        return _tensors_of(self.residents, self._state)

    def plan(self, ids: torch.Tensor, reach: Reach | None = None, split: Split | None = None) -> Plan:
        from moert.kernels.plan_lru import plan_lru

        return plan_lru(self._state, ids, reach=reach, split=split)

    def begin(self, policy: Policy, residents: Mapping[ExpertId, int], free_rows: Sequence[int]) -> list[Copy]:
        assert isinstance(policy, LRU)
        stamps = torch.zeros_like(self._state.stamps, device="cpu")
        stamps[[residents[expert] for expert in policy]] = torch.arange(len(residents), dtype=stamps.dtype)
        return [*self._tables(residents, free_rows), (self._state.stamps, stamps)]


def _tensors_of(*states: object) -> list[torch.Tensor]:
    return [value for state in states for value in vars(state).values() if isinstance(value, torch.Tensor)]


_PLANNERS: dict[type[Policy], type[EmaPlanner | LruPlanner]] = {EMA: EmaPlanner, LRU: LruPlanner}


def make_planner(policy: Policy, slots: Slots) -> Planner:
    """The twin of a layer's policy on a device.

    Raises:
        ValueError: the policy has none.
    """
    kind = _PLANNERS.get(type(policy))
    if kind is None or policy.sizes is not None:
        names = ", ".join(sorted(one.__name__.lower() for one in _PLANNERS))
        raise ValueError(f"the policy {type(policy).__name__.lower()} runs on the host only, unlike {names}")
    return kind(policy, slots)  # type: ignore[arg-type]
