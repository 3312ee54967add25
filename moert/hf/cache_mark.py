"""How much a cache held before a pass, and the way back to that where there is one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from moert.hf.growing_cache import GrowingLayer


class CacheMark:
    """Of a cache of transformers, made before a pass; asks the device for nothing."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._lengths = [_length(layer) for layer in cache.layers]

    @property
    def can_return(self) -> bool:
        """Whether `go_back` leaves the cache as it was, wherever in the pass it is: every layer is one that grows, or
        one of fixed size that held nothing."""
        cache = self._cache
        is_known = type(cache) in (DynamicCache, StaticCache) and not getattr(cache, "offloading", False)
        return is_known and None not in self._lengths and None not in map(_length_now, cache.layers)

    def go_back(self) -> None:
        """Forget what the pass has put there, which may be keys without values."""
        layers: list[Any] = self._cache.layers
        del layers[len(self._lengths) :]
        for layer, length in zip(layers, self._lengths, strict=True):
            if not length:
                layer.reset()
            elif layer.get_seq_length() != length:
                layer.keys, layer.values = (tensor[..., :length, :] for tensor in (layer.keys, layer.values))


def _length(layer: Any) -> int | None:
    """Tokens in it; None: that would have to be asked for, or going back takes more than to cut it there."""
    if type(layer) in (DynamicLayer, GrowingLayer):
        return int(layer.get_seq_length())
    return 0 if type(layer) is StaticLayer and not layer.is_initialized else None


def _length_now(layer: Any) -> int | None:
    return 0 if type(layer) is StaticLayer else _length(layer)


def cache_bytes(cache: Any, device: torch.device) -> int:
    """What the layers of a cache of transformers hold on a device; 0 for anything else."""
    layers = cache.layers if isinstance(cache, Cache) else ()
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors if one.device == device}
    return sum(storage.nbytes() for storage in storages.values())
