"""Recorded sequences, told to a predictor as a live run would tell it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

from moert.predict.recorded import Recorded
from moert.predictors.base import Need, Predictor
from moert.trace import Phase


class Listener(Protocol):
    """Asks the predictor questions between what it is told."""

    def begin_token(self, predictor: Predictor, token: int) -> None:
        """Pass `token` of the sequence has begun."""
        ...

    def entered(self, predictor: Predictor, token: int, layer: int) -> None:
        """The predictor has been told what the block of `layer` is given."""
        ...

    def observed(self, predictor: Predictor, token: int, layer: int, took_ns: int) -> None:
        """The predictor has been told what `layer` chose, which took it so long."""
        ...

    def end_token(self, predictor: Predictor, token: int) -> None:
        """All layers have been told of."""
        ...


def replay(
    predictor: Predictor,
    recorded: Recorded,
    listener: Listener | None = None,
    *,
    by_steps: bool = False,
    advance: Callable[[], None] | None = None,
) -> None:
    """Tell `predictor` of one sequence, as of a new one. Blocks; what the predictor raises goes through.

    Padding is left out.

    Args:
        predictor: learns from it.
        recorded: the sequence.
        listener: is called in between.
        by_steps: tokens that ran in one forward pass are told of in one; otherwise each is a pass of its own, which is
            as good for causal models, and lets prompts be predicted token by token.
        advance: called after each pass.
    """
    sequence = recorded.sequence
    real = np.flatnonzero(sequence.phases != Phase.PADDING)
    whole = len(real) == len(sequence.phases)
    experts = sequence.experts if whole else sequence.experts[real]
    weights = sequence.weights if whole or sequence.weights is None else sequence.weights[real]
    ids = sequence.token_ids if whole or sequence.token_ids is None else sequence.token_ids[real]
    hidden, residual = (_picked(tensors, real, whole) for tensors in (recorded.hidden, recorded.residual))
    steps = sequence.steps[real]
    enters = residual is not None and type(predictor).enter is not Predictor.enter
    asks_hidden = type(predictor).step is not Predictor.step
    predictor.begin_sequence()
    if Need.FUTURE in predictor.needs:
        predictor.foresee(experts)
    ends = np.flatnonzero(np.diff(steps)) + 1 if by_steps else np.arange(1, len(steps))
    begin = 0
    for number, end in enumerate([*ends.tolist(), len(steps)] if len(steps) else []):
        predictor.begin_pass(end - begin, None if ids is None else ids[begin:end])
        if listener is not None:
            listener.begin_token(predictor, number)
        for layer in range(experts.shape[1]):
            if enters and residual is not None and residual[layer] is not None:
                predictor.enter(layer, residual[layer][begin:end])
                if listener is not None:
                    listener.entered(predictor, number, layer)
            picks = experts[begin:end, layer]
            if picks[0, 0] < 0:
                continue
            began = perf_counter_ns()
            predictor.observe(layer, picks, None if weights is None else weights[begin:end, layer])
            if asks_hidden:
                given = None if hidden is None or hidden[layer] is None else hidden[layer][begin:end]
                predictor.step(layer, given)
            took_ns = perf_counter_ns() - began
            if listener is not None:
                listener.observed(predictor, number, layer, took_ns)
        if listener is not None:
            listener.end_token(predictor, number)
        if advance is not None:
            advance()
        begin = end


def _picked(tensors: Any, real: Any, whole: bool) -> Any:
    if tensors is None or whole:
        return tensors
    return [None if tensor is None else tensor[real] for tensor in tensors]
