"""What a model's cache has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moert.planning.limit import Limit
from moert.runtime.pace import Decoding


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
    device_steps: int = 0
    """Steps that were started on a GPU, where every expert is resident. Neither hits nor times are counted for them,
    because that would wait for the GPU; replays of a CUDA graph are not seen at all."""
    fallback: str | None = None
    """Why the model's own code computes this layer on a GPU, and not moert's kernels; None: it does not."""

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
    device_steps: int
    """Steps that were started on a GPU; see `LayerStats`."""
    decoding: Decoding
    """Of single tokens, prompts apart."""
    layers: tuple[LayerStats, ...] = field(repr=False)
    limit: Limit | None = None
    """How far decoding was from what is possible, where `moert.stats` was given a trace of it."""

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); 0.0 before the first step."""
        return self.hits / max(1, self.hits + self.misses)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings, lists and dictionaries, ready for JSON."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        own |= {
            "decoding": {**asdict(self.decoding), "tokens_per_s": self.decoding.tokens_per_s},
            "limit": None if self.limit is None else self.limit.as_dict(),
        }
        return {**own, "hit_rate": self.hit_rate, "layers": [layer.as_dict() for layer in self.layers]}
