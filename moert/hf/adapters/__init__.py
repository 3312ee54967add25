"""How each kind of experts module holds its weights and computes: one file an adapter, found by being there."""

from __future__ import annotations

from functools import cache

from torch import nn

from moert.errors import UnsupportedModelError
from moert.hf.adapters.base import ExpertsAdapter
from moert.hf.adapters.unsupported import why_unsupported
from moert.plugins import available, load_plugin

__all__ = ["ExpertsAdapter", "adapter_for", "find_experts"]

_NOT_ADAPTERS = ("unsupported",)


@cache
def _adapter_classes() -> tuple[type[ExpertsAdapter], ...]:
    names = [name for name in available(__name__) if name not in _NOT_ADAPTERS]
    return tuple(load_plugin(__name__, name, ExpertsAdapter) for name in names)  # type: ignore[type-abstract]  # only looked up


def adapter_for(module: nn.Module) -> ExpertsAdapter | None:
    """The adapter of an experts module; None for any other module."""
    for adapter in _adapter_classes():
        if adapter.matches(module):
            return adapter(module)
    return None


def find_experts(model: nn.Module) -> dict[str, ExpertsAdapter]:
    """Module path -> adapter, for every experts module of `model`, in module order.

    Raises:
        UnsupportedModelError: the model has no experts modules, or one that moert cannot run; class and reason are
            named and nothing has been changed.
    """
    found = {}
    for path, module in model.named_modules():
        reason = why_unsupported(module)
        if reason is not None:
            raise UnsupportedModelError(f"{type(model).__name__}: {type(module).__name__} at {path!r}: {reason}")
        adapter = adapter_for(module)
        if adapter is not None:
            adapter.check(path)
            found[path] = adapter
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts modules: it is a dense model, and moert has nothing to offload; "
            "use transformers as it is"
        )
    return found
