"""A router's probabilities for all experts, found by what its layer was then called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

Scores = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = 0.02
"""Of a pick's share of its token's weights, against that computed from the router's output: bf16 holds 0.4 %."""


def _softmax(values: torch.Tensor) -> torch.Tensor:
    return torch.softmax(values, dim=-1)


def _sigmoid(values: torch.Tensor) -> torch.Tensor:
    return _share(torch.sigmoid(values))


def _sqrt_softplus(values: torch.Tensor) -> torch.Tensor:
    return _share(torch.nn.functional.softplus(values).sqrt())


def _share(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _as_it_is(values: torch.Tensor) -> torch.Tensor:
    """Probabilities already; where logits stand, some are negative, or more of them are lost than rounding explains."""
    return _share(values) if bool((values >= 0).all()) else torch.zeros_like(values)


SCORINGS: tuple[Scores, ...] = (_softmax, _sigmoid, _as_it_is, _sqrt_softplus)
"""What routers make of logits; which one it is shows in the weights that the experts are called with."""


class _Seen(NamedTuple):
    module: nn.Module
    place: int
    """Which of the module's outputs."""
    values: torch.Tensor


class _Source(NamedTuple):
    place: int
    scoring: Scores
    latest: list[torch.Tensor]


class ScoreTap:
    """The scores of one experts module, taken from its router, whatever module that is.

    At first all modules beside the experts are watched. Once one of them has put out a number for each token and expert
    from which the experts' own weights follow, it is the router, and the only one still watched.
    """

    def __init__(self, model: nn.Module, path: str, num_outputs: int) -> None:
        """`num_outputs` is how many experts the router knows, those without weights included."""
        self._num_outputs = num_outputs
        self._handles = []
        self._seen: list[_Seen] = []
        self._source: _Source | None = None
        self.failed = False
        """Whether a step came whose scores could not be found."""
        experts = model.get_submodule(path)
        inner = set(experts.modules())
        # The block, and in families whose router stands beside the block, what holds that.
        parts = path.split(".")
        for depth in (1, 2):
            if len(parts) < depth:
                continue
            holder = model.get_submodule(".".join(parts[:-depth]))
            if isinstance(holder, nn.ModuleList):
                break
            for module in holder.modules():
                if module not in inner and module is not holder:
                    inner.add(module)
                    self._handles.append(module.register_forward_hook(self._watch))

    def _watch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._source is not None:
            place = self._source.place
            self._source.latest[:] = [output[place] if isinstance(output, (tuple, list)) else output]
            return
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        for place, values in enumerate(outputs):
            if (
                isinstance(values, torch.Tensor)
                and values.is_floating_point()
                and values.dim() >= 2
                and values.shape[-1] == self._num_outputs
            ):
                self._seen.append(_Seen(module, place, values))

    _watch.only_looks = True  # type: ignore[attr-defined]  # see `MoeBlock.tell`

    def take(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """The scores [T, E] in fp32, summing to 1, for the step that begins with `ids` and `weights` [T, K]; None if
        they cannot be found, which `failed` then says too."""
        if ids.shape[0] == 0:
            self._seen.clear()
            return None
        if self._source is None and not self._find(ids, weights):
            self.failed = True
            return None
        assert self._source is not None
        values = self._source.latest.pop() if self._source.latest else None
        if values is None or values.numel() != ids.shape[0] * self._num_outputs:
            self.failed = True
            return None
        return self._source.scoring(values.detach().float().reshape(-1, self._num_outputs))

    def _find(self, ids: torch.Tensor, weights: torch.Tensor) -> bool:
        tokens, best, found = ids.shape[0], TOLERANCE, None
        for seen in self._seen:
            if seen.values.numel() != tokens * self._num_outputs:
                continue
            flat = seen.values.detach().float().reshape(tokens, self._num_outputs)
            for scoring in SCORINGS:
                error = _error(scoring(flat), ids, weights)
                if error < best:
                    best, found = error, (seen, scoring)
        self._seen.clear()
        if found is None:
            return False
        seen, scoring = found
        self.remove()
        self._source = _Source(seen.place, scoring, [seen.values])
        self._handles = [seen.module.register_forward_hook(self._watch)]
        return True

    def remove(self) -> None:
        """Watch nothing any more. Idempotent."""
        while self._handles:
            self._handles.pop().remove()


def _error(scores: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """How far the picks' weights are from being to one another as their scores are, or where there is one pick only,
    from being its score."""
    weights = weights.detach().float()
    picked = ids.ge(0) & ids.lt(scores.shape[1]) & weights.ne(0)
    chosen = scores.gather(1, ids.clamp(0, scores.shape[1] - 1).long()) * picked
    weights = weights * picked
    if ids.shape[1] > 1:
        chosen, weights = _share(chosen), _share(weights)
    return float((chosen - weights).abs().max()) if bool(picked.any()) else math.inf
