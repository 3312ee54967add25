"""Whether modules are as they were when somebody looked at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module

from moert import _C
from moert.hf.norms import is_plain, settings_of


class Unchanged:
    """Children of some modules, with their tensors and forwards, as they are now. Asking takes microseconds."""

    def __init__(self) -> None:
        self._parts: list[tuple[Any, ...]] = []
        self._ways: list[tuple[Any, ...]] = []
        self._codes: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._hooks: list[dict[Any, Any]] = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]

    def add(self, parent: nn.Module, name: str, *, before: bool = True, after: bool = True) -> None:
        """A child of `parent`, which is to have no hooks on what goes in (`before`) and comes out (`after`)."""
        module = parent._modules[name]
        assert module is not None
        attributes = vars(module)
        # What the entries are in is far away in memory by the time it is asked for, so there are few.
        if (holder := (vars(parent), "_modules", parent._modules)) not in self._parts:
            self._parts.append(holder)
        self._parts.append((parent._modules, name, module))
        forward = attributes.get("forward")
        self._ways.append((attributes, "forward") if forward is None else (attributes, "forward", forward))
        if type(module) is not nn.Linear:  # whose settings only say what its weight is
            self.add_ways(module)
        self.add_tensors(module)
        if before:
            self._hooks.append(module._forward_pre_hooks)
        if after:
            self._hooks.append(module._forward_hooks)

    def add_tensors(self, module: nn.Module) -> None:
        """The parameters and buffers of `module` itself."""
        for tensors in (module._parameters, module._buffers):
            for kind, tensor in tensors.items():
                self._parts.append((tensors, kind, tensor))
                if tensor is not None:
                    self._tensors.append((tensor, tensor.data_ptr()))

    def add_ways(self, module: nn.Module) -> None:
        """What decides how `module` computes beside its parts: its class's code and its own settings."""
        self._codes.append((type(module), type(module).forward))
        self._ways += [
            (vars(module), name, value)
            for name, value in settings_of(module).items()
            if is_plain(value) or callable(value)
        ]

    @property
    def holds(self) -> bool:
        """Whether the modules compute what they did, and nobody wants to know what goes in or comes out."""
        for kind, code in self._codes:
            if kind.forward is not code:
                return False
        return not any(self._hooks) and _C.holds(self._ways) and not self.is_gone

    @property
    def is_gone(self) -> bool:
        """Whether a module or a tensor is another."""
        if not _C.holds(self._parts):
            return True
        for tensor, at in self._tensors:  # noqa: SIM110  # in a fraction of the time
            if tensor.data_ptr() != at:
                return True
        return False
