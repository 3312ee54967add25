"""How an expert's weights are stored in a record: one file a format, named by its file."""

from __future__ import annotations

from moert.formats._choice import FormatChoice
from moert.formats.base import Format, RecordLayout, TensorSpec
from moert.plugins import available, load_plugin

__all__ = ["Format", "FormatChoice", "RecordLayout", "TensorSpec", "format_names", "make_format"]


def format_names() -> list[str]:
    """The names of the formats that come with moert, sorted."""
    return available(__name__)


def make_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: no such format; the message lists those there are.
    """
    return load_plugin(__name__, name, Format)()  # type: ignore[type-abstract]  # only looked up
