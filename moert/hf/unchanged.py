"""Whether modules are as they were when somebody looked at them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

from moert import _C
from moert.hf.norms import is_plain, settings_of


class Unchanged:
    """Children of some modules, with their tensors and forwards, as they are now. Asking takes microseconds."""

    def __init__(self) -> None:
        # Dicts with a key and what is to be under it, itself for nothing; None as key: how many entries it is to have.
        self._parts: list[_Entry] = []
        self._ways: list[_Entry] = []
        self._codes: list[tuple[Any, Any]] = []
        self._tensors: list[Any] = []
        """Each with its address behind it."""
        self._flat: tuple[list[Any], list[Any]] | None = None
        for hooks in (every_module._global_forward_hooks, every_module._global_forward_pre_hooks):
            self._ways.append((hooks, None, 0))

    def add(self, parent: nn.Module, name: str, *, before: bool = True, after: bool = True) -> None:
        """A child of `parent`, which is to have no hooks on what goes in (`before`) and comes out (`after`)."""
        module = parent._modules[name]
        assert module is not None
        attributes = vars(module)
        self._parts += [(vars(parent), "_modules", parent._modules), (parent._modules, name, module)]
        self.add_entry(attributes, "forward")
        if type(module) is not nn.Linear:  # whose settings only say what its weight is
            self.add_ways(module)
        self.add_tensors(module)
        if before:
            self._ways.append((module._forward_pre_hooks, None, 0))
        if after:
            self._ways.append((module._forward_hooks, None, 0))
        self._flat = None

    def add_tensors(self, module: nn.Module) -> None:
        """The parameters and buffers of `module` itself."""
        for tensors in (module._parameters, module._buffers):
            for kind, tensor in tensors.items():
                self._parts.append((tensors, kind, tensor))
                if tensor is not None:
                    self._tensors += [tensor, tensor.data_ptr()]
        self._flat = None

    def add_ways(self, module: nn.Module) -> None:
        """What decides how `module` computes beside its parts: its class's code and its own settings."""
        self._codes.append((type(module), type(module).forward))
        for name, value in settings_of(module).items():
            if is_plain(value) or callable(value):
                self.add_entry(vars(module), name)

    def add_entry(self, attributes: dict[Any, Any], key: Any) -> None:
        """What is under `key` now, or that nothing is."""
        self._ways.append((attributes, key, attributes.get(key, attributes)))
        self._flat = None

    def add_hooks(self, module: nn.Module) -> None:
        """Those that look at what goes into `module` and comes out: they and no others."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            self._ways += [(hooks, None, len(hooks)), *((hooks, key, hook) for key, hook in hooks.items())]
        self._flat = None

    def add_count(self, attributes: dict[Any, Any]) -> None:
        """How many entries there are now."""
        self._ways.append((attributes, None, len(attributes)))
        self._flat = None

    def add_unseen(self, module: nn.Module) -> None:
        """Nobody is to look at what goes into `module` and comes out."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            self._ways.append((hooks, None, 0))
        self._flat = None

    def join(self, other: Unchanged) -> None:
        """All that `other` asks."""
        self._parts += other._parts
        self._ways += other._ways
        self._codes += [code for code in other._codes if code not in self._codes]
        self._tensors += other._tensors
        self._flat = None

    @property
    def holds(self) -> bool:
        """Whether the modules compute what they did, and nobody wants to know what goes in or comes out."""
        for kind, code in self._codes:
            if kind.forward is not code:
                return False
        return _C.holds((self._flat or self._flatten())[0]) and _C.are_at(self._tensors)

    @property
    def is_gone(self) -> bool:
        """Whether a module or a tensor is another."""
        return not (_C.holds((self._flat or self._flatten())[1]) and _C.are_at(self._tensors))

    def _flatten(self) -> tuple[list[Any], list[Any]]:
        """All entries, and those that are parts, one behind the other as the extension takes them."""
        self._flat = _flattened([*self._parts, *self._ways]), _flattened(self._parts)
        return self._flat


_Entry = tuple[dict[Any, Any], Any, Any]


def _flattened(entries: list[_Entry]) -> list[Any]:
    """Each once, those of a dict together: what is in it is near in memory."""
    by_dict: dict[int, dict[tuple[Any, int], _Entry]] = {}
    for entry in entries:
        by_dict.setdefault(id(entry[0]), {})[entry[1], id(entry[2])] = entry
    return [item for of in by_dict.values() for entry in of.values() for item in entry]
