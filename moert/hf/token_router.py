"""By which rule a router picks, found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from moert.hf.routers import RouterForward, with_linear
from moert.kernels.router_rule import RouterRule
from moert.kernels.token_layer import TokenRouter, pick

_RULES = (
    ("softmax", "scores", False),
    ("softmax", "scores", True),
    ("logits", "softmax", False),
    ("logits", "sigmoid", False),
    ("sigmoid", "scores", False),
    ("sigmoid", "scores", True),
)
_EPSILONS = (0.0, 1e-20)
_ROWS = 24

_ULPS = 8
"""Of what weights are rounded to, that may be between two ways to compute exponentials in fp32."""


class FoundRouter(NamedTuple):
    """A router that moert computes for single tokens, and where its class's code puts the picks."""

    router: TokenRouter
    ids: int
    """Which of its outputs."""
    weights: int
    logits: int | None
    """None: they are not one of them."""
    n_outputs: int

    @property
    def is_complete(self) -> bool:
        """Whether there is no output but picks, weights and logits."""
        return self.n_outputs == 2 + (self.logits is not None)

    def outputs(self, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the class's code returns for these, if it `is_complete`."""
        found = {self.ids: ids, self.weights: weights.to(self.router.weights_dtype)}
        if self.logits is not None:
            found[self.logits] = logits
        return tuple(found[place] for place in sorted(found))


def find_router(module: nn.Module) -> FoundRouter | None:
    """The rule of `module`, a router with a `RouterForward`, if there is one.

    The class's code is called on logits of its own weight's dtype, many of them equal. The module is left as it is.
    """
    if type(vars(module).get("forward")) is not RouterForward:
        return None
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _search(module)
    except Exception:  # the class's own code may fail in any way
        return None


def _search(module: Any) -> FoundRouter | None:
    weight = module.weight
    bias = module._parameters.get("bias")
    seen: list[Any] = []
    runs = [(logits, _call(module, logits, seen)) for logits in _logits(weight)]
    # The product is of what comes in, with this weight and bias and no other.
    if any(given is not weight or added is not bias for given, added in seen):
        return None
    outputs = runs[0][1]
    ids = [place for place, output in enumerate(outputs) if _is_picks(output) and output.dtype is torch.int64]
    top_k = outputs[ids[0]].shape[1] if ids else 0
    weights = [
        place
        for place, output in enumerate(outputs)
        if _is_picks(output) and output.is_floating_point() and output.shape[1] == top_k < weight.shape[0]
    ]
    if len(ids) != 1 or len(weights) != 1:
        return None
    dtype = outputs[weights[0]].dtype
    for rule in _rules(module, top_k):
        if all(_agrees(rule, dtype, logits, given[ids[0]], given[weights[0]]) for logits, given in runs):
            token = TokenRouter(weight, bias, rule, dtype)
            return FoundRouter(token, ids[0], weights[0], _place_of_logits(runs), len(outputs))
    return None


def _place_of_logits(runs: list[tuple[torch.Tensor, tuple[Any, ...]]]) -> int | None:
    for place in range(len(runs[0][1])):
        if all(
            isinstance(given[place], torch.Tensor)
            and given[place].dtype is logits.dtype
            and torch.equal(given[place], logits)
            for logits, given in runs
        ):
            return place
    return None


def _rules(module: Any, top_k: int) -> Iterator[RouterRule]:
    numbers = [value for value in vars(module).values() if isinstance(value, float) and value not in (0.0, 1.0)]
    for (scores, weights, normalise), scale in product(_RULES, (1.0, *numbers)):
        for epsilon in _EPSILONS if normalise else (0.0,):
            yield RouterRule(top_k, scores, weights, normalise, epsilon, scale)


def _logits(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    for row in range(_ROWS):
        logits = torch.randn((1, weight.shape[0]), generator=generator, dtype=torch.float32, device="cpu")
        # Every other one so coarse that picks are from among equals.
        yield ((logits * 2).round() / 2 if row % 2 else logits * 3).to(weight.dtype)


def _call(module: Any, logits: torch.Tensor, seen: list[Any]) -> tuple[Any, ...]:
    def give(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append((weight, bias))
        return logits.clone()

    x = torch.zeros((1, module.weight.shape[1]), dtype=module.weight.dtype, device="cpu")
    outputs = with_linear(type(module).forward, give)(module, x)
    if not isinstance(outputs, tuple):
        raise ValueError("picks and weights are two outputs")
    return outputs


def _is_picks(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[0] == 1


def _agrees(
    rule: RouterRule, dtype: torch.dtype, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> bool:
    found_ids, found = pick(rule, logits[0].float(), dtype)
    slack = _ULPS * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype is not torch.float32 else 0)
    wanted = weights[0].float()
    return torch.equal(found_ids, ids[0]) and bool(((found - wanted).abs() <= slack * wanted.abs()).all())
