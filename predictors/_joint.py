"""The inner loops of `joint`, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from moert.machine_code import compiled

FROM_LAYER, FROM_LAYER_BEFORE, FROM_TOKEN, TOKEN_ALONE = range(4)
"""What a table goes from: the picks one layer before, two before, those of the token before, and the latter for want of
all others."""

MOST_SUM = np.float32(8)
"""Of the squares that steps are divided by: some 150 uses of a row, so that it still follows when the text changes."""

LEAST, MOST = np.float32(1e-3), np.float32(1 - 1e-3)
"""Between which rates are kept, so that their odds are finite."""


@compiled
def _probability(logit: Any) -> Any:
    return 1 / (1 + np.exp(-min(max(logit, np.float32(-30)), np.float32(30))))


@compiled
def _add(logits: Any, table: Any, ids: Any) -> None:
    for k in range(len(ids)):
        if ids[k] >= 0:
            row = table[ids[k]]
            for e in range(len(logits)):
                logits[e] += row[e]


@compiled
def _add_expected(logits: Any, table: Any, chances: Any) -> None:
    """As `_add` of experts that are picked with these chances."""
    for i in range(len(chances)):
        if chances[i] > 0.01:
            row = table[i]
            for e in range(len(logits)):
                logits[e] += chances[i] * row[e]


@compiled
def _begin(logits: Any, bias: Any, gain: Any, rate: Any) -> None:
    for e in range(len(logits)):
        logits[e] = bias[e] + gain[e] * np.log(rate[e] / (1 - rate[e]))


@compiled
def predict(
    tables: Any,
    bias: Any,
    gain: Any,
    rate: Any,
    one: Any,
    one_likely: Any,
    two: Any,
    two_likely: Any,
    last: Any,
    out: Any,
) -> None:
    """Chances `out` [n, E] of one layer, from picks [n, K] or, where these are empty, chances [n, E] before it."""
    for row in range(len(out)):
        logits = out[row]
        _begin(logits, bias[0], gain[0], rate)
        if row < len(one):
            _add(logits, tables[FROM_LAYER], one[row])
        elif row < len(one_likely):
            _add_expected(logits, tables[FROM_LAYER], one_likely[row])
        if row < len(two):
            _add(logits, tables[FROM_LAYER_BEFORE], two[row])
        elif row < len(two_likely):
            _add_expected(logits, tables[FROM_LAYER_BEFORE], two_likely[row])
        if row < len(last):
            _add(logits, tables[FROM_TOKEN], last[row])
        for e in range(len(logits)):
            logits[e] = _probability(logits[e])


@compiled
def predict_token(tables: Any, bias: Any, gain: Any, rate: Any, picks: Any, likely: Any, out: Any) -> None:
    """Chances `out` [n, E] one token later, from one's picks [n, K] or, where these are empty, chances [n, E]."""
    for row in range(len(out)):
        logits = out[row]
        _begin(logits, bias[1], gain[1], rate)
        if row < len(picks):
            _add(logits, tables[TOKEN_ALONE], picks[row])
        else:
            _add_expected(logits, tables[TOKEN_ALONE], likely[row])
        for e in range(len(logits)):
            logits[e] = _probability(logits[e])


@compiled
def _step_along(table: Any, sums: Any, ids: Any, slope: Any, mean_square: float, speed: float) -> None:
    for k in range(len(ids)):
        if ids[k] >= 0:
            sums[ids[k]] = min(sums[ids[k]] + mean_square, MOST_SUM)
            size = speed / np.sqrt(sums[ids[k]])
            row = table[ids[k]]
            for e in range(len(slope)):
                row[e] -= size * slope[e]


@compiled
def _learn_one(
    bias: Any, bias_sums: Any, gain: Any, gain_sums: Any, rate: Any, picked: Any, slope: Any, speed: float
) -> Any:
    """From logits in `slope` to the slope of the loss; returns its mean square."""
    total = np.float32(0)
    for e in range(len(slope)):
        slope[e] = _probability(slope[e]) - picked[e]
        square = slope[e] * slope[e]
        total += square
        bias_sums[e] += square
        bias[e] -= speed * slope[e] / np.sqrt(bias_sums[e])
        odds = np.log(rate[e] / (1 - rate[e]))
        gain_sums[e] += square * odds * odds
        gain[e] -= speed * slope[e] * odds / np.sqrt(gain_sums[e])
    return total / len(slope)


@compiled
def learn(
    tables: Any,
    sums: Any,
    bias: Any,
    bias_sums: Any,
    gain: Any,
    gain_sums: Any,
    rate: Any,
    one: Any,
    two: Any,
    last: Any,
    now: Any,
    slope: Any,
    picked: Any,
    speed: float,
    slow: float,
    share: float,
) -> None:
    """Each of the n tokens chose `now` [n, K], after `one` and `two` layers before and `last` a token before."""
    for row in range(len(now)):
        any_pick = False
        picked[:] = 0
        for k in range(now.shape[1]):
            if now[row, k] >= 0:
                picked[now[row, k]] = 1
                any_pick = True
        if not any_pick:
            continue
        _begin(slope, bias[0], gain[0], rate)
        if row < len(one):
            _add(slope, tables[FROM_LAYER], one[row])
        if row < len(two):
            _add(slope, tables[FROM_LAYER_BEFORE], two[row])
        _add(slope, tables[FROM_TOKEN], last[row])
        square = _learn_one(bias[0], bias_sums[0], gain[0], gain_sums[0], rate, picked, slope, slow)
        if row < len(one):
            _step_along(tables[FROM_LAYER], sums[FROM_LAYER], one[row], slope, square, speed)
        if row < len(two):
            _step_along(tables[FROM_LAYER_BEFORE], sums[FROM_LAYER_BEFORE], two[row], slope, square, speed)
        _step_along(tables[FROM_TOKEN], sums[FROM_TOKEN], last[row], slope, square, speed)
        if last[row, 0] >= 0:
            _begin(slope, bias[1], gain[1], rate)
            _add(slope, tables[TOKEN_ALONE], last[row])
            square = _learn_one(bias[1], bias_sums[1], gain[1], gain_sums[1], rate, picked, slope, slow)
            _step_along(tables[TOKEN_ALONE], sums[TOKEN_ALONE], last[row], slope, square, speed)
        for e in range(len(rate)):
            rate[e] = min(max(rate[e] + share * (picked[e] - rate[e]), LEAST), MOST)
