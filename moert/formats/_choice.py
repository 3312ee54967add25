"""A format and its parameters as one piece of text: how the command line and files name them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from moert.errors import ConfigError
from moert.formats.base import Format
from moert.plugins import load_plugin

PACKAGE = "moert.formats"

Value = bool | int | float | str


@dataclass(frozen=True)
class FormatChoice:
    """A format by name with every parameter of its constructor, `NAME,PARAMETER=VALUE,...` as text.

    Two choices are equal if they encode alike, however they were spelled: parameters left out have their defaults.
    """

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def parse(cls, text: str) -> FormatChoice:
        """Read `"int8"`, `"int4,group=128,symmetric=false"` or `"package.module:Class,PARAMETER=VALUE"`.

        Raises:
            ConfigError: an unknown format or parameter, or a value that the format refuses.
        """
        name, *rest = (part.strip() for part in text.split(","))
        defaults = _parameters(_class_of(name))
        given = dict(defaults)
        for part in rest:
            key, equals, value = (word.strip() for word in part.partition("="))
            if not equals or key not in defaults:
                known = ", ".join(f"{name}={_write(value)}" for name, value in defaults.items()) or "none"
                raise ConfigError(f"format {text!r}: {part!r} is no parameter of {name}; its parameters are: {known}")
            given[key] = _read(value, defaults[key], f"format {text!r}: {key}")
        choice = cls(name, tuple(given.items()))
        choice.make()
        return choice

    def make(self) -> Format:
        """The format itself.

        Raises:
            ConfigError: a parameter that it refuses.
        """
        return _class_of(self.name)(**dict(self.parameters))

    @property
    def is_plain(self) -> bool:
        """Whether it stores weights as the model has them."""
        return self.name == "plain"

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={_write(value)}" for key, value in self.parameters)])


def _class_of(name: str) -> type[Format]:
    return load_plugin(PACKAGE, name, Format)  # type: ignore[type-abstract]  # only looked up


def _parameters(cls: type[Format]) -> dict[str, Value]:
    """The constructor's parameters and their defaults."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind in named and isinstance(parameter.default, (bool, int, float, str))
    }


def _read(text: str, default: Value, what: str) -> Value:
    """`text` as a value of the type of `default`."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{what}={text!r} must be true or false")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ConfigError(f"{what}={text!r} must be {kind}") from None


def _write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
