"""Policies from outside the tree: where one breaks the contract, the error says so, and what ran is not lost."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from moert.errors import MoertError, PolicyError
from moert.policies.base import Policy
from moert.policies.lru import LRU
from moert.types import ExpertId

_CALLS = (
    "access",
    "admit",
    "evict",
    "victim",
    "victim_for",
    "wants",
    "worth",
    "observe_scores",
    "observe_ahead",
    "begin_sequence",
    "foresee",
)


@functools.cache
def guarded(cls: type[Policy]) -> type[Policy]:
    """`cls` with every call from outside watched: it raises `PolicyError` where `cls` fails or names a wrong victim."""
    # Only what `cls` overrides: who drives a policy looks at that to know what it must be told.
    own = [name for name in _CALLS if getattr(cls, name) is not getattr(Policy, name)]
    body = {name: _watched(getattr(cls, name), name) for name in own}
    face = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Guarded, cls), {**face, **body})


class _Watch:
    """What a cache has told its policy."""

    def __init__(self) -> None:
        self.residents: set[ExpertId] = set()
        self.events = 0
        self.inside = False


class _Guarded(Policy):
    _has_failed = False
    """Of the class, not the object: when one layer's policy fails the caches of all layers start anew."""

    def __init__(self, capacity: int, **parameters: Any) -> None:
        self._watch = _Watch()
        super().__init__(capacity, **parameters)

    def fresh(self, capacity: int) -> Policy:
        if not self._has_failed:
            return super().fresh(capacity)
        warnings.warn(
            f"policy {_name(self)} has failed, so lru decides in its place until the model is loaded again",
            RuntimeWarning,
            stacklevel=2,
        )
        other = LRU(capacity)
        other.sizes = self.sizes
        return other


def _watched(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: _Guarded, *arguments: Any) -> Any:
        watch = self._watch
        if watch.inside:
            return method(self, *arguments)
        watch.inside = True
        watch.events += name == "access"
        try:
            answer = method(self, *arguments)
        except MoertError:
            raise
        except Exception as error:
            raise _failed(self, name, f"raised {type(error).__name__}: {error}{_place(error)}") from error
        finally:
            watch.inside = False
        if name == "admit":
            watch.residents.add(arguments[0])
        elif name == "evict":
            watch.residents.discard(arguments[0])
        elif name in ("victim", "victim_for"):
            _check_victim(self, name, answer, arguments[-1])
        return answer

    return call


def _check_victim(policy: _Guarded, name: str, victim: object, locked: Any) -> None:
    residents = policy._watch.residents
    named = victim if isinstance(victim, ExpertId) else repr(victim)
    if not isinstance(victim, ExpertId) or victim not in residents:
        what = f"named {named}, which is not among the {len(residents)} residents"
    elif victim in locked:
        n_locked = len(residents.intersection(locked))
        what = f"named {named}, which is one of the {n_locked} locked of {len(residents)} residents"
    else:
        return
    raise _failed(policy, name, f"{what}; it must return a resident that is not locked")


def _failed(policy: _Guarded, name: str, what: str) -> PolicyError:
    type(policy)._has_failed = True
    return PolicyError(f"policy {_name(policy)}: at event {policy._watch.events} of its cache, {name} {what}")


def _name(policy: Policy) -> str:
    return f"{type(policy).__module__}:{type(policy).__qualname__}"


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
