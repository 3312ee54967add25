"""One use of something at a time, and order after one that was cut short."""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from moert.errors import MoertError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="UsedAlone")


class UsedAlone(ABC):
    """Whose methods marked `whole` are used one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._torn = False

    @abstractmethod
    def _check_open(self) -> None:
        """
        Raises:
            MoertError: it has been closed.
        """

    @abstractmethod
    def _recover(self) -> None:
        """Go on after an interrupt that came nobody knows where."""


def whole(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """One use, while there is no other. One that was cut short by an interrupt, wherever that came, is noticed by the
    next one, which puts everything in order first."""

    @functools.wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            self._check_open()
            if self._torn:
                self._recover()
            self._torn = True
            try:
                result = method(self, *args, **kwargs)
            except MoertError:
                self._torn = False
                raise
            self._torn = False
            return result

    return run
