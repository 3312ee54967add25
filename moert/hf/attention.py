"""What attentions do between their projections, on the CPU: the embedding of positions, and one token's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moert.hf.own_forward import is_differentiated
from moert.hf.rebinding import ReboundForward, names_in
from moert.hf.rotary import rotary_embedding
from moert.kernels.attention import attend

_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"


class AttentionForward(ReboundForward):
    """Stands in an attention's own `forward`: the class's code, in which some functions are moert's."""


def attention_forward(module: nn.Module, known: dict[Any, bool | None]) -> AttentionForward | None:
    """A forward for `module` if its class calls what moert has a kernel for.

    Args:
        known: what trying each rotary embedding found; written to.
    """
    forward = type(module).forward
    instead = rotary_embedding(forward, known)
    functions = getattr(forward, "__globals__", {}).get(_FUNCTIONS)
    if functions is not None and _FUNCTIONS in names_in(forward):
        instead[_FUNCTIONS] = _Functions(forward.__globals__)
    return AttentionForward(module, instead) if instead else None


class _Functions:
    """transformers' attention functions by name, as they are at any time; torch's is ours for one query token."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._names[_FUNCTIONS], name)

    def __getitem__(self, implementation: str) -> Any:
        return _instead_of(self._names[_FUNCTIONS][implementation])

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Any:
        return _instead_of(self._names[_FUNCTIONS].get_interface(implementation, default))


def _instead_of(function: Any) -> Any:
    return _attention if function is sdpa_attention_forward else function


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `sdpa_attention_forward`."""
    if (
        query.shape[2] == 1
        and dropout == 0
        and position_bias is None
        and cache is None
        and kwargs.get("softcap") is None
        and not kwargs.get("output_attentions")
        and getattr(module, "num_key_value_groups", 1) * key.shape[1] == query.shape[1]
        and _is_plain(query)
        and _is_plain(key)
        and _is_plain(value)
        and (attention_mask is None or _is_plain(attention_mask))
        and not torch.is_autocast_enabled("cpu")
    ):
        output = attend(query, key, value, attention_mask, query.shape[3] ** -0.5 if scaling is None else scaling)
        if output is not None:
            return output, None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        cache=cache,
        **kwargs,
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and not is_differentiated(tensor)
