"""One use of something at a time, and order after one that was cut short."""

from __future__ import annotations

import contextlib
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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
        self._alone: int | None = None
        """The thread within `alone`, whose uses are part of that one."""

    @abstractmethod
    def _check_open(self) -> None:
        """
        Raises:
            MoertError: it has been closed.
        """

    @abstractmethod
    def _recover(self) -> None:
        """Go on after an interrupt that came nobody knows where."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One use, which may be made of several by this thread."""
        with self._lock:
            self._check_open()
            if self._torn:
                self._recover()
            self._torn = True
            self._alone = threading.get_ident()
            try:
                yield
            except MoertError:
                self._torn = False
                raise
            finally:
                self._alone = None
            self._torn = False


def whole(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """One use, while there is no other. One that was cut short by an interrupt, wherever that came, is noticed by the
    next one, which puts everything in order first."""

    @functools.wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._alone is not None and self._alone == threading.get_ident():
            return method(self, *args, **kwargs)
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
