"""Plain transformers to hold a run of moert against, and the routing of either."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.loading import model_class
from moert.hf.model import offloaded_modules
from moert.hf.text import read_settings


def load_plain(path_or_id: str, *, experts_implementation: str | None = None, **hf_kwargs: Any) -> Any:
    """The model as transformers alone loads it, whole in memory, in evaluation mode. Blocks.

    Args:
        experts_implementation: "eager" is the model's own code; None is what transformers picks by itself.
        **hf_kwargs: dtype, revision and so on, as for `from_pretrained`.
    """
    if experts_implementation is not None:
        hf_kwargs["experts_implementation"] = experts_implementation
    settings = read_settings(path_or_id, hf_kwargs.get("revision"))
    return model_class(settings).from_pretrained(path_or_id, **hf_kwargs).eval()


def sum_in_fp32(model: nn.Module) -> bool:
    """Have a plain model's experts run one at a time by their own eager code, their outputs added in fp32.

    transformers' eager loop adds them in the model's dtype and its grouped kernel rounds each weighted output to it,
    so in bf16 and fp16 the two differ from each other; this takes those roundings out and leaves the rest as it is.

    Returns:
        Whether it was done: not for experts classes that are called in a way of their own.
    """
    adapters = list(find_experts(model).values())
    if any(type(adapter).flatten is not ExpertsAdapter.flatten or adapter.num_identity for adapter in adapters):
        return False
    for adapter in adapters:
        adapter.module.forward = _one_at_a_time(adapter.module.forward)
    return True


def _one_at_a_time(eager: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            picked = (top_k_index == expert) & (top_k_weights != 0)
            rows = picked.any(-1).nonzero().squeeze(1)
            if len(rows):
                weights = (top_k_weights * picked)[rows].float().sum(-1, keepdim=True)
                ids = torch.full((len(rows), 1), expert, dtype=top_k_index.dtype)
                output = eager(hidden_states[rows], ids, torch.ones_like(ids, dtype=top_k_weights.dtype))
                total.index_add_(0, rows, output.float() * weights)
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
