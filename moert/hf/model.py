"""What a model gains while its experts are offloaded: a `with` statement, and a word where it would be saved."""

from __future__ import annotations

import warnings
import weakref
from functools import cache
from types import TracebackType
from typing import Any, NoReturn

from torch import nn

from moert.errors import MoertError
from moert.hf.experts import OffloadedExperts
from moert.hf.policy_feed import PolicyFeed
from moert.hf.spared_forward import SparedForward
from moert.runtime.runtime import OffloadRuntime


class Offloaded:
    """Mixed into the model's class, under the class's own name, until `unpatch`."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        leave = self.__dict__.get("_moert_leave")
        if leave is not None:  # else it has been unpatched within the statement
            leave(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: what HuggingFace would write has no experts in it."""
        raise MoertError(
            "save_pretrained would write this model without its experts, which are offloaded; call "
            "moert.unpatch(model) first, or copy the checkpoint it was loaded from"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's, without the experts, with one warning that says so."""
        warnings.warn(
            "state_dict() of this model is without its experts, which are offloaded; moert.unpatch(model) first if "
            "they are to be in it",
            RuntimeWarning,
            stacklevel=2,
        )
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` calls with a static cache on a GPU: the model as it is. Experts that come and go have no
        place in what torch.compile makes; moert has graphs of its own."""
        return self.__call__  # type: ignore[operator]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise MoertError("a model with offloaded experts cannot be copied: load it a second time, or unpatch it first")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise MoertError("a model with offloaded experts cannot be pickled: unpatch it first")


@cache
def _offloaded_class(cls: type) -> type:
    return type(
        cls.__name__,
        (Offloaded, cls),
        {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__},
    )


def mark(model: nn.Module, runtime: OffloadRuntime, leave: Any) -> None:
    """Give `model` the methods of `Offloaded`; `leave(model)` runs at the end of a `with` statement over it.

    The runtime is closed when the model is garbage.
    """
    model.__dict__["_moert_leave"] = leave
    model.__dict__["_moert_finalizer"] = weakref.finalize(model, runtime.close)
    model.__dict__["_moert_feed"] = PolicyFeed(model, offloaded_modules(model), runtime)
    model.__class__ = _offloaded_class(type(model))  # type: ignore[arg-type]  # stub of Module.__hash__


def unmark(model: nn.Module) -> None:
    """Take back what `mark` did."""
    model.__class__ = next(cls for cls in type(model).__mro__[1:] if cls is not Offloaded)
    model.__dict__.pop("_moert_leave")
    model.__dict__.pop("_moert_finalizer").detach()
    model.__dict__.pop("_moert_feed").remove()


def close(model: nn.Module) -> None:
    """See `moert.close`."""
    runtime_of(model).close()
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, SparedForward):
            forward.drop_graphs()


def is_marked(model: nn.Module) -> bool:
    """Whether `model` itself (not a module within it) is one that moert loaded or patched."""
    return isinstance(model, Offloaded)


def offloaded_modules(model: nn.Module) -> dict[str, OffloadedExperts]:
    """Module path -> module, for every offloaded experts module in `model`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, OffloadedExperts)}


def runtime_of(model: nn.Module) -> OffloadRuntime:
    """The runtime behind `model`, which may also wrap the model that was loaded or patched.

    Raises:
        MoertError: nothing in it is offloaded.
    """
    for module in offloaded_modules(model).values():
        if module.runtime is not None:
            return module.runtime
    raise MoertError(f"{type(model).__name__} has no offloaded experts; use moert.load or moert.patch first")
