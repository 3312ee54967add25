"""The dense layers of a model on the CPU, computed by moert's kernels instead of torch's."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moert.hf.adapters import adapter_for
from moert.hf.attention import attention_forward
from moert.hf.base_model import base_model_forward
from moert.hf.block_forward import block_forward
from moert.hf.decoder_layer import chain_layers, decoder_layer_forward
from moert.hf.experts import OffloadedExperts
from moert.hf.growing_cache import grow
from moert.hf.norms import norm_forward
from moert.hf.own_forward import Note, OwnForward, is_differentiated, is_recorded
from moert.hf.routers import Linear, router_forward
from moert.hf.self_attention import self_attention_forward
from moert.kernels.cpu import HALVES, linear, product

_taken: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
"""Model -> its layers that have been taken over; not in the model, which can be pickled."""

_hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
"""Model -> the hook that has its caches grow in place."""


class DenseForward(OwnForward):
    """Stands in an `nn.Linear`'s own `forward`.

    The weight is read anew at every call, so it may be replaced, cast or moved; what moert's kernels are not for is
    computed as the class does it.
    """

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name that callers may use
        """[..., K] -> [..., N], as `nn.Linear.forward`."""
        module: Any = self.module()
        return _product(input, module.weight, module.bias, self._note)


def _product(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    note: Note | None = None,
) -> torch.Tensor:
    """As `torch.nn.functional.linear`."""
    if not _is_for_kernels(input, weight, bias):
        return torch.nn.functional.linear(input, weight, bias)
    output = linear(input, weight, bias)
    if note is not None:
        note(output, torch.nn.functional.linear(input, weight, bias))
    return output


def _router_product(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    note: Note | None = None,
    is_fine: bool = False,
) -> torch.Tensor:
    """As `torch.nn.functional.linear`; in fp32, too, if the router `is_fine` or casts its weight: nobody notes that."""
    if weight.dtype is not torch.float32 or (isinstance(weight, nn.Parameter) and not is_fine):
        return _product(input, weight, bias, note)
    if not _is_for_kernels(input, weight, bias, dtypes=(torch.float32,)) or not _is_vector(bias):
        return torch.nn.functional.linear(input, weight, bias)
    return product(input, weight, bias)


def take_over(model: nn.Module, wanted: bool | None, note: Note | None = None) -> int:
    """Have moert's kernels compute the dense layers of `model`, those outside its experts; undone by `give_back`.

    Taken are, on the CPU in 16 bits, modules whose class is exactly `nn.Linear`, norms, routers with a weight of their
    own, and attentions for their rotary embedding and for single tokens, unless somebody gave them a forward of their
    own already. Those whose numbers begin at odd addresses, where no kernel reads them, are left, with a warning. The
    caches of keys and values that the model is called with grow in place.

    Args:
        wanted: False leaves all as they are, None as well unless the whole model is on the CPU.
        note: called for each product and norm with moert's and torch's, which then is computed too.

    Returns:
        How many layers have been taken.
    """
    if wanted is False or (wanted is None and not _is_on_cpu(model)):
        return 0
    taken: list[weakref.ref[nn.Module]] = []
    embeddings: dict[Any, bool | None] = {}
    is_half = _has_halves(model)
    _warn_of_odd_places(model)
    for module in _readable(model):
        forward = None if "forward" in vars(module) else _forward_for(module, embeddings, note, is_half)
        if forward is not None:
            module.forward = forward  # type: ignore[assignment]
            taken.append(weakref.ref(module))
    if note is None:
        for forward_for in (self_attention_forward, block_forward, decoder_layer_forward):
            for module in _readable(model):
                forward = forward_for(module)
                if forward is not None:
                    module.forward = forward
                    taken.append(weakref.ref(module))
        for module in _readable(model):
            chain_layers(module)
        for module in _readable(model):
            whole = base_model_forward(module)
            if whole is not None:
                module.forward = whole
                taken.append(weakref.ref(module))
    _taken.setdefault(model, []).extend(taken)
    if isinstance(model, PreTrainedModel) and model not in _hooks:
        _hooks[model] = grow(model)
    return len(taken)


def give_back(model: nn.Module) -> None:
    """Leave every layer that `take_over` took, and copies of them that came into the model since, to its class."""
    if model in _hooks:
        _hooks.pop(model).remove()
    taken = (reference() for reference in _taken.pop(model, ()))
    for module in (*taken, *model.modules()):
        own = None if module is None else vars(module).get("forward")
        if module is not None and isinstance(own, OwnForward):
            del module.forward
            if own.before is not None:
                module.forward = own.before


def count(model: nn.Module, kind: type[OwnForward] = DenseForward) -> int:
    """How many layers in `model` are computed by moert's kernels; linear ones unless asked for another kind."""
    return sum(isinstance(vars(module).get("forward"), kind) for module in model.modules())


