"""What stands in a module's own `forward`, where Python finds it before the class's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from moert.errors import MoertError

Note = Callable[..., None]
"""Called with an output as moert and as torch computes it, and how often it is rounded, unless once."""


class OwnForward:
    """Computes what the class of one module does. The module keeps its class, parameters and hooks."""

    before: Callable[..., Any] | None = None
    """What stood in the module's `forward` before, and does again afterwards; None: the class's."""

    def __init__(self, module: nn.Module, note: Note | None = None) -> None:
        # A module that its own attribute holds would outlive its last user, with its weights.
        self._module = weakref.ref(module)
        self._note = note

    def module(self) -> nn.Module:
        """The module that this is the forward of.

        Raises:
            MoertError: it is gone.
        """
        module = self._module()
        if module is None:
            raise MoertError("this is the forward of a layer that is gone; keep the layer and call that")
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """For the copy of the module, which is being made; alone, it stays with its module."""
        copied = memo.get(id(self._module()))
        if not isinstance(copied, nn.Module):
            return self
        mine = object.__new__(type(self))
        vars(mine).update(vars(self))
        mine._module = weakref.ref(copied)
        return mine

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled module needs no moert to be read: it computes as its class does.
        return getattr, (self._module(), "forward")


def is_recorded() -> bool:
    """Whether what runs now is being compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, of which torch.compile makes nothing: it ends a graph before and begins one after it."""
    return function(*arguments)


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether autograd needs to see what becomes of it, backwards or forwards, or `torch.func` does."""
    return (
        (tensor.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        # Slow, and only of use within a dual level.
        or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None)
    )
