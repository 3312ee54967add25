"""Training of predictors from recorded routing; needs torch, and no transformers.

Importing this is light: torch is imported when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moert.training.examples import Examples, Shares, TrainingSet
    from moert.training.hidden import HiddenFile, HiddenWriter
    from moert.training.loop import Point
    from moert.training.measures import Measures
    from moert.training.recipes.base import Recipe, recipe_names
    from moert.training.run import Training, train

__all__ = [
    "Examples",
    "HiddenFile",
    "HiddenWriter",
    "Measures",
    "Point",
    "Recipe",
    "Shares",
    "Training",
    "TrainingSet",
    "recipe_names",
    "train",
]

_MODULES = {
    "examples": ("Examples", "Shares", "TrainingSet"),
    "hidden": ("HiddenFile", "HiddenWriter"),
    "loop": ("Point",),
    "measures": ("Measures",),
    "recipes.base": ("Recipe", "recipe_names"),
    "run": ("Training", "train"),
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
