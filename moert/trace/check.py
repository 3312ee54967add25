"""Whether a header and a sequence are what they say they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence, TraceHeader

MAX_EXPERTS = 65_535
"""Of a layer: ids are stored in 16 bits, of which one value means that there is none."""

MAX_STEP = 2**62
"""What a step's number stays below."""

TOKEN_ID_RANGE = (-(2**31), 2**31 - 1)
"""Token ids are stored in 32 bits."""

_DTYPES = {
    "experts": np.int32,
    "steps": np.int64,
    "phases": np.uint8,
    "weights": np.float32,
    "scores": np.float32,
    "token_ids": np.int64,
}


class Problem(NamedTuple):
    """The first thing that is wrong with a sequence, and where, as far as it has a place."""

    array: str
    text: str
    token: int | None = None
    layer: int | None = None


def validate_header(header: TraceHeader) -> None:
    """Check what is true of a whole trace.

    Raises:
        ConfigError: there is no layer, or one with impossible numbers.
    """
    problem = find_header_problem(header)
    if problem is not None:
        raise ConfigError(problem)


def validate(sequence: Sequence, header: TraceHeader) -> None:
    """Check one sequence against its trace's header: shapes, dtypes and every value. O(T * L * K^2), no copies kept.

    Raises:
        ConfigError: what is wrong, with token, layer and numbers.
    """
    problem = find_problem(sequence, header)
    if problem is not None:
        name = f"sequence {sequence.name!r}" if sequence.name else "sequence"
        raise ConfigError(f"{name}: {problem.array}: {problem.text}")


def find_header_problem(header: TraceHeader) -> str | None:
    """What is wrong with a header, or None."""
    if not header.layers:
        return "a trace needs at least one layer of experts"
    for name in ("model", "config_hash", "source"):
        if not _is_text(getattr(header, name)):
            return f"{name} {getattr(header, name)!r} is no text that can be stored"
    for index, layer in enumerate(header.layers):
        text = _layer_problem(layer)
        if text is not None:
            return f"layer {index} ({layer.name!r}): {text}"
    return None


