"""Forward passes as recording notes them: copies of what their experts modules were called with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy.typing as npt
import torch

from moert.errors import MoertError
from moert.hf.forwards import Rows


class Step(NamedTuple):
    """One call of an experts module, as it came."""

    layer: int
    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor | None
    version: int | None
    """How often the ids had been written to; None: it is not counted."""


class EvenCalls(NamedTuple):
    """The C calls of a forward pass, all with the same tokens and picks; copies."""

    layers: tuple[int, ...]
    ids: torch.Tensor
    """[C, T, K]"""
    weights: torch.Tensor
    scores: torch.Tensor | None
    """[C, T, E]"""


class Pending(NamedTuple):
    """One forward pass, as tensors."""

    rows: Rows
    shape: tuple[int, int] | None
    token_ids: torch.Tensor | None
    real: torch.Tensor | None
    begins: bool
    """Whether the sequences begin with it."""
    calls: EvenCalls | list[Step]
    """Copies."""

    @property
    def n_tokens(self) -> int:
        return 0 if self.shape is None else self.shape[0] * self.shape[1]

    @property
    def key(self) -> object:
        """What passes of one token have in common that can be put in order together; None: with no other."""
        if self.begins or self.real is not None or self.shape is None or self.shape[1] != 1:
            return None
        if not isinstance(self.calls, EvenCalls) or len(set(self.calls.layers)) < len(self.calls.layers):
            return None
        has_scores = self.calls.scores is not None
        return self.rows, self.calls.layers, self.calls.ids.shape, has_scores, self.token_ids is None


def runs(pending: list[Pending]) -> Iterator[list[Pending]]:
    """Forward passes of one token that are alike, together; all others each for itself."""
    run: list[Pending] = []
    key: object = None
    for one in pending:
        own = one.key
        if run and (own is None or own != key):
            yield run
            run = []
        run.append(one)
        key = own
        if own is None:
            yield run
            run = []
    if run:
        yield run


def copied(steps: list[Step]) -> EvenCalls | list[Step]:
    """Copies of what the model may write to again.

    Raises:
        MoertError: it has done so already.
    """
    for step in steps:
        if step.version is not None and step.version != step.ids._version:
            raise MoertError(
                "the model wrote into a layer's expert ids after its experts had been called with them: it cannot be "
                "recorded"
            )
    if not steps or not len(steps[0].ids):
        steps = [step for step in steps if len(step.ids)]
    if not steps:
        return []
    with torch.no_grad():
        try:
            scores = [step.scores for step in steps if step.scores is not None]
            return EvenCalls(
                tuple([step.layer for step in steps]),
                torch.stack([step.ids for step in steps]),
                torch.stack([step.weights for step in steps]),
                torch.stack(scores) if scores else None,
            )
        except RuntimeError:  # of different shapes, or on different devices
            kept = [step for step in steps if len(step.ids)]
            return [step._replace(ids=step.ids.clone(), weights=step.weights.clone()) for step in kept]


def apart(calls: EvenCalls | list[Step]) -> list[Step]:
    """The calls of a forward pass, one by one."""
    if not isinstance(calls, EvenCalls):
        return calls
    scores = [None] * len(calls.layers) if calls.scores is None else list(calls.scores)
    each = zip(calls.layers, calls.ids, calls.weights, scores, strict=True)
    return [Step(layer, ids, weights, found, None) for layer, ids, weights, found in each]


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Its numbers, floats as fp32, which numpy has; may share memory with `tensor`. Blocks until the device is done."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
