"""Rotary position embedding on the CPU: a function of an attention's module, computed by moert's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moert.hf.own_forward import is_differentiated
from moert.hf.rebinding import names_in
from moert.hf.unchanged import Unchanged
from moert.kernels.cpu import HALVES
from moert.kernels.rotary import rotate

NAME = "apply_rotary_pos_emb"


class Embedding:
    """The function (q, k, cos, sin) -> (q, k) that a module of Python code has under its name."""

    def __init__(self, names: dict[str, Any], tried: Callable[..., Any], whole: bool) -> None:
        self._names, self._tried, self._whole = names, tried, whole

    def turns(self, n_angles: int, width: int) -> bool:
        """Whether the kernel is what turns heads of `width` numbers by so many angles."""
        return self._names[NAME] is self._tried and (n_angles == width or not self._whole)

    def note(self, parts: Unchanged) -> None:
        """What the module's code has under the name."""
        parts.add_entry(self._names, NAME)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self._names[NAME]
        if len(args) == 4 and not kwargs and function is self._tried and all(map(_is_plain, args)):
            q, k, cos, sin = args
            if not torch.is_autocast_enabled("cpu"):
                turned_q = rotate(q, cos, sin, self._whole)
                turned_k = None if turned_q is None else rotate(k, cos, sin, self._whole)
                if turned_k is not None:
                    return turned_q, turned_k
        return function(*args, **kwargs)


def rotary_embedding(forward: Any, known: dict[Any, bool | None]) -> dict[str, Any]:
    """What the embedding that a forward calls is to be, under its name, if the kernel gives the very bits of it.

    Args:
        known: what trying each function found; written to.
    """
    names = getattr(forward, "__globals__", {})
    function = names.get(NAME)
    if function is None or NAME not in names_in(forward):
        return {}
    if function not in known:
        known[function] = _turns_whole_heads(function)
    whole = known[function]
    return {} if whole is None else {NAME: Embedding(names, function, whole)}


def _is_plain(tensor: Any) -> bool:
    return type(tensor) is torch.Tensor and not is_differentiated(tensor)


def _turns_whole_heads(function: Callable[..., Any]) -> bool | None:
    """Or perhaps only the first numbers of each; None for a function that the kernel does not compute."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for whole, turned in ((True, (8,)), (False, (8, 4))):
                if all(_is_ours(function, dtype, count, whole) for dtype in HALVES for count in turned):
                    return whole
    except Exception:  # it may fail in any way
        return None
    return None


def _is_ours(function: Callable[..., Any], dtype: torch.dtype, turned: int, whole: bool) -> bool:
    """Bit for bit, on heads as attentions lay them out, of which the first numbers are turned."""
    generator = torch.Generator("cpu").manual_seed(turned)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    for batch, tokens in ((2, 5), (1, 1)):
        q, k = normal(batch, tokens, 4, 8).transpose(1, 2), normal(batch, tokens, 2, 8).transpose(1, 2)
        cos, sin = normal(batch, tokens, turned), normal(batch, tokens, turned)
        outputs = function(q, k, cos, sin)
        for x, expected in zip((q, k), outputs, strict=True):
            found = rotate(x, cos, sin, whole)
            if found is None or expected.dtype is not dtype or not torch.equal(found, expected):
                return False
            if tokens > 1 and found.stride() != expected.stride():
                return False
    return True
