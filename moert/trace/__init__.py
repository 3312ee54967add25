"""Traces of routing: which experts each token of a model chose, layer by layer. Needs numpy only, no torch.

Importing this is light: numpy is imported when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moert.trace.check import validate, validate_header
    from moert.trace.file import SequenceSummary, TraceFile
    from moert.trace.sequence import NO_EXPERT, LayerInfo, Phase, Sequence, TraceHeader
    from moert.trace.trace import Trace, TraceLike
    from moert.trace.writer import TraceWriter

__all__ = [
    "NO_EXPERT",
    "LayerInfo",
    "Phase",
    "Sequence",
    "SequenceSummary",
    "Trace",
    "TraceFile",
    "TraceHeader",
    "TraceLike",
    "TraceWriter",
    "validate",
    "validate_header",
]

_MODULES = {
    "check": ("validate", "validate_header"),
    "file": ("SequenceSummary", "TraceFile"),
    "sequence": ("NO_EXPERT", "LayerInfo", "Phase", "Sequence", "TraceHeader"),
    "trace": ("Trace", "TraceLike"),
    "writer": ("TraceWriter",),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
