"""What a cache will do for a model: replays of its trace at multiples of the experts that a token activates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moert.simulate import Result, sweep
from moert.trace import TraceHeader, TraceLike

RATIOS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
BOUND = "belady"


@dataclass(frozen=True)
class Forecast:
    """A cache of the same number of slots in every layer, kept from token to token."""

    ratio: float
    """Slots a layer, per expert that a token activates there."""
    slots: int
    """Of each layer, none having more than it has experts."""
    share: float
    """Of all the model's experts."""
    nbytes: int | None
    """Of all slots; None: the trace does not say how large an expert is."""
    hit_rate: float
    interval: tuple[float, float] | None
    """95 %, from a bootstrap over sequences."""
    best_hit_rate: float
    """Of MIN."""
    lru_hit_rate: float
    misses_per_token: float
    fetched_bytes_per_token: float | None


def forecast(
    trace: TraceLike,
    policy: str,
    *,
    count: Literal["decode", "all"] = "decode",
    expert_bytes: int | None = None,
    ratios: Sequence[float] = RATIOS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Forecast]:
    """Replay `trace` with caches from one token's experts to all experts, which are always among them. Blocks.

    Args:
        policy: of the cache, as everywhere.
        count: "decode" or "all", the tokens whose hits count.
        expert_bytes: of one expert, where the trace does not say it.
        ratios: the sizes, per activated expert.
        progress: called with how many replays are done, of how many.

    Raises:
        ConfigError: unknown policy, or no token counts.
    """
    slots = _slots(trace.header, ratios)
    policies = list(dict.fromkeys((policy, "lru", BOUND)))
    results = sweep(
        [trace],
        policies,
        [str(number) for number in slots],
        count=count,
        expert_bytes=expert_bytes,
        bounds=False,
        progress=lambda done, total, _: progress(done, total),
    )
    by_size: dict[int, dict[str, Result]] = {number: {} for number in slots}
    for place, result in enumerate(results):
        by_size[slots[place // len(policies)]][result.policy] = result
    return [_forecast(number, trace.header, found, policy) for number, found in by_size.items()]


def _slots(header: TraceHeader, ratios: Sequence[float]) -> list[int]:
    top_k = max(layer.top_k for layer in header.layers)
    experts = max(layer.num_experts for layer in header.layers)
    return sorted({min(experts, round(ratio * top_k)) for ratio in ratios} | {-(-3 * experts // 4), experts})


def _forecast(slots: int, header: TraceHeader, found: dict[str, Result], policy: str) -> Forecast:
    own = found[policy]
    moved = own.bytes_moved
    return Forecast(
        ratio=slots / max(layer.top_k for layer in header.layers),
        slots=slots,
        share=own.capacity_experts / sum(layer.num_experts for layer in header.layers),
        nbytes=own.capacity_bytes,
        hit_rate=own.hit_rate,
        interval=own.interval(),
        best_hit_rate=found[BOUND].hit_rate,
        lru_hit_rate=found["lru"].hit_rate,
        misses_per_token=own.misses_per_token,
        fetched_bytes_per_token=None if moved is None else moved / max(1, own.tokens),
    )


def sweet_spot(forecasts: Sequence[Forecast]) -> Forecast:
    """The cache from which on a further slot brings less than slots do on average.

    It is where the hit rate is furthest above the share of the experts that is held; the paper has no formula of its
    own for the size that is worth its memory.
    """
    return max(forecasts, key=lambda one: one.hit_rate - one.share)


def enough_for(forecasts: Sequence[Forecast], hit_rate: float) -> Forecast | None:
    """The smallest of the caches with such a hit rate; None: none has."""
    return next((one for one in forecasts if one.hit_rate >= hit_rate), None)
