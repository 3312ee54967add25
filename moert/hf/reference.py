"""Plain transformers to hold a run of moert against, and the routing of either."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.dense_compute import take_over
from moert.hf.layers import fuse
from moert.hf.loading import model_class
from moert.hf.model import is_marked, offloaded_modules
from moert.hf.patching import unpatch
from moert.hf.text import read_settings
from moert.kernels.cpu import linear
from moert.runtime.fused import FusedExperts


def load_plain(path_or_id: str, *, experts_implementation: str | None = None, **hf_kwargs: Any) -> Any:
    """The model as transformers alone loads it, whole in memory, in evaluation mode; a pack's weights decoded. Blocks.

    Args:
        experts_implementation: "eager" is the model's own code; None is what transformers picks by itself.
        **hf_kwargs: dtype, revision and so on, as for `from_pretrained`.
    """
    if experts_implementation is not None:
        hf_kwargs["experts_implementation"] = experts_implementation
    settings = read_settings(path_or_id, hf_kwargs.get("revision"))
    model = model_class(settings).from_pretrained(path_or_id, **hf_kwargs).eval()
    if is_marked(model):  # a pack
        unpatch(model)
        model.set_experts_implementation(experts_implementation or "eager")
    return model


@dataclass
class Products:
    """How far what moert's kernels compute with 16-bit weights is from torch's, over the products of a run."""

    compared: int = 0
    largest_error_ulps: float = 0.0
    """The largest difference within one product, in units in the last place of the largest number in it; for a norm
    that rounds twice, half of that."""

    def note(self, found: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
        """One product or norm, or one expert's output, as moert and as torch computes it, and how often it rounds."""
        self.compared += 1
        error = float((found.float() - expected.float()).abs().max())
        unit = float(expected.float().abs().max()) * torch.finfo(expected.dtype).eps * roundings
        ulps = error / unit if unit else error
        # A NaN stays, and fails every comparison.
        if not (math.isnan(self.largest_error_ulps) or ulps <= self.largest_error_ulps):
            self.largest_error_ulps = ulps


def round_as_moert(model: nn.Module, *, dense_kernels: bool | None = None) -> Products | None:
    """Have a plain model's experts run one at a time, and round where moert does.

    In bf16 and fp16 the order of a sum and the places where it is rounded change the last bits, those change a routing
    that was nearly a tie, and from there on two runs have little in common: transformers' own eager and grouped experts
    differ like that. So here the outputs of the experts are added in fp32, and what moert's kernels compute is computed
    by them: whole experts, or the products of experts with a gate of their own, and the dense layers, norms
    and routers among them. Each is computed by the model's own code on torch's products as well, whole experts in fp32,
    and compared. All else stays transformers' own.

    Args:
        dense_kernels: as the run that it is held against was configured.

    Returns:
        What the products' comparison finds as the model runs; None where it was not done: for experts classes that are
        called in a way of their own. The dense layers are moert's even then.
    """
    products = Products()
    take_over(model, dense_kernels, products.note)
    adapters = list(find_experts(model).values())
    if any(type(adapter).flatten is not ExpertsAdapter.flatten or adapter.num_identity for adapter in adapters):
        return None
    for adapter in adapters:
        eager = adapter.module.forward
        fused, _ = fuse(adapter, adapter.specs)
        adapter.module.forward = _one_at_a_time(
            _by_products(eager, products) if fused is None else _whole(eager, adapter, fused, products)
        )
    return products


class _MoertProducts(TorchFunctionMode):
    """While active, `F.linear` is moert's."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        expected = function(*args, **(kwargs or {}))
        if function is not torch.nn.functional.linear:
            return expected
        found = linear(*args, **(kwargs or {}))
        self._products.note(found, expected)
        return found


class _InFp32(TorchFunctionMode):
    """While active, products with weights of `dtype` are computed in fp32, of left operands rounded to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__"):
            x, *rest = args
            args = (x.to(self._dtype).float(), *(None if tensor is None else tensor.float() for tensor in rest))
        return function(*args, **(kwargs or {}))


Eager = Callable[..., torch.Tensor]
"""The forward of an experts module: hidden states, ids, weights -> hidden states."""

OneExpert = Callable[[int, torch.Tensor], torch.Tensor]
"""(expert, its rows [n, D]) -> what it gives [n, D], not weighted."""


def _by_products(eager: Eager, products: Products) -> OneExpert:
    """The module's own code, whose products are moert's."""

    def run(expert: int, rows: torch.Tensor) -> torch.Tensor:
        with _MoertProducts(products):
            return eager(rows, *_only(expert, rows))

    return run


def _whole(eager: Eager, adapter: ExpertsAdapter, fused: FusedExperts, products: Products) -> OneExpert:
    """moert's kernels for whole experts, held against the module's own code, that in fp32."""
    views = {name: adapter.expert_views(name) for name in adapter.names}

    def run(expert: int, rows: torch.Tensor) -> torch.Tensor:
        weights = fused.expert({name: experts[expert] for name, experts in views.items()})
        found = torch.zeros(rows.shape)
        fused.ffn.run(rows.contiguous(), [weights], [None], [None], found)
        with _InFp32(rows.dtype):
            expected = eager(rows.float(), *_only(expert, rows))
        products.note(found.to(rows.dtype), expected.to(rows.dtype))
        return found

    return run


def _only(expert: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights that send all rows to one expert."""
    return torch.full((len(rows), 1), expert), torch.ones(len(rows), 1, dtype=rows.dtype)


def _one_at_a_time(one_expert: OneExpert) -> Eager:
    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            picked = (top_k_index == expert) & (top_k_weights != 0)
            rows = picked.any(-1).nonzero().squeeze(1)
            if len(rows):
                weights = (top_k_weights * picked)[rows].float().sum(-1, keepdim=True)
                total.index_add_(0, rows, one_expert(expert, hidden_states[rows]).float() * weights)
        return total.to(hidden_states.dtype)

    return forward


class RoutingRecorder:
    """While entered, notes which experts every MoE layer of a model is asked for, plain or offloaded."""

    def __init__(self, model: nn.Module) -> None:
        offloaded = offloaded_modules(model)
        self._modules: dict[str, nn.Module] = dict(offloaded) or {
            path: adapter.module for path, adapter in find_experts(model).items()
        }
        self._hooks: list[Any] = []
        self.picks: dict[str, list[torch.Tensor]] = {path: [] for path in self._modules}
        """Experts module -> for each forward, the ids [T, K], ascending within a token."""

    def __enter__(self) -> RoutingRecorder:
        for path, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._note(path), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self.picks[path].append(ids.detach().to("cpu").sort(dim=-1).values)

        return note
