"""Forward passes of a model as they begin and end, and which of them go on with the same sequences."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_CACHES = ("past_key_values", "cache_params")
_TOKENS = {
    # In an encoder-decoder the tokens are the decoder's: its cache is what sequences go on in.
    "decoder_input_ids": "decoder_attention_mask",
    "decoder_inputs_embeds": "decoder_attention_mask",
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
}
"""What a model is given tokens by, and the mask that says which of them are padding."""


class Rows:
    """The sequences of a batch, from a fresh cache on, for as long as the cache lives."""

    def __init__(self, rows: int, cache: object | None) -> None:
        self.rows = rows
        self.names: list[str] = []
        """Of the sequences, if somebody gave them names."""
        self.n_tokens = 0
        """Tokens of each that are in the cache."""
        self.took_back = False
        """Whether tokens were removed again: drafts that were rejected."""
        self._cache: weakref.ref[object] | None = None
        if cache is not None:
            self.bind(cache)

    def bind(self, cache: object) -> None:
        """It goes on in `cache`."""
        try:
            self._cache = weakref.ref(cache)
        except TypeError:
            self._cache = None

    @property
    def is_over(self) -> bool:
        """Whether no forward pass can go on with it."""
        return self._cache is None or self._cache() is None


class Forward:
    """One forward pass of the outermost model: S tokens of each of B sequences."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.module = module
        self.cache = inputs.get("past_key_values")
        if self.cache is None:
            self.cache = inputs.get("cache_params")
        self.token_ids: torch.Tensor | None = None
        """[B, S]"""
        self.shape: tuple[int, int] | None = None
        self.mask: Any = None
        for name, mask in _TOKENS.items():
            tokens = inputs.get(name)
            if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2:
                self.shape = (tokens.shape[0], tokens.shape[1])
                self.token_ids = tokens if tokens.dim() == 2 else None
                self.mask = inputs.get(mask)
                break
        self.length = _length(self.cache)
        """Tokens in the cache before; None: unknown."""
        self.rows = Rows(1, None)
        self.is_new = False
        """Whether its sequences begin with it."""


class ForwardWatch:
    """Tells of a model's forward passes while it is installed. Passes of models within a model's are part of it."""

    def __init__(
        self, model: nn.Module, begin: Callable[[Forward], None], end: Callable[[Forward], None] | None = None
    ) -> None:
        """`begin` is called with each pass before it starts, `end` when it is over or has failed."""
        self._begin = begin
        self._end = end
        self._rows: weakref.WeakKeyDictionary[Any, Rows] = weakref.WeakKeyDictionary()
        self._names: dict[type, list[str]] = {}
        self.current: Forward | None = None
        self._handles = []
        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, with_kwargs=False, always_call=True))

    def remove(self) -> None:
        """Take the hooks out. Idempotent."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.current is not None:
            if self.current.module is not module:
                return
            self._finish(self.current)  # an interrupt ended it, which runs no hook
        forward = Forward(
            module, {**dict(zip(self._names_of(module), args, strict=False)), **kwargs} if args else kwargs
        )
        self._find_rows(forward)
        self._begin(forward)
        self.current = forward

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self.current
        if forward is None or forward.module is not module:
            return
        if forward.cache is None:
            made = next((cache for name in _CACHES if (cache := getattr(output, name, None)) is not None), None)
            if made is not None:
                forward.rows.bind(made)
                self._remember(made, forward.rows)
        self._finish(forward)

    def _finish(self, forward: Forward) -> None:
        self.current = None
        if self._end is not None:
            self._end(forward)

    def _find_rows(self, forward: Forward) -> None:
        n_rows, n_tokens = forward.shape or (1, 0)
        known = self._known(forward.cache)
        if known is None or known.rows != n_rows or forward.length == 0:
            forward.is_new = True
            known = Rows(n_rows, forward.cache)
            known.n_tokens = forward.length or 0
            if forward.cache is not None:
                self._remember(forward.cache, known)
        elif forward.length is not None and forward.length < known.n_tokens:
            known.took_back = True
            known.n_tokens = forward.length
        known.n_tokens += n_tokens
        forward.rows = known

    def _known(self, cache: object | None) -> Rows | None:
        try:
            return None if cache is None else self._rows.get(cache)
        except TypeError:  # a tuple of tensors, as caches were once
            return None

    def _remember(self, cache: object, rows: Rows) -> None:
        try:
            self._rows[cache] = rows
        except TypeError:
            return

    def _names_of(self, module: nn.Module) -> list[str]:
        kind = type(module)
        if kind not in self._names:
            self._names[kind] = list(inspect.signature(kind.forward).parameters)[1:]
        return self._names[kind]


def _length(cache: Any) -> int | None:
    try:
        return None if cache is None else int(cache.get_seq_length())
    except (AttributeError, ValueError, TypeError):  # a state without positions
        return None


def real_tokens(forward: Forward) -> torch.Tensor | None:
    """[B, S] bool, on the mask's device: which tokens are no padding; None: all, or it is not known."""
    mask = forward.mask
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if isinstance(value, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or forward.shape is None:
        return None
    rows, columns = forward.shape
    if mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= columns:
        return mask[:, mask.shape[1] - columns :].ne(0)
    if mask.dim() == 4 and columns > 1 and mask.shape[0] == rows and mask.shape[2] == columns:
        # What a token may attend to: padding is what may not even attend to itself.
        begin = forward.length or 0
        if mask.shape[3] < begin + columns:
            return None
        own = mask[:, 0, :, begin : begin + columns].diagonal(dim1=-2, dim2=-1)
        return own if own.dtype is torch.bool else own > -1.0
    return None
