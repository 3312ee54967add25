"""A format and its parameters as one piece of text: how the command line and files name them."""

from __future__ import annotations

from dataclasses import dataclass

from moert.formats.base import Format
from moert.plugins import Value, load_plugin, read_choice, write_value

PACKAGE = "moert.formats"


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
        name, given = read_choice(PACKAGE, text, Format)  # type: ignore[type-abstract]  # only looked up
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
        return ",".join([self.name, *(f"{key}={write_value(value)}" for key, value in self.parameters)])


def _class_of(name: str) -> type[Format]:
    return load_plugin(PACKAGE, name, Format)  # type: ignore[type-abstract]  # only looked up
