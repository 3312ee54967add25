"""A policy and its parameters as one piece of text: how the command line and configurations name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from moert.errors import ConfigError, MoertError
from moert.plugins import available, load_plugin, read_choice
from moert.policies._guard import guarded
from moert.policies.base import Policy
from moert.types import ExpertId

PACKAGE = "moert.policies"


def policy_names(*, live_only: bool = False) -> list[str]:
    """The names of the policies that come with moert, sorted; `live_only` leaves out those that know the future."""
    return [name for name in available(PACKAGE) if not (live_only and _class_of(name).needs_future)]


def make_policy(
    name: str,
    capacity: int,
    *,
    future: Iterable[Sequence[ExpertId]] | None = None,
    sizes: Callable[[ExpertId], int] | None = None,
) -> Policy:
    """A fresh policy for a cache of `capacity` experts, or of `capacity` bytes if `sizes` is given.

    Args:
        name: `"ema"`, `"ema,alpha=0.05"` or `"package.module:Class,PARAMETER=VALUE"`.
        future: every event to come, for a policy that needs to know; others do not look at it.
        sizes: bytes of each expert.

    Raises:
        ConfigError: no such policy, and the message lists those there are; a parameter that it does not have, or a
            value that it refuses; a class of one's own that cannot be made; or one that needs the future where there is
            none, as in a live run.
    """
    plain, parameters = read_choice(PACKAGE, name, Policy)  # type: ignore[type-abstract]  # only looked up
    cls = _class_of(plain)
    if cls.needs_future and future is None:
        raise ConfigError(
            f"policy {name!r} must know every event beforehand, so it is a bound for simulations and cannot run live; "
            f"those that can are {', '.join(policy_names(live_only=True))}"
        )
    if ":" in plain:
        try:
            policy = guarded(cls)(capacity, **parameters)
        except MoertError:
            raise
        except Exception as error:
            raise ConfigError(
                f"policy {name!r} cannot be made: {type(error).__name__}: {error}; its constructor takes a capacity, "
                "and other parameters with defaults"
            ) from error
    else:
        policy = cls(capacity, **parameters)
    policy.parameters, policy.sizes = parameters, sizes
    if cls.needs_future and future is not None:
        policy.foresee(future)
    return policy


def split_policies(text: str) -> list[str]:
    """The policies of a list such as `"lru,ema,alpha=0.05,belady"`: a part with `=` belongs to the one before it.

    Raises:
        ConfigError: an empty name, or a parameter before any name.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if not part or ("=" in part and not found):
            raise ConfigError(f"policies {text!r}: {part!r} is no policy; write NAME,PARAMETER=VALUE,NAME,...")
        if "=" in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _class_of(name: str) -> type[Policy]:
    return load_plugin(PACKAGE, name, Policy)  # type: ignore[type-abstract]  # only looked up
