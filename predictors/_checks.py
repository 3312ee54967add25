"""What constructors check."""

from __future__ import annotations

from typing import TypeVar

from moert.errors import ConfigError

Number = TypeVar("Number", int, float)


def check_from_to(predictor: str, name: str, value: Number, low: Number, high: Number) -> Number:
    """`value`, if it is from `low` to `high`.

    Raises:
        ConfigError: it is not.
    """
    if not low <= value <= high:  # which no NaN passes
        raise ConfigError(f"predictor {predictor}: {name}={value} must be from {low} to {high}")
    return value
