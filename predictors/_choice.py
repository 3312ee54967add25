"""A predictor and its parameters as one piece of text: how the command line and configurations name them."""

from __future__ import annotations

from collections.abc import Iterable

from moert.errors import ConfigError, MoertError
from moert.plugins import available, load_plugin, read_choice
from moert.predictors.base import Model, Need, Predictor, missing_needs

PACKAGE = "moert.predictors"


def predictor_names(at_hand: Iterable[Need] | None = None) -> list[str]:
    """The names of the predictors that come with moert, sorted; those alone that need no more than `at_hand`."""
    names = available(PACKAGE)
    if at_hand is None:
        return names
    known = frozenset(at_hand)
    return [name for name in names if not missing_needs(load_predictor(name), known)]


def load_predictor(name: str) -> type[Predictor]:
    """The class that `name`, without parameters, stands for.

    Raises:
        ConfigError: there is none of that name, or it does not import.
    """
    return load_plugin(PACKAGE, name, Predictor)


def read_predictor(text: str) -> tuple[type[Predictor], dict[str, bool | int | float | str]]:
    """The class that `"NAME,PARAMETER=VALUE,..."` stands for, and all its parameters.

    Raises:
        ConfigError: an unknown predictor or parameter, or a value that is none.
    """
    name, parameters = read_choice(PACKAGE, text, Predictor)
    return load_predictor(name), parameters


def make_predictor(text: str, model: Model, at_hand: Iterable[Need], where: str = "here") -> Predictor:
    """A fresh predictor for `model`. Blocks while it reads its file, if it has one.

    Args:
        text: `"joint"`, `"joint,rate=0.1"`, `"expertflow,file=PATH"` or `"package.module:Class,PARAMETER=VALUE"`.
        at_hand: what there is to tell it. A file is at hand where the parameter `file` names one.
        where: what a message says has no more than that.

    Raises:
        ConfigError: no such predictor or parameter, a value that it refuses, something that it needs is not at hand, or
            a class of one's own that cannot be made.
        MoertError: what reading its file raises.
    """
    cls, parameters = read_predictor(text)
    known = frozenset(at_hand) | ({Need.FILE} if parameters.get("file") else frozenset())
    missing = missing_needs(cls, known)
    if missing:
        needed = " and ".join(need.value for need in missing)
        hint = f"; write {text},file=PATH" if Need.FILE in missing else ""
        raise ConfigError(f"predictor {text!r} needs {needed}, which {_are(missing)} not at hand {where}{hint}")
    try:
        return cls(model, **parameters)
    except MoertError:
        raise
    except Exception as error:
        if ":" not in text:
            raise
        raise ConfigError(
            f"predictor {text!r} cannot be made: {type(error).__name__}: {error}; its constructor takes a "
            "moert.predictors.base.Model, and other parameters with defaults"
        ) from error


def split_predictors(text: str) -> list[str]:
    """The predictors of a list such as `"joint,rate=0.1,frequency"`: a part with `=` belongs to the one before it.

    Raises:
        ConfigError: an empty name, or a parameter before any name.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if not part or ("=" in part and not found):
            raise ConfigError(f"predictors {text!r}: {part!r} is no predictor; write NAME,PARAMETER=VALUE,NAME,...")
        if "=" in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _are(missing: list[Need]) -> str:
    return "is" if len(missing) == 1 and missing[0] in (Need.FILE, Need.FUTURE) else "are"
