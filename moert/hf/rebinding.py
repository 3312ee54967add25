"""The code of a class's function, run with other values for some of its global names."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from moert.hf.own_forward import OwnForward, is_recorded


def names_in(function: Any) -> set[str]:
    """The global names and attributes in the function's code and that of the functions in it.

    None for what is no plain function, or writes to its module.
    """
    if type(function) is not FunctionType:
        return set()
    codes = list(_codes(function.__code__))
    if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for code in codes for step in dis.get_instructions(code)):
        return set()
    return {name for code in codes for name in code.co_names}


def rebind(function: Any, instead: dict[str, Any]) -> Callable[..., Any]:
    """The function, which finds these values under these global names and all others where it did."""
    names = _Globals(function.__globals__, instead)
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class ReboundForward(OwnForward):
    """Stands in a module's own `forward`: the class's code with other values for some global names."""

    def __init__(self, module: nn.Module, instead: dict[str, Any]) -> None:
        super().__init__(module)
        self.instead = instead
        self._forward = type(module).forward
        self.function = rebind(self._forward, instead)
        """The class's code with those values; takes the module first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        module = self.module()
        forward = type(module).forward
        # What records shall meet functions that it knows.
        function = forward if is_recorded() or forward is not self._forward else self.function
        return function(module, *args, **kwargs)


class _Globals(dict[str, Any]):
    """The globals of a module as they are at any time, but for some."""

    def __init__(self, of: dict[str, Any], instead: dict[str, Any]) -> None:
        super().__init__(instead)
        self._of = of

    def __missing__(self, name: str) -> Any:
        return self._of[name]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
