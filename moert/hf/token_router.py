"""By which rule a router picks, found by trying."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from moert.hf.norms import settings_of
from moert.hf.routers import RouterForward, with_linear
from moert.hf.stand_ins import same
from moert.kernels.cpu import NUMBERS
from moert.kernels.moe_block import TokenRouter, pick
from moert.kernels.router_rule import RouterRule

_SCORES = ("softmax", "logits", "sigmoid")
_WEIGHTS = {
    "softmax": (("scores", False), ("scores", True)),
    "logits": (("softmax", False), ("sigmoid", False), ("sigmoid", True)),
    "sigmoid": (("scores", False), ("scores", True)),
}
"""What is compared -> what the picks weigh, and whether that is divided by its sum."""

_EPSILONS = (0.0, 1e-20)
_ROWS = 24

_CORRECTIONS = ((1.0, 0.0), (0.1, 0.0), (1.0, -4.0), (0.0, 0.0))
"""Sizes and shifts: far below zero what is left out shows, and without any, what is equal."""

_ULPS = 8
"""Of what weights are rounded to, that may be between two ways to compute exponentials in fp32."""

_MOST_APART = 1


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

    def outputs(
        self, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """What the class's code returns for these; None for what is none of them."""
        found: list[torch.Tensor | None] = [None] * self.n_outputs
        found[self.ids], found[self.weights] = ids, weights.to(self.router.weights_dtype)
        if self.logits is not None:
            found[self.logits] = logits
        return tuple(found)


class _Run(NamedTuple):
    logits: torch.Tensor
    corrections: list[torch.Tensor]
    outputs: tuple[Any, ...]


def find_router(module: nn.Module, dtype: torch.dtype, extras: Sequence[torch.Tensor] = ()) -> FoundRouter | None:
    """The rule of `module`, a router with a `RouterForward`, if there is one.

    The class's code is called on logits of its own product's dtype, many of them equal, and with other numbers for what
    may correct them. The module is left as it is.

    Args:
        dtype: of the tokens, whatever that of its weight.
        extras: what it is given beside them.
    """
    if type(vars(module).get("forward")) is not RouterForward:
        return None
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _Search(module, dtype, extras).run()
    except Exception:  # the class's own code may fail in any way
        return None


