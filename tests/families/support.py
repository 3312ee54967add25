"""The table of support, one row a family, for the documentation."""

from __future__ import annotations

from typing import NamedTuple

from .models import experts_modules, skeleton
from .names import ADAPTER_FAMILIES, FAMILIES, UNSUPPORTED_FAMILIES, UNSUPPORTED_REASONS, model_class


class SupportRow(NamedTuple):
    """What moert does with one family."""

    family: str
    """The model folder of transformers, and for a second class of it `+vl` or `+talker`."""
    model_class: str
    experts_class: str
    """Names of the classes that hold the routed experts, joined by commas."""
    supported: bool
    note: str
    """How the family is reached, or why it is refused."""


def support_table() -> list[SupportRow]:
    """A row for each of `FAMILIES`, in its order. Builds each model without weights, so it takes some seconds."""
    return [_row(family) for family in FAMILIES]


def _row(family: str) -> SupportRow:
    reason = UNSUPPORTED_REASONS[family] if family in UNSUPPORTED_FAMILIES else None
    reached = "adapter" if family in ADAPTER_FAMILIES else "experts interface"
    return SupportRow(
        family=family,
        model_class=model_class(family).__name__,
        experts_class=", ".join(_experts_classes(family)),
        supported=reason is None,
        note=reason or reached,
    )


def _experts_classes(family: str) -> list[str]:
    return sorted({type(module).__name__ for _, module in experts_modules(skeleton(family))})
