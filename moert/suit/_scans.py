"""The scans over a layer's tokens, compiled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moert.machine_code import compiled

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

_RECENT_BITS = 32
"""A priority is a count above this many bits and the time of the last use below it."""


@compiled
def window_histogram(experts: Ids, num_experts: int, length: int, histogram: Counts) -> None:
    """Add to `histogram[c]` how often an expert has c activations in a window of `length` tokens, over all windows.

    Every run of `length` tokens is a window. Takes O(tokens x picks): an expert's count is noted when it changes, not
    for each window.

    Args:
        experts: [T, K], negative where there is none.
        histogram: [length + 1].
    """
    num_tokens, top_k = experts.shape
    counts = np.zeros(num_experts, np.int64)
    since = np.zeros(num_experts, np.int64)
    for token in range(num_tokens):
        window = max(0, token - length + 1)  # windows before it are complete
        for pick in range(top_k):
            expert = experts[token, pick]
            if expert >= 0:
                histogram[counts[expert]] += window - since[expert]
                since[expert] = window
                counts[expert] += 1
        leaving = token - length
        if leaving >= 0:
            for pick in range(top_k):
                expert = experts[leaving, pick]
                if expert >= 0:
                    histogram[counts[expert]] += window - since[expert]
                    since[expert] = window
                    counts[expert] -= 1
    num_windows = max(0, num_tokens - length + 1)
    for expert in range(num_experts):
        histogram[counts[expert]] += num_windows - since[expert]


@compiled
def segment_cache_hits(experts: Ids, num_experts: int, length: int, hits: Counts) -> None:
    """Add to `hits[c]` the activations that a cache of c + 1 experts serves and one of c does not.

    The cache is told how often each expert is chosen in the `length` tokens from the present one on; the resident with
    the fewest of these activations leaves, of equals the least recently used. One pass serves every capacity: such
    caches hold each other (a stack of experts by priority). An expert's first activation is a hit where there is room.

    Args:
        experts: [T, K], negative where there is none.
        hits: [num_experts].
    """
    num_tokens, top_k = experts.shape
    priority = np.zeros(num_experts, np.int64)
    one = np.int64(1) << _RECENT_BITS
    stack = np.empty(num_experts, np.int64)
    depth_of = np.full(num_experts, -1, np.int64)
    depth = 0
    now = 0
    fresh = 0
    for token in range(min(length, num_tokens)):
        for pick in range(top_k):
            if experts[token, pick] >= 0:
                priority[experts[token, pick]] += one
    for token in range(num_tokens):
        for pick in range(top_k):
            expert = experts[token, pick]
            if expert < 0:
                continue
            if depth_of[expert] >= 0:
                hits[depth_of[expert]] += 1
            else:
                hits[fresh] += 1
                fresh += 1
        for pick in range(top_k):
            expert = experts[token, pick]
            if expert < 0:
                continue
            last = depth_of[expert]
            if last < 0:
                last = depth
                depth += 1
            falling = expert
            for place in range(last):
                other = stack[place]
                if place == 0 or priority[other] < priority[falling]:
                    stack[place], depth_of[falling] = falling, place
                    falling = other
            stack[last], depth_of[falling] = falling, last
            now += 1
            priority[expert] = ((priority[expert] >> _RECENT_BITS) - 1) * one + now
        if token + length < num_tokens:
            for pick in range(top_k):
                if experts[token + length, pick] >= 0:
                    priority[experts[token + length, pick]] += one