def _forward_for(
    module: nn.Module, embeddings: dict[Any, bool | None], note: Note | None, is_half: bool
) -> OwnForward | None:
    """`is_half`: it is of a model of 16 bits, in which routers may be finer."""
    if type(module) is nn.Linear:
        return DenseForward(module, note) if _is_weight(module.weight) else None
    is_fine = is_half and getattr(module._parameters.get("weight"), "dtype", None) is torch.float32
    return (
        norm_forward(module, note)
        or router_forward(module, _linear(note, is_fine), (torch.float32,) if is_fine else HALVES)
        or (attention_forward(module, embeddings) if _has_halves(module) else None)
    )


def _has_halves(module: nn.Module) -> bool:
    return any(parameter.dtype in HALVES and parameter.is_cpu for parameter in module.parameters())


def _linear(note: Note | None, is_fine: bool) -> Linear:
    return functools.partial(_router_product, note=note, is_fine=is_fine)


def _outside_experts(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is in it, depth first, each once or more; nothing in an experts module, offloaded or not."""
    if isinstance(module, OffloadedExperts) or adapter_for(module) is not None:
        return
    yield module
    for child in module.children():
        yield from _outside_experts(child)


def _readable(model: nn.Module) -> Iterator[nn.Module]:
    """Those `_outside_experts` in which all numbers lie where kernels can read them."""
    return (module for module in _outside_experts(model) if not any(map(_is_misplaced, _numbers_of(module))))


def _numbers_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_misplaced(tensor: torch.Tensor) -> bool:
    """A safetensors file may have its numbers anywhere, and its reader hands out the file's own memory."""
    return (
        type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.data_ptr() % tensor.element_size() != 0
    )


def _warn_of_odd_places(model: nn.Module) -> None:
    misplaced = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and any(map(_is_misplaced, _numbers_of(module)))
    ]
    if misplaced:
        warnings.warn(
            f"{len(misplaced)} linear layers stay torch's, which is slower: their weights begin at odd addresses, as "
            f"the header of their safetensors file has an odd length ({misplaced[0]} is one); load the checkpoint "
            "with moert.load, or save it anew",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _is_vector(bias: torch.Tensor | None) -> bool:
    return bias is None or bias.is_contiguous()


def _is_weight(weight: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALVES) -> bool:
    return (
        # Subclasses of tensors compute in ways of their own.
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype in dtypes
        and weight.is_cpu
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and weight.dim() == 2
    )


def _is_for_kernels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = HALVES
) -> bool:
    """Whether this product is one of plain numbers in memory, that nobody differentiates, traces or casts."""
    return (
        not is_recorded()
        and type(x) is torch.Tensor
        and _is_weight(weight, dtypes)
        and x.dtype is weight.dtype
        and x.is_cpu
        and x.layout is torch.strided
        # Without numbers there is nothing to gain, and shapes that do not fit are for torch to tell.
        and x.numel() > 0
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype is weight.dtype and bias.is_cpu and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and not is_differentiated(x)
        and not is_differentiated(weight)
        and (bias is None or not is_differentiated(bias))
    )