def _is_text(value: object) -> bool:
    """Whether it is a text without halves of surrogate pairs, as names of files can have."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _layer_problem(layer: LayerInfo) -> str | None:
    if not _is_text(layer.name):
        return "its name is no text that can be stored"
    if not 1 <= layer.num_experts <= MAX_EXPERTS:
        return f"{layer.num_experts} experts; a layer has 1 to {MAX_EXPERTS}"
    if not 1 <= layer.top_k <= layer.num_experts:
        return f"top-k of {layer.top_k} is not between 1 and its {layer.num_experts} experts"
    if layer.native_top_k is not None and not 1 <= layer.native_top_k <= layer.num_experts:
        return f"native top-k of {layer.native_top_k} is not between 1 and its {layer.num_experts} experts"
    if layer.expert_bytes < 0:
        return f"{layer.expert_bytes} bytes an expert"
    return None


def find_problem(sequence: Sequence, header: TraceHeader) -> Problem | None:
    """The first thing that is wrong with a sequence, or None."""
    if not isinstance(sequence.steps, np.ndarray) or sequence.steps.ndim != 1:
        return Problem("steps", "must be an array [T]")
    num_tokens = len(sequence.steps)
    if num_tokens == 0:
        return Problem("steps", "the sequence is empty; leave it out")
    if not _is_text(sequence.name):
        return Problem("name", f"{sequence.name!r} is no text that can be stored")
    problem = _find_shape_problem(sequence, header, num_tokens) or _find_token_problem(sequence)
    if problem is None:
        problem = find_expert_problem(sequence.experts, header)
    if problem is None:
        problem = _find_float_problem(sequence, header)
    return problem


def find_expert_problem(experts: npt.NDArray[Any], header: TraceHeader) -> Problem | None:
    """What is wrong with ids [T, L, K] of any signed dtype, or None."""
    # By place, [K, T, L]: comparing whole planes is ten times as fast as comparing within rows of K.
    planes = np.ascontiguousarray(np.moveaxis(experts, 2, 0))
    picked = planes != NO_EXPERT
    num_experts = np.array([layer.num_experts for layer in header.layers], dtype=planes.dtype)
    wrong = picked & ((planes < 0) | (planes >= num_experts))
    if wrong.any():
        token, layer, place = _first(np.moveaxis(wrong, 0, 2))
        ids = f"id {experts[token, layer, place]} is not below the layer's {header.layers[layer].num_experts} experts"
        return _at(token, layer, ids)
    counts = picked.sum(axis=0, dtype=np.int32)
    wrong = counts > np.array([layer.top_k for layer in header.layers], dtype=np.int32)
    if wrong.any():
        token, layer = _first(wrong)
        return _at(token, layer, f"{counts[token, layer]} experts, the header has top-k {header.layers[layer].top_k}")
    wrong = picked[1:] & ~picked[:-1]
    if wrong.any():
        token, layer, place = _first(np.moveaxis(wrong, 0, 2))
        return _at(token, layer, f"place {place} has no expert, but place {place + 1} has: gaps belong at the end")
    for later in range(1, len(planes)):
        for earlier in range(later):
            wrong = (planes[later] == planes[earlier]) & picked[later]
            if wrong.any():
                token, layer = _first(wrong)
                return _at(token, layer, f"expert {planes[later, token, layer]} twice")
    return None


def _at(token: int, layer: int, text: str) -> Problem:
    return Problem("experts", f"token {token}, layer {layer}: {text}", token, layer)


def _first(wrong: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))


def _find_shape_problem(sequence: Sequence, header: TraceHeader, num_tokens: int) -> Problem | None:
    picks = (num_tokens, len(header.layers), header.top_k)
    shapes = {
        "experts": picks,
        "steps": (num_tokens,),
        "phases": (num_tokens,),
        "weights": picks,
        "scores": (num_tokens, len(header.layers), max(layer.num_experts for layer in header.layers)),
        "token_ids": (num_tokens,),
    }
    for name, shape in shapes.items():
        array = getattr(sequence, name)
        if array is None and name in ("weights", "scores", "token_ids"):
            continue
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != _DTYPES[name]:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            return Problem(name, f"must be {np.dtype(_DTYPES[name])} {list(shape)}, is {found}")
    return None


def _find_token_problem(sequence: Sequence) -> Problem | None:
    steps, phases, token_ids = sequence.steps, sequence.phases, sequence.token_ids
    wrong = (steps < 0) | (steps >= MAX_STEP)
    if wrong.any():
        token = int(wrong.argmax())
        return Problem("steps", f"token {token}: step {steps[token]} is not between 0 and 2^62", token)
    wrong = steps[1:] < steps[:-1]
    if wrong.any():
        token = int(wrong.argmax()) + 1
        return Problem("steps", f"token {token}: step {steps[token]} comes after step {steps[token - 1]}", token)
    wrong = phases > max(Phase)
    if wrong.any():
        token = int(wrong.argmax())
        return Problem("phases", f"token {token}: {phases[token]} is no phase", token)
    if token_ids is not None:
        wrong = (token_ids < TOKEN_ID_RANGE[0]) | (token_ids > TOKEN_ID_RANGE[1])
        if wrong.any():
            token = int(wrong.argmax())
            return Problem("token_ids", f"token {token}: id {token_ids[token]} does not fit 32 bits", token)
    return None


def _find_float_problem(sequence: Sequence, header: TraceHeader) -> Problem | None:
    for name in ("weights", "scores"):
        array = getattr(sequence, name)
        if array is None:
            continue
        if name == "weights":
            beyond = sequence.experts == NO_EXPERT
        else:
            num_experts = np.array([layer.num_experts for layer in header.layers])
            beyond = np.arange(array.shape[2])[None, None, :] >= num_experts[None, :, None]
        wrong = ~np.isfinite(array) | (beyond & (array != 0))
        if wrong.any():
            token, layer, place = _first(wrong)
            value = array[token, layer, place]
            text = "is not finite" if not np.isfinite(value) else "stands where there is no expert"
            return Problem(name, f"token {token}, layer {layer}, place {place}: {value} {text}", token, layer)
    return None
