"""The bytes of a trace file: names, dtypes and order of its tensors, its metadata. See docs/trace-format.md."""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.trace.sequence import LayerInfo, TraceHeader

VERSION = 1
VERSION_KEY = "moert_trace"
HEADER_KEY = "header"

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library reads no file with a longer one."""

KINDS = ("spans", "token_ids", "weights", "scores", "experts")
"""What a sequence's tensors are called, in the order in which a file holds them: the widest types come first, so that
each tensor begins at a multiple of its item."""

OPTIONAL_KINDS = ("token_ids", "weights", "scores")

SPAN_FIELDS = 4
"""Columns of `spans`: phase, first step, stride, tokens."""

STORED: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
"""The types that occur, by safetensors' names."""


def dtypes_of(kind: str, header: TraceHeader) -> tuple[str, ...]:
    """The types that a tensor of a kind may have."""
    if kind == "spans":
        return ("I64",)
    if kind == "token_ids":
        return ("I32",)
    if kind == "experts":
        return ("U8",) if max(layer.num_experts for layer in header.layers) <= 255 else ("U16",)
    return ("F16", "F32")


def row_shape(kind: str, header: TraceHeader) -> tuple[int, ...]:
    """The shape of a tensor of a kind without its first dimension."""
    if kind == "spans":
        return (SPAN_FIELDS,)
    if kind == "token_ids":
        return ()
    if kind == "scores":
        return (len(header.layers), max(layer.num_experts for layer in header.layers))
    return (len(header.layers), header.top_k)


def to_spans(phases: npt.NDArray[np.uint8], steps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Phases and ascending steps [T] as `spans` [R, 4]: of each token run of one phase, all in one step or one each."""
    num_tokens = len(steps)
    apart = np.diff(steps)
    links = np.where((apart <= 1) & (phases[1:] == phases[:-1]), apart, -1)
    last_of_run = np.flatnonzero(np.append(links[1:] != links[:-1], True))
    spans = []
    token = 0
    while token < num_tokens:
        stride, count = 0, 1
        if token < num_tokens - 1 and links[token] >= 0:
            stride = int(links[token])
            count = int(last_of_run[np.searchsorted(last_of_run, token)]) - token + 2
        spans.append((int(phases[token]), int(steps[token]), stride, count))
        token += count
    return np.array(spans, dtype=np.int64)


def from_spans(spans: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The phases and steps that checked `spans` stand for."""
    phase, first, stride, count = spans.T
    place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(phase, count).astype(np.uint8), np.repeat(first, count) + np.repeat(stride, count) * place


def encode_header(header: TraceHeader, names: Items[str]) -> dict[str, str]:
    """The metadata of a file with sequences of these names."""
    document: dict[str, Any] = {
        "model": header.model,
        "config_hash": header.config_hash,
        "sampled": header.sampled,
        "source": header.source,
        "layers": [asdict(layer) for layer in header.layers],
        "sequences": len(names),
    }
    if any(names):
        document["names"] = list(names)
    return {VERSION_KEY: str(VERSION), HEADER_KEY: json.dumps(document, ensure_ascii=False, separators=(",", ":"))}


def decode_header(text: str) -> tuple[TraceHeader, int, list[str] | None]:
    """The header, the number of sequences and their names.

    Raises:
        ValueError: it is malformed; the text says how.
    """
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"it is a JSON {type(document).__name__}, not an object")
    layers = tuple(_layer(fields) for fields in _get(document, "layers", list))
    count = _get(document, "sequences", int)
    names = _get(document, "names", list, None)
    if names is not None and (len(names) != count or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"its names are not {count} texts")
    header = TraceHeader(
        layers=layers,
        model=_get(document, "model", str, ""),
        config_hash=_get(document, "config_hash", str, ""),
        sampled=_get(document, "sampled", bool, None),
        source=_get(document, "source", str, ""),
    )
    return header, count, names


_REQUIRED: Any = object()


def _layer(fields: Any) -> LayerInfo:
    if not isinstance(fields, dict):
        raise ValueError(f"a layer is a JSON {type(fields).__name__}, not an object")
    return LayerInfo(
        name=_get(fields, "name", str),
        num_experts=_get(fields, "num_experts", int),
        top_k=_get(fields, "top_k", int),
        native_top_k=_get(fields, "native_top_k", int, None),
        expert_bytes=_get(fields, "expert_bytes", int, 0),
    )


def _get(fields: dict[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = fields.get(key, default)
    if value is _REQUIRED:
        raise ValueError(f"{key!r} is missing")
    if value is default:
        return default
    # A truth value is an int to Python, but not to the format.
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise ValueError(f"{key!r} is {value!r}, not {'a whole number' if kind is int else f'a {kind.__name__}'}")
    return value
