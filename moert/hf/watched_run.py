"""What a model's layers were given and chose while it continued some prompts: what predictors are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moert.errors import MoertError
from moert.hf.model import offloaded_modules, runtime_of
from moert.hf.recording import record
from moert.hf.router_weights import block_of, find_routers, predicted_model
from moert.predict.recorded import Recorded, Recording
from moert.predictors.base import Need


class _Seen:
    """Copies of the tensors that the layers are given, pass by pass."""

    def __init__(self) -> None:
        self.hidden: dict[int, list[torch.Tensor]] = {}
        self.residual: dict[int, list[torch.Tensor]] = {}

    def note(self, into: dict[int, list[torch.Tensor]], layer: int, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            into.setdefault(layer, []).append(tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", copy=True))

    def take(self, into: dict[int, list[torch.Tensor]], layers: int) -> list[torch.Tensor | None]:
        """Of each layer [T, D] of all passes since the last time."""
        found = [torch.cat(into[layer]) if layer in into else None for layer in range(layers)]
        into.clear()
        return found


def watched_run(model: nn.Module, name: str, runs: Iterable[Callable[[], object]]) -> Recording:
    """Run `model`, which moert offloads, and keep all that predictors can be told, hidden states too. Blocks.

    That is 2 T D numbers for each layer: a run of a few hundred tokens, not more.

    Args:
        model: one sequence at a time goes through it.
        name: of the recording.
        runs: each makes one sequence.

    Raises:
        MoertError: a run ended with no sequence, or with several.
    """
    runtime = runtime_of(model)
    seen, kept = _Seen(), []
    layers = len(runtime.layers)
    with record(model, None, scores=False, weights=True) as (trace, _), _hooks(model, seen):
        for run in runs:
            run()
            kept.append((seen.take(seen.hidden, layers), seen.take(seen.residual, layers)))
    if len(trace) != len(kept):
        raise MoertError(f"{len(kept)} runs of the model made {len(trace)} sequences; run one text at a time")
    recorded = [
        Recorded(sequence, _fitting(hidden, len(sequence.steps)), _fitting(residual, len(sequence.steps)))
        for sequence, (hidden, residual) in zip(trace, kept, strict=True)
    ]
    specs = [layer.spec for layer in runtime.layers]
    routers = find_routers(model, specs)
    at_hand = {Need.FUTURE, Need.HIDDEN}
    if any(router is not None for router in routers):
        at_hand.add(Need.ROUTERS)
    if all(one.sequence.token_ids is not None for one in recorded):
        at_hand.add(Need.TOKEN_IDS)
    return Recording(name, predicted_model(model, specs, routers), recorded, frozenset(at_hand))


def _fitting(tensors: list[torch.Tensor | None], tokens: int) -> list[torch.Tensor | None]:
    """Without those of other tokens than the sequence's."""
    return [tensor if tensor is not None and len(tensor) == tokens else None for tensor in tensors]


@contextmanager
def _hooks(model: nn.Module, seen: _Seen) -> Iterator[None]:
    handles = []
    try:
        for path, module in offloaded_modules(model).items():
            layer, block = module.layer, block_of(model, path)
            handles.append(module.register_forward_pre_hook(_hook(seen, seen.hidden, layer), with_kwargs=True))
            if block is not None:
                handles.append(block.register_forward_pre_hook(_hook(seen, seen.residual, layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(seen: _Seen, into: dict[int, list[torch.Tensor]], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.note(into, layer, args[0] if args else kwargs.get("hidden_states"))

    return hook
