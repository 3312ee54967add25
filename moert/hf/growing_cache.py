"""Keys and values of past tokens in memory that has room for the next ones.

transformers' growing cache copies all of them for each token; here one token is written behind those before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer

from moert.hf.own_forward import is_differentiated, is_recorded

GROWTH = 1.5
LEAST_ROOM = 64
"""Memory is made for so many times the tokens there are, and for so many more at least."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` [B, H, T, D] are the beginnings of larger tensors.

    Nothing that was handed out is ever written to: where the cache was cut, reordered or replaced since the last token,
    or is shared, the next one goes into new memory. Copies and pickles of it are plain `DynamicLayer`s.
    """

    keys: Any
    values: Any
    _room: tuple[torch.Tensor, ...] | None = None
    _filled = 0
    """Tokens that have been written to `_room`."""
    _handed: tuple[torch.Tensor, torch.Tensor] | None = None
    """What the latest update returned."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicLayer.update`: the new tokens behind those there are. The result is valid for good."""
        if not (self.is_initialized and _fit(self.keys, key_states) and _fit(self.values, value_states)):
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if self._room is None or not self._is_whole(before) or after > self._room[0].shape[-2]:
            n_rows = max(int(GROWTH * after), after + LEAST_ROOM)
            self._room = tuple(_with_room(old, n_rows) for old in (self.keys, self.values))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room.narrow(2, before, after - before).copy_(new)
        return self._hand_out(after)

    def room_for_token(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """Where the next token's key and value may be written, behind how many tokens; then call `token_written`.

        Returns:
            Two tensors [B, H, R, D] and T < R, or None: they are to be given to `update`, which makes room.
        """
        room, length = self._room, self._filled
        if room is None or length >= room[0].shape[-2] or not _is_plain(room[0]):
            return None
        if "keys" in vars(self) and not (_is_plain(self.keys) and _is_plain(self.values) and self._is_whole(length)):
            return None
        if room[0].is_inference() and not torch.is_inference_mode_enabled():
            return None
        return room[0], room[1], length

    def token_written(self) -> None:
        """A token has been written where `room_for_token` said."""
        self._filled += 1
        # Made when somebody wants them: see `__getattr__`.
        self._handed = None
        for name in ("keys", "values"):
            vars(self).pop(name, None)

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values") and self._room is not None:
            self._hand_out(self._filled)
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def _hand_out(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._room is not None
        self._filled = length
        self._handed = (self._room[0].narrow(2, 0, length), self._room[1].narrow(2, 0, length))
        self.keys, self.values = self._handed
        return self._handed

    def _is_whole(self, length: int) -> bool:
        """Whether `keys` and `values` are what `_room` was filled with, all of it."""
        assert self._room is not None
        if self._room[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # may not be written to here
        if self._handed is not None and self.keys is self._handed[0] and self.values is self._handed[1]:
            return self._filled == length
        return self._filled == length and all(
            old.data_ptr() == room.data_ptr()
            and old.shape == room[:, :, :length].shape
            and old.stride() == room.stride()
            for old, room in zip((self.keys, self.values), self._room, strict=True)
        )

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        state = {"keys": self.keys, "values": self.values}
        state |= {name: value for name, value in vars(self).items() if name not in ("_room", "_filled", "_handed")}
        for name in ("keys", "values"):
            if state.get(name) is not None:
                state[name] = state[name].contiguous()
        return _plain, (state,)


def _plain(state: dict[str, Any]) -> DynamicLayer:
    layer = DynamicLayer()
    vars(layer).update(state)
    return layer


def _fit(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether tokens are to be written behind others of their kind; a layer that was just made has none."""
    return (
        _is_plain(old)
        and _is_plain(new)
        and old.dim() == new.dim() == 4
        and old.dtype is new.dtype
        and old.shape[:2] == new.shape[:2]
        and old.shape[3] == new.shape[3]
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.is_cpu and not is_recorded() and not is_differentiated(tensor)


def _with_room(old: torch.Tensor, n_rows: int) -> torch.Tensor:
    batch, heads, length, width = old.shape
    room = old.new_empty(batch, heads, n_rows, width)
    room[:, :, :length] = old
    return room


def grow(model: nn.Module) -> RemovableHandle:
    """Have the growing caches that `model` is called with grow in place; returns the hook to remove."""
    return model.register_forward_pre_hook(_prepare, with_kwargs=True)


def _prepare(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or cache.offloading:
        return
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
