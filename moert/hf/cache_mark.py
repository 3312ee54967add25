"""How much a cache held before a pass, and the way back to that where there is one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from moert.hf.growing_cache import GrowingLayer

MOST_WINDOW_BYTES = 128 << 20
"""Of windows that are kept over a pass, which would be free memory without."""

WayBack = Callable[[], object]


class CacheMark:
    """Of a cache of transformers, made before a pass; does not wait for the device.

    Layers that grow are cut. What a pass writes to a layer of fixed size lies behind its length, where the next pass
    writes before it reads. A window that moves is kept: its oldest tokens are gone afterwards.
    """

    def __init__(self, cache: Cache, tokens: int | None) -> None:
        """
        Args:
            tokens: of the pass; None: as many as may be.

        Raises:
            torch.OutOfMemoryError: there is not even memory to note that; nothing has changed.
        """
        self._cache = cache
        self._layers: list[Any] = list(cache.layers)
        self._ways: list[WayBack | None] = []
        moving = [layer for layer in self._layers if _moves(layer, tokens)]
        storages = [one.untyped_storage().nbytes() for layer in moving for one in (layer.keys, layer.values)]
        if sum(storages) <= MOST_WINDOW_BYTES:
            kept = {**_lengths(self._layers), **_windows(moving)}
            self._ways = [_way_back(layer, kept.get(id(layer))) for layer in self._layers]

    @property
    def can_return(self) -> bool:
        """Whether `go_back` leaves the cache so that the pass can be run again, wherever in it that is."""
        cache, n = self._cache, len(self._layers)
        is_known = type(cache) in (DynamicCache, StaticCache) and not getattr(cache, "offloading", False)
        is_same = len(cache.layers) >= n and all(map(_is, cache.layers[:n], self._layers))
        return is_known and is_same and len(self._ways) == n and None not in self._ways

    def go_back(self) -> None:
        """Forget what the pass has put there, which may be keys without values."""
        del self._cache.layers[len(self._layers) :]
        for way in self._ways:
            assert way is not None
            way()


def _is(one: object, other: object) -> bool:
    return one is other


def _moves(layer: Any, tokens: int | None) -> bool:
    """Whether a pass of so many tokens drops something of a window."""
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.is_initialized)
    if type(layer) is not StaticSlidingWindowLayer or not layer.cumulative_length_int:
        return False
    return tokens is None or layer.cumulative_length_int + tokens > layer.max_cache_len


def _lengths(layers: Sequence[Any]) -> dict[int, tuple[torch.Tensor, ...]]:
    """Of each layer of fixed size, a copy of its length; all of a device by one kernel."""
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    fixed = [layer for layer in layers if type(layer) is StaticLayer and layer.is_initialized]
    for device in {layer.cumulative_length.device for layer in fixed}:
        there = [layer for layer in fixed if layer.cumulative_length.device == device]
        copies = torch.stack([layer.cumulative_length for layer in there])
        found.update({id(layer): (copy,) for layer, copy in zip(there, copies, strict=True)})
    return found


def _windows(moving: Sequence[Any]) -> dict[int, tuple[torch.Tensor, ...]]:
    """Of each layer of fixed size whose window moves, a copy of it; the others make new tensors."""
    fixed: list[Any] = [layer for layer in moving if type(layer) is StaticSlidingWindowLayer]
    return {id(layer): (layer.keys.clone(), layer.values.clone()) for layer in fixed}


def _way_back(layer: Any, kept: tuple[torch.Tensor, ...] | None) -> WayBack | None:
    """None: there is none, or it would have to be asked for."""
    kind = type(layer)
    if kind in (DynamicLayer, GrowingLayer):
        return functools.partial(_cut, layer, int(layer.get_seq_length()))
    if kind is DynamicSlidingWindowLayer:
        return functools.partial(vars(layer).update, dict(vars(layer)))
    if kind is StaticLayer:
        return layer.reset if kept is None else functools.partial(_set_length, layer, *kept)
    if kind is StaticSlidingWindowLayer and not (layer.is_initialized and layer.keys.requires_grad):
        length = layer.cumulative_length_int
        return functools.partial(_set_window, layer, length, kept) if length else layer.reset
    return None


def _cut(layer: Any, length: int) -> None:
    if not length:
        layer.reset()
    elif layer.get_seq_length() != length:
        layer.keys, layer.values = (tensor[..., :length, :] for tensor in (layer.keys, layer.values))


def _set_length(layer: Any, length: torch.Tensor) -> None:
    layer.cumulative_length.copy_(length)


def _set_window(layer: Any, length: int, kept: tuple[torch.Tensor, ...] | None) -> None:
    layer.cumulative_length_int = length
    if kept is None:
        layer.cumulative_length.fill_(length)
    else:
        # It counts no further than the window is long.
        layer.keys.copy_(kept[0])
        layer.values.copy_(kept[1])


def cache_bytes(cache: Any, device: torch.device) -> int:
    """What the layers of a cache of transformers hold on a device; 0 for anything else."""
    layers = cache.layers if isinstance(cache, Cache) else ()
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in tensors if one.device == device}
    return sum(storage.nbytes() for storage in storages.values())
