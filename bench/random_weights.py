"""Random weights, fast and addressable: any run of elements of any tensor, from the tensor's name and a seed alone."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numba import njit

QUANTILES = 1 << 16
EMBEDDING = re.compile(r"(^|\.)(embed|word_embed|wte)\w*\.weight$")
ROUTER = re.compile(r"(^|\.)(gate|router)(\.\w+)*\.weight$")

# A router row's length sets how often its expert is picked. Spread like this, two tokens generated some way apart by an
# OLMoE-shaped model share 0.29 of their picks, as OLMoE's own do, instead of an eighth. Neighbours share no more than
# that here, where OLMoE's share 0.44: caches fare somewhat worse than on trained weights.
ROUTER_STD = 2.0
ROUTER_LENGTH_SPREAD = 0.35


@dataclass(frozen=True)
class Recipe:
    """How one tensor is drawn: normal around `mean`, row i of a router times its own length."""

    mean: float
    std: float
    rows: int = 0
    """Rows of a router; 0 for any other tensor."""


def recipe_for(name: str, shape: tuple[int, ...], fan_in: int) -> Recipe:
    """The distribution of tensor `name`: variance-keeping matrices, unit norms and embeddings, small biases.

    Embeddings of unit size keep tokens apart in the residual stream, so that routing depends on the token.
    """
    if name.endswith("bias") or len(shape) < 2:
        return Recipe(1.0, 0.0) if "norm" in name and name.endswith("weight") else Recipe(0.0, 0.02)
    if EMBEDDING.search(name):
        return Recipe(0.0, 1.0)
    if ROUTER.search(name) and len(shape) == 2:
        return Recipe(0.0, ROUTER_STD / math.sqrt(fan_in), rows=shape[0])
    return Recipe(0.0, 1 / math.sqrt(fan_in))


@njit(nogil=True, cache=True)
def _fill(out: npt.NDArray[np.generic], table: npt.NDArray[np.generic], key: np.uint64, start: int) -> None:
    """out[i] = table[16 random bits of place start + i]; the bits are SplitMix64's, four places a step."""
    for i in range(out.shape[0]):
        place = start + i
        if i == 0 or (place & 3) == 0:
            z = key + np.uint64(place >> 2) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        out[i] = table[(z >> np.uint64((place & 3) * 16)) & np.uint64(0xFFFF)]


@lru_cache(maxsize=1)
def _normal_quantiles() -> npt.NDArray[np.float32]:
    import torch

    middles = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    quantiles: npt.NDArray[np.float32] = torch.special.ndtri(middles).to(torch.float32).numpy()
    return quantiles


def encode(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """float32 values as the bit patterns of `dtype` (a safetensors name: BF16, F16 or F32)."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    nearest_even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (nearest_even >> np.uint32(16)).astype(np.uint16)


@lru_cache(maxsize=64)
def _table(std: float, dtype: str) -> npt.NDArray[np.generic]:
    return encode(_normal_quantiles() * np.float32(std), dtype)


Filler = Callable[[npt.NDArray[np.generic], int], None]


def filler(name: str, shape: tuple[int, ...], dtype: str, recipe: Recipe, seed: int) -> Filler:
    """`fill(out, start)` writes elements start .. start + len(out) of tensor `name` into `out` as bit patterns.

    The same elements come out however the tensor is cut up. `out` is a flat uint16 (BF16, F16) or uint32 (F32) array
    owned by the caller.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(digest, "little"))

    def constant(out: npt.NDArray[np.generic], start: int) -> None:
        out[:] = encode(np.full(1, recipe.mean, np.float32), dtype)[0]

    def normal(out: npt.NDArray[np.generic], start: int) -> None:
        _fill(out, _table(recipe.std, dtype), key, start)

    def router(out: npt.NDArray[np.generic], start: int) -> None:
        values = np.empty(out.shape[0], np.uint32)
        _fill(values, _table(recipe.std, "F32"), key, start)
        lengths = np.empty(recipe.rows, np.uint32)
        _fill(lengths, _table(ROUTER_LENGTH_SPREAD, "F32"), ~key, 0)
        row_of = (start + np.arange(out.shape[0])) // (math.prod(shape) // recipe.rows)
        out[:] = encode(values.view(np.float32) * np.exp(lengths.view(np.float32))[row_of], dtype)

    if recipe.std == 0:
        return constant
    return router if recipe.rows else normal
