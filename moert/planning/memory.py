"""What goes into which memory: never more than fits, and the least that works is named where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from moert.config import Budget, format_at_least, format_at_most, format_bytes
from moert.errors import CapacityError, ConfigError
from moert.plan import WORKSPACE_BYTES, default_budget, plan_slots
from moert.planning.forecast import Placement
from moert.planning.machine import Machine
from moert.planning.model import ModelNeeds, total_bytes

STAGED_SLOTS = 3
"""On a device: one expert that arrives, one that waits to be installed, one that runs without a slot."""


@dataclass(frozen=True)
class Memory:
    """Of one tier, in bytes."""

    available_bytes: int
    dense_bytes: int
    cache_bytes: int
    workspace_bytes: int
    staging_bytes: int
    expert_bytes: int

    @property
    def used_bytes(self) -> int:
        """All of it."""
        return self.dense_bytes + self.cache_bytes + self.workspace_bytes + self.staging_bytes + self.expert_bytes


@dataclass(frozen=True)
class Layout:
    """What goes where."""

    host: Memory
    device: Memory | None
    placement: Placement
    is_read_from_disk: bool
    """Whether some experts are in no memory."""


def lay_out(
    needs: ModelNeeds,
    machine: Machine,
    *,
    context: int,
    batch: int,
    host_memory: Budget | None = None,
    device_memory: Budget | None = None,
) -> Layout:
    """Divide a machine's memory for `batch` sequences of `context` tokens.

    On a device are the dense weights, the KV cache and as many experts as there is room for; in host memory the
    others. Without a device everything is in host memory. Budgets are those of `OffloadConfig`: bytes for experts.

    Raises:
        ConfigError: the context is longer than the model's, or a number below 1.
        CapacityError: it does not fit; the smallest memory that does is named.
    """
    if context < 1 or batch < 1:
        raise ConfigError(f"context={context} and batch={batch} must be at least 1")
    if needs.longest_context is not None and context > needs.longest_context:
        raise ConfigError(f"context={context} is more than the {needs.longest_context} tokens that {needs.name} takes")
    dense, cache = needs.dense_bytes, needs.cache_bytes(context, batch)
    if not machine.has_device:
        if device_memory is not None:
            raise ConfigError(f"device_memory is given, and {machine.name} has no device")
        host = _tier(needs, int(machine.host_memory_bytes), dense, cache, 0, host_memory, "host_memory", context)
        slots = tuple(plan_slots(needs.layers, Budget(nbytes=host.expert_bytes)))
        return Layout(host, None, Placement(slots), host.expert_bytes < needs.expert_bytes)
    staging = STAGED_SLOTS * max(need.slot_bytes for need in needs.layers)
    device = _tier(
        needs, int(machine.device_memory_bytes), dense, cache, staging, device_memory, "device_memory", context
    )
    host = _tier(needs, int(machine.host_memory_bytes), 0, 0, 0, host_memory, "host_memory", context)
    on_device = tuple(plan_slots(needs.layers, Budget(nbytes=device.expert_bytes), "device_memory"))
    in_host = tuple(plan_slots(needs.layers, Budget(nbytes=host.expert_bytes)))
    is_read = host.expert_bytes < needs.expert_bytes and device.expert_bytes < needs.expert_bytes
    return Layout(host, device, Placement(in_host, on_device), is_read)


def _tier(
    needs: ModelNeeds,
    available: int,
    dense: int,
    cache: int,
    staging: int,
    budget: Budget | None,
    option: str,
    context: int,
) -> Memory:
    fixed = dense + cache + WORKSPACE_BYTES + staging
    smallest = fixed + needs.least_bytes
    where = "device" if option == "device_memory" else "host"
    if smallest > available:
        raise CapacityError(
            f"{needs.name} needs at least {format_at_least(smallest)} of {where} memory at {context} tokens of context "
            f"({format_bytes(dense)} dense weights, {format_bytes(cache)} KV cache, "
            f"{format_bytes(WORKSPACE_BYTES + staging)} workspace, {format_bytes(needs.least_bytes)} for one token's "
            f"experts), and there are {format_bytes(available)}"
        )
    if budget is None:
        room = default_budget(needs.layers, available - dense, cache + staging).nbytes
        assert room is not None
        experts = max(needs.least_bytes, room)
    else:
        slots = plan_slots(needs.layers, budget, option)
        experts = total_bytes(needs.layers, slots)
        if fixed + experts > available:
            raise CapacityError(
                f"{option}={budget} for experts leaves no room for {format_bytes(fixed)} of everything else in "
                f"{format_bytes(available)}; from {format_at_least(needs.least_bytes)} to "
                f"{format_at_most(available - fixed)} work"
            )
    experts = total_bytes(needs.layers, plan_slots(needs.layers, Budget(nbytes=experts), option))
    return Memory(available, dense, cache, WORKSPACE_BYTES, staging, experts)
