"""How good predictors are: recorded sequences replayed to the objects that run live. Needs numpy only, no torch.

Importing this is light: numpy is imported when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moert.predict.driving import replay
    from moert.predict.metrics import Row, Tally
    from moert.predict.recorded import Recorded, Recording, halves
    from moert.predict.run import Horizons, Result, Study, evaluate

__all__ = [
    "Horizons",
    "Recorded",
    "Recording",
    "Result",
    "Row",
    "Study",
    "Tally",
    "evaluate",
    "halves",
    "replay",
]

_MODULES = {
    "run": ("Horizons", "Result", "Study", "evaluate"),
    "metrics": ("Row", "Tally"),
    "recorded": ("Recorded", "Recording", "halves"),
    "driving": ("replay",),
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
