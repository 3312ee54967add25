"""Run mixture-of-experts models that do not fit: experts live in GPU slots, host memory and NVMe, tokens stay the same.

`import moert` is light: torch and transformers are imported when one of the names below is first used.
"""

from __future__ import annotations

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
from moert.torch_threads import limit_spinning

if TYPE_CHECKING:
    from moert.api import OffloadConfig, close, follow, hint, load, patch, record, reset_stats, resize, stats, unpatch

limit_spinning()

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
