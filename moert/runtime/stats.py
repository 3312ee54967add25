"""What a model's cache has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerStats:
    """Counts of one MoE layer since loading or `reset`; seconds are wall-clock."""

    name: str
    """The experts module's path in the model."""
    hits: int = 0
    """Experts that a step needed and that were resident when it began."""
    misses: int = 0
    """Experts that a step needed and had to wait for."""
    forwarded: int = 0
    """Misses that were on their way already when the step began, so that it waited for the rest of a read only."""
    failed_prefetches: int = 0
    """Reads that failed before anybody needed the expert; who then needs it reads it again."""
    bytes_read: int = 0
    """Bytes of the reads made for this layer, alignment included."""
    read_s: float = 0.0
    """Time its reads took, summed over reads that ran side by side."""
    stall_s: float = 0.0
    """Time its steps stood still because a read had not finished."""
    compute_s: float = 0.0
    """Time its steps spent in expert kernels."""
    resident_bytes: int = 0
    """Bytes of expert tensors resident now."""

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); 0.0 before the first step."""
        return self.hits / max(1, self.hits + self.misses)

    def as_dict(self) -> dict[str, Any]:
        """Every field, and `hit_rate`, by name."""
        return {**asdict(self), "hit_rate": self.hit_rate}


@dataclass(frozen=True)
class Stats:
    """A snapshot over all layers. The totals are sums; `read_s` is the time in which at least one read was running."""

    hits: int
    misses: int
    bytes_read: int
    read_s: float
    stall_s: float
    compute_s: float
    resident_bytes: int
    expert_bytes: int
    """Bytes of all experts of the model."""
    slot_bytes: int
    """Bytes of host memory reserved for experts now."""
    shrinks: int
    """Times the slots became fewer because memory ran short."""
    layers: tuple[LayerStats, ...] = field(repr=False)

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); 0.0 before the first step."""
        return self.hits / max(1, self.hits + self.misses)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings, lists and dictionaries, ready for JSON."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "layers"}
        return {**own, "hit_rate": self.hit_rate, "layers": [layer.as_dict() for layer in self.layers]}
