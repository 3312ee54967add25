"""Cache policies: which resident expert leaves when a slot is needed.

One file a policy: its name is the file's name, and the file holds one `Policy` subclass. Code outside the tree is
named `"package.module:Class"`. A policy sees ids and scores only, so the same object runs live and in simulation.
"""

from __future__ import annotations

from moert.policies._choice import make_policy, policy_names, split_policies
from moert.policies.base import Policy

__all__ = ["Policy", "make_policy", "policy_names", "split_policies"]
