"""Cache policies: which resident expert leaves when a slot is needed.

One file a policy: its name is the file's name, and the file holds one `Policy` subclass. Code outside the tree is
named `"package.module:Class"`. A policy sees ids and scores only, so the same object runs live and in simulation.
"""

from __future__ import annotations

from moert.plugins import available, load_plugin
from moert.policies.base import Policy

__all__ = ["Policy", "make_policy", "policy_names"]


def policy_names() -> list[str]:
    """The names of the policies that come with moert, sorted."""
    return available(__name__)


def make_policy(name: str, capacity: int) -> Policy:
    """A fresh policy for a cache of `capacity` experts.

    Raises:
        ConfigError: no such policy; the message lists those there are.
    """
    return load_plugin(__name__, name, Policy)(capacity)  # type: ignore[type-abstract]  # only looked up
