"""Parameters of policies that make no sense."""

from __future__ import annotations

from moert.errors import ConfigError


def check_share(
    policy: str, parameter: str, value: float, *, allow_zero: bool = False, allow_one: bool = False
) -> float:
    """`value`, a share that must be above 0 and below 1.

    Raises:
        ConfigError: it is not.
    """
    if 0 < value < 1 or (allow_zero and value == 0) or (allow_one and value == 1):
        return value
    raise ConfigError(
        f"policy {policy}: {parameter}={value} must be {'at least' if allow_zero else 'above'} 0 and "
        f"{'at most' if allow_one else 'below'} 1"
    )


def check_at_least(policy: str, parameter: str, value: int, least: int) -> int:
    """`value`, a number that must be at least `least`.

    Raises:
        ConfigError: it is not.
    """
    if value >= least:
        return value
    raise ConfigError(f"policy {policy}: {parameter}={value} must be at least {least}")
