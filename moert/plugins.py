"""Finding plug-ins, and reading how they are chosen.

A plug-in's name is its file's name, or `"package.module:Class"` for code outside the tree; parameters of its
constructor may follow: `NAME,PARAMETER=VALUE,...`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import traceback
from types import ModuleType
from typing import TypeVar

from moert.errors import ConfigError

T = TypeVar("T")

Value = bool | int | float | str
"""What a parameter that is chosen by name may be."""


def available(package: str) -> list[str]:
    """Names of the plug-ins in a package folder: its modules other than `base` and those that start with `_`.

    Imports none of them, nor the package: some packages bring in torch.
    """
    spec = importlib.util.find_spec(package)
    path = spec.submodule_search_locations if spec is not None else None
    return sorted(m.name for m in pkgutil.iter_modules(path or []) if m.name != "base" and not m.name.startswith("_"))


def load_plugin(package: str, name: str, base: type[T]) -> type[T]:
    """The class that `name` stands for, a subclass of `base`.

    Raises:
        ConfigError: unknown name, module that does not import, or a class that is not a whole `base`.
    """
    kind = base.__name__.lower()
    if ":" in name:
        return _from_outside(name, base)
    if name not in available(package):
        raise ConfigError(
            f"no {kind} named {name!r}; there are {', '.join(available(package))}, "
            f'and "package.module:Class" for one of your own'
        )
    module = importlib.import_module(f"{package}.{name}")
    classes = _own_classes(module, base)
    if len(classes) != 1:
        raise ConfigError(f"{module.__name__} must define exactly one {base.__name__}, it defines {len(classes)}")
    return classes[0]


def _from_outside(name: str, base: type[T]) -> type[T]:
    kind = base.__name__.lower()
    module_name, _, class_name = name.partition(":")
    if not all(word.isidentifier() for word in (*module_name.split("."), class_name)):
        raise ConfigError(
            f'{kind} {name!r} is not "package.module:Class"; for a class in FOLDER/my_file.py write '
            '"my_file:Class", and set PYTHONPATH=FOLDER'
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {_why(error, module_name)}") from error
    found = getattr(module, class_name, None)
    if found is None:
        there = [cls.__name__ for cls in _own_classes(module, base)]
        raise ConfigError(
            f"{kind} {name!r} cannot be imported: {module.__file__} has no {class_name!r}; "
            f"of {base.__module__}.{base.__name__} it has {', '.join(there) or 'no subclass'}"
        )
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f"{kind} {name!r} is not a subclass of {base.__module__}.{base.__name__}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(f"{kind} {name!r} does not define {missing}; {base.__module__}.{base.__name__} says what for")
    return found


def _why(error: BaseException, module_name: str) -> str:
    """What went wrong in an import, and where."""
    if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
        return f"{error}; set PYTHONPATH to the folder that {module_name.partition('.')[0]} is in"
    if isinstance(error, (ImportError, SyntaxError)):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _own_classes(module: ModuleType, base: type[T]) -> list[type[T]]:
    """The subclasses of `base` that a module defines, not those that it imports."""
    found = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, base)]
    return [cls for cls in found if cls.__module__ == module.__name__]


def read_choice(package: str, text: str, base: type[T]) -> tuple[str, dict[str, Value]]:
    """The name in `NAME,PARAMETER=VALUE,...` and every parameter: those given, and the defaults of the others.

    Raises:
        ConfigError: an unknown plug-in or parameter, or a value that is no such number or truth value.
    """
    kind = base.__name__.lower()
    name, *rest = (part.strip() for part in text.split(","))
    defaults = _parameters(load_plugin(package, name, base))
    given = dict(defaults)
    for part in rest:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in defaults:
            known = ", ".join(f"{name}={write_value(value)}" for name, value in defaults.items()) or "none"
            raise ConfigError(f"{kind} {text!r}: {part!r} is no parameter of {name}; its parameters are: {known}")
        given[key] = _read(value, defaults[key], f"{kind} {text!r}: {key}")
    return name, given


def write_value(value: Value) -> str:
    """`value` as `read_choice` reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parameters(cls: type[object]) -> dict[str, Value]:
    """The constructor's parameters that have a default which can be written, and that default."""
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
