"""Run mixture-of-experts models that do not fit: experts live in GPU slots, host memory and NVMe, tokens stay the same.

`import moert` is light: torch and transformers are imported when one of the names below is first used.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from moert.errors import (
    CapacityError,
    ConfigError,
    CorruptFileError,
    KernelUnavailableError,
    MoertError,
    PolicyError,
    TransferError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from moert.api import OffloadConfig, close, follow, hint, load, patch, record, reset_stats, resize, stats, unpatch

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # torch's threads spin for milliseconds after each operation, on the cores that moert's compute with; this leaves
    # them microseconds. Their library reads it once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ConfigError",
    "CorruptFileError",
    "KernelUnavailableError",
    "MoertError",
    "OffloadConfig",
    "PolicyError",
    "TransferError",
    "UnsupportedModelError",
    "__version__",
    "close",
    "follow",
    "hint",
    "load",
    "patch",
    "record",
    "reset_stats",
    "resize",
    "stats",
    "unpatch",
]

_LAZY = frozenset(
    {"OffloadConfig", "close", "follow", "hint", "load", "patch", "record", "reset_stats", "resize", "stats", "unpatch"}
)


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Through api, even for the configuration: importing it registers the quantizer that from_pretrained looks up.
    from moert import api

    value = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
