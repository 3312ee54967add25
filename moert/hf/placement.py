"""Which part of a model is on which device: HuggingFace's `device_map`, read, made, and carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import get_balanced_memory
from torch import nn

from moert.errors import CapacityError, ConfigError

T = TypeVar("T")

DeviceMap = str | int | torch.device | Mapping[str, Any]
"""As HuggingFace's: "auto", "balanced", "balanced_low_0", "sequential", a device, or module path -> device."""

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")

_ADDED = "_moert_dispatched"


def locate(name: str, where: Mapping[str, T]) -> T:
    """What `where` says of the module or tensor `name`: the longest path in it that `name` is in counts.

    Raises:
        ConfigError: it says nothing.
    """
    path = name
    while path not in where:
        if not path:
            raise ConfigError(
                f'device_map says nothing of {name}; give it a device, or one to "", all that is not named'
            )
        path = path.rpartition(".")[0]
    return where[path]


def read_device_map(
    model: nn.Module, given: DeviceMap, max_memory: Mapping[Any, Any] | None = None
) -> dict[str, torch.device]:
    """Module path -> device; words are worked out for the part of `model` that is not offloaded, by accelerate.

    Args:
        max_memory: GPU or "cpu" -> bytes, for the words; None: what is there.

    Raises:
        CapacityError: a word, and that part does not fit on the GPUs.
        ConfigError: it names something that is no device.
    """
    if given in WORDS:
        given = _infer(model, str(given), max_memory)
        left = [name for name, one in given.items() if one in ("cpu", "disk")]
        if left:
            raise CapacityError(
                f"the dense weights do not fit on the GPUs: {', '.join(left)} would be left elsewhere; end what else "
                "uses the GPUs, or leave device_memory out to run the experts on the CPU"
            )
    named = given if isinstance(given, Mapping) else {"": given}
    return {name: _device(one) for name, one in named.items()}


def _device(one: Any) -> torch.device:
    if one == "disk":
        return torch.device("meta")
    try:
        found = torch.device("cuda", one) if isinstance(one, int) else torch.device(one)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device_map={one!r} is no device; give a word of {', '.join(WORDS)}, or devices") from error
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def _infer(model: nn.Module, word: str, max_memory: Mapping[Any, Any] | None) -> dict[str, Any]:
    whole = list(getattr(model, "_no_split_modules", None) or ())
    memory = None if max_memory is None else dict(max_memory)
    if word != "sequential":
        memory = get_balanced_memory(model, memory, no_split_module_classes=whole, low_zero=word == "balanced_low_0")
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))


def where_is(model: nn.Module, path: str) -> torch.device:
    """Where the tensors of the module at `path` are, or of the nearest module around it that has some."""
    while True:
        module = model.get_submodule(path)
        tensor = next((found for tensors in (module.parameters(), module.buffers()) for found in tensors), None)
        if tensor is not None or not path:
            return torch.device("cpu") if tensor is None else tensor.device
        path = path.rpartition(".")[0]


def move(model: nn.Module, where: Mapping[str, torch.device]) -> None:
    """Put every tensor where it belongs; hidden states follow by accelerate's hooks if that is more than one device."""
    devices = set(where.values())
    if len(devices) == 1:
        model.to(devices.pop())
        return
    before = set(model.__dict__)
    dispatch_model(model, dict(where), skip_keys=getattr(model, "_skip_keys_device_placement", None))
    model.__dict__[_ADDED] = set(model.__dict__) - before


def is_dispatched(model: nn.Module) -> bool:
    """Whether `move` has put hooks into it."""
    return _ADDED in model.__dict__


def remove_hooks(model: nn.Module) -> None:
    """Undo what `move` did, but for where tensors are."""
    added = model.__dict__.pop(_ADDED, None)
    if added is None:
        return
    remove_hook_from_submodules(model)
    for name in added & set(model.__dict__):
        del model.__dict__[name]
    for module in model.modules():
        # The hooks leave the class's own method in the instance.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
