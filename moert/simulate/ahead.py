"""What a predictor says of the tokens to come at each event of a trace, for policies that look ahead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moert.errors import ConfigError
from moert.predict.recorded import model_of
from moert.predictors._ahead import Chances, chances_ahead
from moert.predictors._choice import make_predictor
from moert.predictors.base import MOST_TOKENS, NO_EXPERT, Ints, Need, Predictor
from moert.simulate.events import Reading, TraceSource, open_trace
from moert.trace.sequence import Phase, Sequence


def look_ahead(
    source: TraceSource, reading: Reading, predictor: str, tokens: int, *, anew: bool = False
) -> Iterator[Chances]:
    """For each event of a trace, what a predictor says when the layer has chosen and nothing has moved.

    The events are those of `moert.simulate.events.read_events`. A predictor that is given the future is told of each
    pass as of one token, so that it knows passes of many tokens too; any other is told what it is told live.

    Args:
        predictor: `"joint"`, `"oracle,accept=0.7,accuracy=0.9"`.
        tokens: passes ahead that it is asked for.
        anew: with each sequence begins a predictor that has seen nothing.

    Raises:
        ConfigError: no such predictor, it needs what a trace does not have, it knows no probabilities, or sequences
            that run together, where the order of tokens is unknown.
    """
    if reading.batch != 1 or not reading.atomic:
        raise ConfigError(f"predictor={predictor!r} is told of one sequence at a time; leave out batch and atomic")
    with open_trace(source) as trace:
        model = model_of(trace.header)
        sample = next(iter(trace), None)
        at_hand = {Need.FUTURE} if sample is None or sample.token_ids is None else {Need.FUTURE, Need.TOKEN_IDS}

        def fresh() -> Predictor:
            return make_predictor(predictor, model, at_hand, "in this trace")

        driven = fresh()
        if not driven.gives_probabilities:
            raise ConfigError(f"predictor {predictor!r} gives no probabilities, so eviction cannot weigh them")
        last = -1
        for number, sequence in enumerate(trace):
            if not len(sequence.steps):
                continue
            first = int(sequence.steps.min())
            if first <= last:
                raise ConfigError(
                    f"predictor={predictor!r} is told of one sequence at a time, but sequence {number} begins at step "
                    f"{first} and one before it ended at step {last}"
                )
            last = int(sequence.steps.max())
            if anew and number:
                driven.close()
                driven = fresh()
            yield from _of_sequence(driven, sequence, tokens)
        driven.close()


def _of_sequence(predictor: Predictor, sequence: Sequence, tokens: int) -> Iterator[Chances]:
    order = np.argsort(sequence.steps, kind="stable")
    experts: Ints = sequence.experts[order]
    ids = None if sequence.token_ids is None else sequence.token_ids[order]
    weights = None if sequence.weights is None else sequence.weights[order]
    begins = np.flatnonzero(np.diff(sequence.steps[order], prepend=-1))
    ends = np.append(begins[1:], len(order))
    is_prompt = sequence.phases[order] == Phase.PREFILL
    predictor.begin_sequence()
    if Need.FUTURE in predictor.needs:
        experts, ids, weights = by_pass(experts, begins), None, None
        predictor.foresee(experts)
        begins, ends = np.arange(len(experts)), np.arange(1, len(experts) + 1)
    asks = type(predictor).step is not Predictor.step
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        predictor.begin_pass(end - begin, None if ids is None else ids[begin:end])
        if ids is not None and (known := ids[end : end + MOST_TOKENS][is_prompt[end : end + MOST_TOKENS]]).size:
            predictor.hint(known)
        for layer in range(experts.shape[1]):
            picks = experts[begin:end, layer]
            if not (picks >= 0).any():
                continue
            predictor.observe(layer, picks, None if weights is None else weights[begin:end, layer])
            if asks:
                predictor.step(layer)
            yield chances_ahead(predictor, layer, tokens)


def by_pass(experts: Ints, begins: Ints) -> Ints:
    """[T, L, K] picks of tokens -> [P, L, W] the different experts of each pass, filled up with `NO_EXPERT`."""
    if len(begins) == len(experts):
        return experts
    passes = np.split(experts, begins[1:])
    found = [[np.unique(one[:, layer][one[:, layer] >= 0]) for layer in range(experts.shape[1])] for one in passes]
    width = max((len(ids) for layers in found for ids in layers), default=0)
    filled = np.full((len(found), experts.shape[1], width), NO_EXPERT, np.int32)
    for place, layers in enumerate(found):
        for layer, needed in enumerate(layers):
            filled[place, layer, : len(needed)] = needed
    return filled
