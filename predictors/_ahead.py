"""What a predictor says of the tokens to come, as policies that look ahead take it."""

from __future__ import annotations

import numpy as np

from moert.predictors.base import MOST_TOKENS, Predictor

Chances = list[list[float]]
"""Of a layer's next events, the nearest first, the probability that it needs each expert."""


def chances_ahead(predictor: Predictor, layer: int, tokens: int) -> Chances:
    """What `predictor` expects of the next `tokens` passes of `layer`, as `Policy.observe_ahead` takes it.

    It ends before the first pass of which the predictor cannot say anything, or nothing that is a number.
    """
    found: Chances = []
    for ahead in range(1, min(tokens, MOST_TOKENS) + 1):
        scores = predictor.scores(layer, ahead)
        if scores is None or not np.isfinite(scores).all():
            break
        found.append(np.clip(scores, 0, 1).tolist())
    return found