class _Search:
    def __init__(self, module: Any, dtype: torch.dtype, extras: Sequence[torch.Tensor]) -> None:
        self._dtype = dtype
        self._module, self._weight, self._bias = module, module.weight, module._parameters.get("bias")
        self._experts = self._weight.shape[0]
        own = [(module._parameters, name) for name in module._parameters if name not in ("weight", "bias")]
        own += [(module._buffers, name) for name in module._buffers]
        self._own = [(of, name) for of, name in own if self._is_correction(of[name])]
        self._extras = extras
        if not all(map(self._is_correction, extras)):
            raise ValueError("what a router is given beside tokens corrects its scores")
        self._corrections = [*(of[name] for of, name in self._own), *extras]
        self._dtypes: set[torch.dtype] = set()
        self._forward = with_linear(type(module).forward, self._give)
        self._asked: tuple[torch.Tensor, torch.Tensor]
        self._given: list[torch.Tensor] = []

    def _is_correction(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.shape == (self._experts,)
            and tensor.dtype in NUMBERS
            and tensor.is_cpu
            and tensor.is_contiguous()
        )

    def run(self) -> FoundRouter | None:
        runs = list(self._runs())
        outputs = runs[0].outputs
        ids = [place for place, output in enumerate(outputs) if _is_picks(output) and output.dtype is torch.int64]
        top_k = outputs[ids[0]].shape[1] if ids else 0
        weights = [
            place
            for place, output in enumerate(outputs)
            if _is_picks(output) and output.is_floating_point() and output.shape[1] == top_k < self._experts
        ]
        if len(ids) != 1 or len(weights) != 1 or len(self._dtypes) != 1:
            return None
        dtype = outputs[weights[0]].dtype
        for router, correction in self._routers(top_k, dtype):
            if not all(_picks_alike(router, correction, run, ids[0]) for run in runs):
                continue
            for rule in self._rules(router.rule):
                known = router._replace(rule=rule)
                if _weigh_alike(known, correction, runs, weights[0]):
                    if correction is not None:
                        known = known._replace(correction=self._corrections[correction])
                    return FoundRouter(known, ids[0], weights[0], _place_of_logits(runs), len(outputs))
        return None

    def _routers(self, top_k: int, dtype: torch.dtype) -> Iterator[tuple[TokenRouter, int | None]]:
        """What may decide the picks, and which correction; the rules' weights are of no meaning."""
        (logits_dtype,) = self._dtypes
        corrections = [None, *range(len(self._corrections))]
        all_steps = dict.fromkeys((torch.float32, logits_dtype))
        for steps, scores, correction, grouping, is_sorted in product(
            all_steps, _SCORES, corrections, self._groupings(top_k), (True, False)
        ):
            groups, kept, score, left_out = grouping
            rule = RouterRule(top_k, scores, groups=groups, kept_groups=kept, group_score=score)
            router = TokenRouter(self._weight, self._bias, rule, dtype, logits_dtype, None, left_out, steps, is_sorted)
            yield router, correction

    def _groupings(self, top_k: int) -> Iterator[tuple[int, int, str, float]]:
        yield 1, 1, "max", -math.inf
        numbers = {value for value in settings_of(self._module).values() if type(value) is int}
        for groups, kept in product(sorted(numbers), sorted(numbers)):
            if groups <= kept or kept < 1 or self._experts % groups or top_k > self._experts // groups * kept:
                continue
            for score, left_out in product(("top2", "max"), (-math.inf, 0.0)):
                yield groups, kept, score, left_out

    def _rules(self, rule: RouterRule) -> Iterator[RouterRule]:
        numbers = [float(v) for v in settings_of(self._module).values() if type(v) in (int, float) and v > 0]
        scales = dict.fromkeys((1.0, *numbers))
        epsilons = dict.fromkeys((*_EPSILONS, *(number for number in numbers if number < 1e-3)))
        for (weights, normalise), scale in product(_WEIGHTS[rule.scores], scales):
            for epsilon in epsilons if normalise else (0.0,):
                yield RouterRule(
                    rule.top_k,
                    rule.scores,
                    weights,
                    normalise,
                    epsilon,
                    scale,
                    rule.groups,
                    rule.kept_groups,
                    rule.group_score,
                )

    def _runs(self) -> Iterator[_Run]:
        generator = torch.Generator("cpu").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        for row in range(_ROWS):
            logits = normal(1, self._experts)
            # Every other one so coarse that picks are from among equals.
            logits = (logits * 2).round() / 2 if row % 2 else logits * 3
            size, shift = _CORRECTIONS[row % len(_CORRECTIONS)]
            corrections = [(normal(self._experts) * size + shift).to(like.dtype) for like in self._corrections]
            yield self._call(logits, corrections, normal(1, self._weight.shape[1]))

    def _call(self, logits: torch.Tensor, corrections: list[torch.Tensor], x: torch.Tensor) -> _Run:
        x = x.to(self._dtype)
        self._asked, self._given = (logits, x), []
        stand_in = copy.copy(self._module)
        stand_in.training = False
        attributes = vars(stand_in)
        for kind in ("_parameters", "_buffers"):
            attributes[kind] = dict(attributes[kind])
        for (of, name), correction in zip(self._own, corrections, strict=False):
            kind = "_parameters" if of is self._module._parameters else "_buffers"
            attributes[kind][name] = correction
        outputs = self._forward(stand_in, x, *corrections[len(self._own) :])
        if not isinstance(outputs, tuple) or len(self._given) != 1:
            raise ValueError("picks and weights are two outputs, of one product")
        self._dtypes.add(self._given[0].dtype)
        return _Run(self._given[0], corrections, outputs)

    def _give(self, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The logits in place of the product of what comes in, with this weight and bias, as they are or in fp32."""
        logits, x = self._asked
        if not (
            _is_or_casts(weight, self._weight)
            and (bias is self._bias if self._bias is None else _is_or_casts(bias, self._bias))
            and (bias is None or bias.dtype is weight.dtype)
            and same(tokens, x.to(weight.dtype))
        ):
            raise ValueError("this is another product")
        self._given.append(logits.to(weight.dtype))
        return self._given[-1].clone()


def _is_or_casts(tensor: Any, own: torch.Tensor) -> bool:
    return tensor is own or (isinstance(tensor, torch.Tensor) and same(tensor, own.float()))


def _place_of_logits(runs: list[_Run]) -> int | None:
    for place in range(len(runs[0].outputs)):
        if all(same(run.outputs[place], run.logits) for run in runs):
            return place
    return None


def _is_picks(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[0] == 1


def _pick(router: TokenRouter, correction: int | None, run: _Run) -> tuple[torch.Tensor, torch.Tensor]:
    if correction is not None:
        router = router._replace(correction=run.corrections[correction])
    return pick(router, run.logits[0].float())


def _picks_alike(router: TokenRouter, correction: int | None, run: _Run, place: int) -> bool:
    return torch.equal(_pick(router, correction, run)[0], run.outputs[place][0])


def _weigh_alike(router: TokenRouter, correction: int | None, runs: list[_Run], place: int) -> bool:
    dtype = router.weights_dtype
    found = torch.cat([_pick(router, correction, run)[1] for run in runs])
    wanted = torch.cat([run.outputs[place][0].float() for run in runs])
    if dtype is torch.float32:
        return bool(((found - wanted).abs() <= _ULPS * torch.finfo(dtype).eps * wanted.abs()).all())
    # Rounded, they are the same but for the few that are nearly between two numbers.
    apart = (found - wanted).abs()
    return bool((apart <= torch.finfo(dtype).eps * wanted.abs()).all()) and int(apart.count_nonzero()) <= _MOST_APART
