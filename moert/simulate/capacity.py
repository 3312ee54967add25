"""How large the caches of a replay are: shares, numbers of experts or bytes, as the engine would divide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moert.config import Budget, format_bytes, parse_budget
from moert.errors import CapacityError, ConfigError
from moert.plan import LayerNeed, least_bytes, plan_slots
from moert.trace.sequence import LayerInfo

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Capacity:
    """A capacity as it was asked for."""

    text: str
    experts: int | None = None
    """Of each layer, or of the one cache. None: `budget` says it."""
    budget: Budget | None = None


@dataclass(frozen=True)
class Caches:
    """The caches of one replay."""

    capacity: npt.NDArray[np.int64]
    """[C] in experts, or in bytes if `in_bytes`; one for each layer, or one."""
    in_bytes: bool
    total_experts: int
    """Experts of all caches together; where they differ in size, of an average one."""
    total_bytes: int | None
    """None where the trace does not say how large an expert is."""


def parse_capacity(value: int | str | Capacity) -> Capacity:
    """Read `"25%"` of the experts, `"16"` or 16 experts, or `"4GiB"`.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    if isinstance(value, Capacity):
        return value
    text = value.strip() if isinstance(value, str) else str(value)
    hint = 'give a share of the experts such as "25%", a number of experts, or bytes such as "4GiB"'
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"capacity {value!r} is none; {hint}")
    try:
        experts = int(text)
    except ValueError:
        # A bare number that is not whole would be bytes, though others are experts.
        if text and not text[-1].isalpha() and not text.endswith("%"):
            raise ConfigError(f"capacity {text!r} is none; {hint}") from None
        return Capacity(text, budget=parse_budget(text, "capacity"))
    if experts < 1:
        raise ConfigError(f"capacity {text} must be at least 1 expert; {hint}")
    return Capacity(text, experts=experts)


def expert_sizes(layers: Sequence[LayerInfo], given: int | Sequence[int] | None = None) -> npt.NDArray[np.int64] | None:
    """[L] bytes of an expert, as `given` for all layers or for each, else as the trace says; None: unknown.

    Raises:
        ConfigError: `given` is not positive, or not one number for each layer.
    """
    if given is None:
        sizes = [layer.expert_bytes for layer in layers]
        return np.array(sizes, dtype=np.int64) if all(sizes) else None
    sizes = [given] * len(layers) if isinstance(given, int) else list(given)
    if len(sizes) != len(layers) or any(isinstance(size, bool) or size < 1 for size in sizes):
        raise ConfigError(
            f"expert_bytes={given!r} must be positive, one number or one for each of {len(layers)} layers"
        )
    return np.array(sizes, dtype=np.int64)


def plan_caches(
    capacity: Capacity, layers: Sequence[LayerInfo], scope: Scope, sizes: npt.NDArray[np.int64] | None
) -> Caches:
    """The caches that `capacity` gives. No cache is larger than the experts it is for.

    Raises:
        ConfigError: bytes are asked for and `sizes` are unknown; unknown scope.
        CapacityError: less than one expert for some cache.
    """
    if scope not in ("layer", "global"):
        raise ConfigError(f'scope={scope!r} must be "layer" or "global"')
    counts = np.array([layer.num_experts for layer in layers], dtype=np.int64)
    available = counts if scope == "layer" else counts.sum(keepdims=True)
    budget = capacity.budget
    if budget is not None and budget.nbytes is not None:
        if sizes is None:
            raise ConfigError(
                f"capacity {capacity.text} is in bytes, and the trace does not say how large an expert is; "
                "give the bytes of one (expert_bytes), or a share or number of experts"
            )
        return _of_bytes(budget.nbytes, layers, scope, counts, sizes)
    if budget is not None:
        assert budget.share is not None
        wanted = (budget.share * available + 1e-9).astype(np.int64)
    else:
        assert capacity.experts is not None
        wanted = np.full(len(available), min(capacity.experts, int(available.max())), dtype=np.int64)
    if wanted.min() < 1:
        where = layers[int(wanted.argmin())].name if scope == "layer" else "the trace"
        n_experts = int(available[wanted.argmin()])
        raise CapacityError(
            f"capacity {capacity.text} is less than one of the {n_experts} experts of {where}; "
            f'give at least "{-(-10000 // n_experts) / 100:g}%"'
        )
    return _of_experts(np.minimum(wanted, available), scope, counts, sizes)


def _of_experts(
    capacity: npt.NDArray[np.int64], scope: Scope, counts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64] | None
) -> Caches:
    total = int(capacity.sum())
    nbytes = None
    if sizes is not None:
        # One cache holds any experts: those of average size.
        nbytes = int(capacity @ sizes) if scope == "layer" else int(total * (counts @ sizes) // counts.sum())
    return Caches(capacity, False, total, nbytes)


def _of_bytes(
    nbytes: int,
    layers: Sequence[LayerInfo],
    scope: Scope,
    counts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> Caches:
    if scope == "layer":
        needs = [
            LayerNeed(layer.name, layer.num_experts, int(size), int(size), layer.top_k)
            for layer, size in zip(layers, sizes, strict=True)
        ]
        smallest = int(sizes.sum())
        if nbytes < smallest:
            raise CapacityError(
                f"a cache size of {_size(nbytes)} for {len(layers)} layers is less than one expert in each of them; "
                f"give at least {_size(smallest)}"
            )
        if nbytes < least_bytes(needs):  # the engine would refuse, a replay counts what is forced to miss
            needs = [LayerNeed(need.name, need.num_experts, need.slot_bytes, need.expert_bytes, 1) for need in needs]
        slots = plan_slots(needs, Budget(nbytes=nbytes))
        return _of_experts(np.array(slots, dtype=np.int64), scope, counts, sizes)
    nbytes = min(nbytes, int(counts @ sizes))
    if nbytes < sizes.max():
        raise CapacityError(
            f"a cache size of {_size(nbytes)} for one cache is less than one expert of the largest layer; "
            f"give at least {_size(int(sizes.max()))}"
        )
    if sizes.min() == sizes.max():
        return _of_experts(np.array([nbytes // sizes[0]]), scope, counts, sizes)
    return Caches(np.array([nbytes]), True, int(nbytes * counts.sum() // (counts @ sizes)), nbytes)


def _size(nbytes: int) -> str:
    """As it is read and as it is given."""
    return f"{format_bytes(nbytes)} ({nbytes} bytes)"
