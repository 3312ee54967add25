"""A model's own layers out of a GPU's memory while experts have most of it: they give some back."""

from __future__ import annotations

import functools
import inspect
import re
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from moert.config import format_bytes
from moert.device.base import OutOfDeviceMemoryError, is_out_of_memory
from moert.hf.cache_mark import CacheMark, cache_bytes
from moert.hf.own_forward import OwnForward, is_recorded
from moert.hf.placement import is_dispatched
from moert.runtime.device_sizing import Given, Regained
from moert.runtime.runtime import OffloadRuntime

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the bytes of all slots, how much is given back at the first, the second, ... time that one call runs out."""

_TRIED = re.compile(r"Tried to allocate ([\d.]+) (GiB|MiB|KiB|bytes)")
_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "bytes": 1}


class ModelOutOfMemoryError(OutOfDeviceMemoryError, torch.OutOfMemoryError):
    """What a model needs besides experts has not been there on its device; torch's error is the cause."""


class SparedForward(OwnForward):
    """Stands in the `forward` of a whole model whose experts come to a device, before whatever stood there.

    Where a pass runs out of the device's memory, slots are given back. It is run again if nobody can tell: no hooks
    within the model, arguments that it does not change, and a cache that can be put back to what it held. Else it is a
    `ModelOutOfMemoryError` with the numbers, and the next call has more memory.

    Where there is room again some passes later, experts get slots back: see `moert.runtime.device_regrowth`.
    """

    def __init__(self, module: nn.Module, runtime: OffloadRuntime) -> None:
        super().__init__(module)
        self._runtime = runtime
        self.before = vars(module).get("forward")
        # `generate` looks at what a model takes.
        self.__signature__ = inspect.signature(module.forward)
        self._names = list(self.__signature__.parameters)
        self._is_said = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As what stood there before.

        Raises:
            ModelOutOfMemoryError: see there.
        """
        module = self.module()
        if is_recorded():
            return self._own(module, *args, **kwargs)
        if args and len(args) <= len(self._names):
            kwargs |= dict(zip(self._names, args, strict=False))
            args = ()
        cache = kwargs.get("past_key_values")
        if self._runtime.is_short:
            self._grow(cache)
        mark: CacheMark | None = None
        for share in (*SHARES, None):
            try:
                if mark is None and isinstance(cache, Cache):
                    mark = CacheMark(cache, _n_tokens(kwargs))
                return self._run(module, args, kwargs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                _let_go(error)
                given = self._give_back(error, share, cache)
                if given is None:
                    raise
                is_repeated = given.nbytes > 0 and self._can_repeat(module, args, kwargs, mark)
                if not is_repeated:
                    raise ModelOutOfMemoryError(_describe(error, given)) from error
                self._say(error, given)
            if mark is not None:
                mark.go_back()
        raise AssertionError("nothing is given back the last time")

    def _own(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs) if self.before is None else self.before(*args, **kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._own(module, *args, **kwargs)

    def drop_graphs(self) -> None:
        """Let go of what `capture` of the runtime gave."""

    def _give_back(self, error: Exception, share: float | None, cache: Any) -> Given | None:
        self.drop_graphs()
        held = functools.partial(cache_bytes, cache)
        if share is None:
            return self._runtime.give_back(0, 0.0, held)
        return self._runtime.give_back(2 * _tried(error), share, held)

    def _grow(self, cache: Any) -> None:
        held = functools.partial(cache_bytes, cache)
        if self._runtime.can_grow(held):
            self.drop_graphs()
            for regained in self._runtime.grow(held):
                self._is_said = False
                _say_regained(regained)

    def _can_repeat(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mark: CacheMark | None
    ) -> bool:
        if mark is None and isinstance(kwargs.get("past_key_values"), Cache):
            return True  # it has not begun
        given = {name: value for name, value in kwargs.items() if name != "past_key_values" or mark is None}
        return (
            not args
            and not module.training
            and (mark is None or mark.can_return)
            and is_plain(given)
            and is_unseen(module)
        )

    def _say(self, error: Exception, given: Given) -> None:
        if not self._is_said:
            self._is_said = True
            warnings.warn(
                f"{_first_line(error)}: experts on {given.device} have given {format_bytes(given.nbytes)} back, and "
                f"the pass is run again. {format_bytes(given.held.slot_bytes)} are left to them, which is slower, "
                "until there is room again; end what else uses the device, or give device_memory no more than that "
                "from the start",
                RuntimeWarning,
                stacklevel=4,
            )


def _say_regained(regained: Regained) -> None:
    missing = f"; {format_bytes(regained.missing_bytes)} are still missing" if regained.missing_bytes else ""
    warnings.warn(
        f"there is room on {regained.device} again: experts have got {format_bytes(regained.nbytes)} back there, and "
        f"have {format_bytes(regained.held.slot_bytes)}{missing}",
        RuntimeWarning,
        stacklevel=5,
    )


def _describe(error: Exception, given: Given) -> str:
    held, memory = given.held, given.memory
    if given.nbytes:
        helps = f"moert has given {format_bytes(given.nbytes)} of the experts' back, which the next call has: try again"
    else:
        helps = "fewer experts would not do for one token: take a shorter prompt or a smaller batch"
    return (
        f"{_first_line(error)}: the model around the experts found no memory on {given.device}, which has "
        f"{format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} free now. Experts have "
        f"{format_bytes(held.slot_bytes)} there in {held.slots} slots, and {format_bytes(held.beside_bytes)} of rows "
        f"that others come up in; {helps}, end what else uses the device, or give device_memory at most "
        f"{format_bytes(held.slot_bytes)}"
    )


def _n_tokens(kwargs: dict[str, Any]) -> int | None:
    given = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((int(one.shape[1]) for one in given if isinstance(one, torch.Tensor) and one.dim() > 1), None)


def _tried(error: Exception) -> int:
    """How much torch says it could not allocate; 0 where it does not say."""
    found = _TRIED.search(str(error))
    return 0 if found is None else int(float(found[1]) * _UNITS[found[2]])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". GPU ")[0].strip().rstrip(".") or "out of memory"


def _let_go(error: BaseException) -> None:
    """The frames of a pass that failed hold its tensors for as long as somebody has the error."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__


def is_plain(value: Any) -> bool:
    """Whether a model's code changes nothing in `value`: tensors, numbers, texts, and what is made of them."""
    if value is None or isinstance(value, (torch.Tensor, torch.dtype, bool, int, float, str)):
        return True
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return isinstance(value, (tuple, list)) and all(map(is_plain, value))


def is_unseen(module: nn.Module) -> bool:
    """Whether nobody would notice that a pass is run twice."""
    has_global = every_module._global_forward_hooks or every_module._global_forward_pre_hooks
    return not has_global and not any(has_hooks(child, is_dispatched(module)) for child in module.modules())


def has_hooks(module: nn.Module, is_dispatched: bool = False) -> bool:
    """Whether somebody looks at what `module` computes; passes of models within the model are part of its own.

    Args:
        is_dispatched: accelerate's hooks in it are those that move hidden states from device to device.
    """
    is_seen = bool(module._forward_hooks or module._forward_pre_hooks) and not isinstance(module, PreTrainedModel)
    return is_seen or (hasattr(module, "_hf_hook") and not is_dispatched)
