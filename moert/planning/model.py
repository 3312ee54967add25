"""What a model asks of memory, by sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moert.plan import LayerNeed, least_bytes


@dataclass(frozen=True)
class CacheLayer:
    """What one layer of attention, or of what stands for it, keeps of a sequence."""

    bytes_per_token: int
    window: int | None = None
    """Tokens that are kept at most; None: all."""
    fixed_bytes: int = 0
    """Whatever the length: the state of linear attention."""
    unbounded_bytes_per_token: int = 0
    """Of all tokens, whatever the window: what an indexer keeps, or entries that stand for many tokens."""

    def nbytes(self, context: int) -> int:
        """For a sequence of so many tokens."""
        kept = self.bytes_per_token * min(context, self.window or context)
        return self.fixed_bytes + kept + self.unbounded_bytes_per_token * context


@dataclass(frozen=True)
class ModelNeeds:
    """A model in bytes."""

    name: str
    layers: tuple[LayerNeed, ...]
    """Those with experts."""
    dense_bytes: int
    """Everything that is no expert; always in memory."""
    dense_read_bytes: int
    """What of it a token reads: not the table of input embeddings."""
    cache: tuple[CacheLayer, ...] | None
    """None: unknown."""
    cache_problem: str = ""
    """Why it is."""
    longest_context: int | None = None
    """None: the configuration does not say."""
    weight_bits: float = 16
    """Of a weight of an expert, as stored."""

    @property
    def expert_bytes(self) -> int:
        """Slots for every expert."""
        return sum(need.num_experts * need.slot_bytes for need in self.layers)

    @property
    def least_bytes(self) -> int:
        """Slots for what one token needs."""
        return least_bytes(self.layers)

    def cache_bytes(self, context: int, batch: int) -> int:
        """KV cache of `batch` sequences of that length; 0 where it is unknown."""
        return batch * sum(layer.nbytes(context) for layer in self.cache or ())


def total_bytes(layers: Sequence[LayerNeed], slots: Sequence[int]) -> int:
    """What so many slots take."""
    return sum(need.slot_bytes * n for need, n in zip(layers, slots, strict=True))
