"""How far from the limit a run was, and what the rest of its time went to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moert.errors import ConfigError
from moert.schedule import Costs


@dataclass(frozen=True)
class Ran:
    """What a run on a machine without a device took. Seconds and counts are of all its tokens together."""

    tokens: int
    seconds: float
    hits: int
    misses: int
    stall_s: float
    """It stood still for a read."""
    compute_s: float
    """It computed experts."""
    reads: float | None = None
    """Records that were read meanwhile, for whoever waited and ahead of time; what was begun of one counts as its part.
    None: one for each miss."""

    @property
    def records(self) -> float:
        """That were read."""
        return self.misses if self.reads is None else self.reads

    def __post_init__(self) -> None:
        numbers = (self.tokens, self.seconds, self.hits, self.misses, self.stall_s, self.compute_s, self.records)
        if any(not (math.isfinite(n) and n >= 0) for n in numbers) or not self.tokens or not self.seconds:
            raise ConfigError(f"{self} is no run: it takes time for some tokens, and nothing of it is below 0")


@dataclass(frozen=True)
class Limit:
    """A run against what the same machine can do with the same routing. Seconds are of one token."""

    tokens_per_s: float
    bound_tokens_per_s: float
    """No policy, no prefetching and no schedule passes this (`moert.simulate.bound`): all that must be read is read,
    and all of it beside computing. It cannot quite be reached."""
    own_bound_tokens_per_s: float
    """The same with the reads that there were."""
    lost_to_policy_s: float
    """For reads that an optimal cache would not have made: for misses, and ahead of time for nothing."""
    lost_to_waiting_s: float
    """For the disk and the CPU not working at the same time."""
    lost_to_overhead_s: float
    """For all else: what is neither in experts, nor in the rest of the model as calibrated, nor in waiting."""

    @property
    def share(self) -> float:
        """Of the bound that was reached; at most 1."""
        return min(1.0, self.tokens_per_s / self.bound_tokens_per_s)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        return {**vars(self), "share": self.share}


def limit_of(ran: Ran, *, least_misses: int, costs: Costs, other_s: float) -> Limit:
    """How far `ran` was from its limit.

    Args:
        least_misses: the fewest that any policy can have on this routing with as many slots. What is read ahead of time
            is no miss, but is read: this many reads there are at least.
        costs: of this machine and these experts, without a device.
        other_s: a token without its experts.

    Raises:
        ConfigError: fewer reads than the least misses, or seconds below 0.
    """
    # Here, as it brings numba with it: this module is loaded with every model.
    from moert.simulate.bound import least_seconds

    if not 0 <= least_misses <= ran.records:
        raise ConfigError(f"{ran.records} reads are fewer than the {least_misses} that are the least: another run's")
    other_s *= ran.tokens
    bound_s = least_seconds(accesses=ran.hits + ran.misses, misses=least_misses, other_s=other_s, costs=costs)
    own_s = max(bound_s, costs.read_s * ran.records)
    # A calibration that is a little too slow must not make a run faster than its limit.
    own_s = min(own_s, ran.seconds)
    bound_s = min(bound_s, own_s)
    overhead_s = min(max(0.0, ran.seconds - ran.stall_s - ran.compute_s - other_s), ran.seconds - own_s)
    return Limit(
        tokens_per_s=ran.tokens / ran.seconds,
        bound_tokens_per_s=ran.tokens / bound_s if bound_s else math.inf,
        own_bound_tokens_per_s=ran.tokens / own_s if own_s else math.inf,
        lost_to_policy_s=(own_s - bound_s) / ran.tokens,
        lost_to_waiting_s=(ran.seconds - own_s - overhead_s) / ran.tokens,
        lost_to_overhead_s=overhead_s / ran.tokens,
    )
