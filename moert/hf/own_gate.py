"""The gate of an experts module as its own code computes it, called on numbers to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moert.hf.adapters import ExpertsAdapter

LARGEST_LIMIT = 1e15
"""A limit above it is none, and squares of it are still finite."""


class UnusableGateError(Exception):
    """The module's gate is not one that the kernels could have; its text is the reason."""


@dataclass(frozen=True)
class OwnGate:
    """The gate of a module, as it is."""

    module: nn.Module
    function: Callable[[torch.Tensor], torch.Tensor]
    gated: bool
    width: int
    numbers: tuple[float, ...]
    """Every finite number in an attribute of the module, what is in it, and its configuration; ascending."""

    @classmethod
    def of(cls, experts: ExpertsAdapter | nn.Module, width: int) -> OwnGate:
        module: nn.Module = experts.module if isinstance(experts, ExpertsAdapter) else experts
        gated = bool(getattr(experts, "has_gate", getattr(module, "has_gate", True)))
        name = "_apply_gate" if gated else "act_fn"
        function = getattr(experts, name, None) or getattr(module, name, None)
        if function is None:
            raise UnusableGateError(f"it has no {name} that could be tried")
        return cls(module, function, gated, width, _numbers_in(module))

    @property
    def limits(self) -> list[float]:
        return [number for number in self.numbers if 0 < number <= LARGEST_LIMIT]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, U] -> [R, F]; `x` is left as it is."""
        y = self.function(x.clone())
        expected = (x.shape[0], self.width)
        if not isinstance(y, torch.Tensor) or y.shape != expected or y.dtype != x.dtype:
            kind = f"{list(y.shape)} of {y.dtype}" if isinstance(y, torch.Tensor) else type(y).__name__
            raise UnusableGateError(f"its gate makes {kind} from {list(x.shape)} of {x.dtype}, not {list(expected)}")
        return y

    def lay_out(self, gates: torch.Tensor, ups: torch.Tensor, rows: int, interleaved: bool) -> torch.Tensor:
        """[N] pairs -> an input [R, U] with at least `rows` rows, pair after pair, again from the first at the end."""
        rows = max(rows, -(-len(gates) // self.width))
        order = torch.arange(rows * self.width) % len(gates)
        halves = gates[order].view(rows, -1), ups[order].view(rows, -1)
        if not self.gated:
            return halves[0]
        return torch.stack(halves, dim=-1).flatten(1) if interleaved else torch.cat(halves, dim=1)

    def curve(self, gates: torch.Tensor, ups: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """The outputs, in fp64, for [N] pairs."""
        gates, ups = torch.broadcast_tensors(gates, ups)
        return self(self.lay_out(gates, ups, 1, interleaved)).flatten()[: len(gates)].double()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Plain fp32 on the CPU, wherever this is called from, and afterwards all as it was, whatever the gate does."""
        modes = [(module, module.training) for module in self.module.modules()]
        dtype = torch.get_default_dtype()
        try:
            # HuggingFace's loader makes tensors on the meta device and in the dtype of the checkpoint.
            torch.set_default_dtype(torch.float32)
            with (
                torch.device("cpu"),
                torch.autocast("cpu", enabled=False),
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)
            for module, training in modes:
                module.training = training

    def check_pure(self, x: torch.Tensor) -> torch.Tensor:
        """The output for `x`, which nothing but `x` decides.

        Raises:
            UnusableGateError: something else does.
        """
        y = self(x)
        for state, training in (
            ("call to call", self.module.training),
            ("train() to eval()", not self.module.training),
        ):
            for module in self.module.modules():
                module.training = training
            if not _same_bits(self(x), y):
                raise UnusableGateError(f"its gate changes from {state}")
        mine = x.clone()
        with _Sources(mine) as sources:
            self.function(mine)
        if sources.foreign is not None:
            raise UnusableGateError(f"its gate reads a tensor of shape {list(sources.foreign.shape)} beside its input")
        return y


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


class _Sources(TorchFunctionMode):
    """While active, finds out whether what is computed comes from one tensor alone."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self._known = {id(x): x}
        self.foreign: torch.Tensor | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors_in((args, kwargs)):
            if id(tensor) not in self._known:
                self.foreign = tensor
        result = function(*args, **(kwargs or {}))
        self._known.update((id(tensor), tensor) for tensor in _tensors_in(result))
        return result


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _numbers_in(module: nn.Module) -> tuple[float, ...]:
    holders = [*module.modules(), getattr(module, "act_fn", None), getattr(module, "config", None)]
    values = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    kept = {float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return tuple(sorted(filter(math.isfinite, kept)))
