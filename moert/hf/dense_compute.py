"""The dense linear layers of a model on the CPU, computed by moert's kernels instead of torch's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from moert.errors import MoertError
from moert.hf.adapters import adapter_for
from moert.hf.experts import OffloadedExperts
from moert.kernels.cpu import HALVES, linear

Note = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with one product as moert and as torch computes it."""

_taken: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Linear]]] = weakref.WeakKeyDictionary()
"""Model -> its layers that have been taken over; not in the model, which can be pickled."""


class DenseForward:
    """Stands in an `nn.Linear`'s own `forward`, where Python finds it before the class's.

    The module keeps its class, parameters and hooks. Its weight is read anew at every call, so it may be replaced, cast
    or moved; what moert's kernels are not for is computed as the class does it.
    """

    def __init__(self, module: nn.Linear, note: Note | None = None) -> None:
        # A module that its own attribute holds would outlive its last user, with its weights.
        self._module = weakref.ref(module)
        self._note = note

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name that callers may use
        """[..., K] -> [..., N], as `nn.Linear.forward`."""
        module = self._module()
        if module is None:
            raise MoertError("this is the forward of a linear layer that is gone; keep the layer and call that")
        weight, bias = module.weight, module.bias
        if not _is_for_kernels(input, weight, bias):
            return torch.nn.functional.linear(input, weight, bias)
        output = linear(input, weight, bias)
        if self._note is not None:
            self._note(output, torch.nn.functional.linear(input, weight, bias))
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """For the copy of the module, which is being made; alone, it stays with its module."""
        copied = memo.get(id(self._module()))
        return DenseForward(copied, self._note) if isinstance(copied, nn.Linear) else self

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled module needs no moert to be read: it computes as its class does.
        return getattr, (self._module(), "forward")


def take_over(model: nn.Module, wanted: bool | None, note: Note | None = None) -> int:
    """Have moert's kernels compute the linear layers of `model` outside its experts; undone by `give_back`.

    Taken are modules whose class is exactly `nn.Linear`, with a contiguous 16-bit weight on the CPU, unless somebody
    gave them a forward of their own already.

    Args:
        wanted: False leaves all as they are, None as well unless the whole model is on the CPU.
        note: called for each product with moert's and torch's, which then is computed too.

    Returns:
        How many layers have been taken.
    """
    if wanted is False or (wanted is None and not _is_on_cpu(model)):
        return 0
    taken = []
    for module in _outside_experts(model):
        if type(module) is nn.Linear and "forward" not in vars(module) and _is_weight(module.weight):
            module.forward = DenseForward(module, note)  # type: ignore[method-assign]
            taken.append(weakref.ref(module))
    _taken.setdefault(model, []).extend(taken)
    return len(taken)


def give_back(model: nn.Module) -> None:
    """Leave every layer that `take_over` took, and copies of them that came into the model since, to its class."""
    taken = (reference() for reference in _taken.pop(model, ()))
    for module in (*taken, *model.modules()):
        if module is not None and isinstance(vars(module).get("forward"), DenseForward):
            del module.forward


def count(model: nn.Module) -> int:
    """How many layers in `model` are computed by moert's kernels."""
    return sum(isinstance(vars(module).get("forward"), DenseForward) for module in model.modules())


def _outside_experts(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is in it, depth first, each once or more; nothing in an experts module, offloaded or not."""
    if isinstance(module, OffloadedExperts) or adapter_for(module) is not None:
        return
    yield module
    for child in module.children():
        yield from _outside_experts(child)


def _is_on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _is_weight(weight: torch.Tensor) -> bool:
    return (
        # Subclasses of tensors compute in ways of their own.
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype in HALVES
        and weight.is_cpu
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and weight.dim() == 2
    )


def _is_for_kernels(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this product is one of plain numbers in memory, that nobody differentiates, traces or casts."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and type(x) is torch.Tensor
        and _is_weight(weight)
        and x.dtype is weight.dtype
        and x.is_cpu
        and x.layout is torch.strided
        # Without numbers there is nothing to gain, and shapes that do not fit are for torch to tell.
        and x.numel() > 0
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype is weight.dtype and bias.is_cpu and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and not _is_differentiated(x)
        and not _is_differentiated(weight)
        and (bias is None or not _is_differentiated(bias))
    )


def _is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether autograd needs to see what becomes of it, backwards or forwards, or `torch.func` does."""
    return (
        (tensor.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or forward_ad.unpack_dual(tensor).tangent is not None
    )
