"""Finding plug-ins: a plug-in's name is its file's name, or `"package.module:Class"` for code outside the tree."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from typing import TypeVar

from moert.errors import ConfigError

T = TypeVar("T")


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
        ConfigError: unknown name, module that does not import, or a class that is not a `base`.
    """
    kind = base.__name__.lower()
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{kind} {name!r} cannot be imported: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise ConfigError(f"{kind} {name!r} is not a subclass of {base.__module__}.{base.__name__}")
        return found
    if name not in available(package):
        raise ConfigError(
            f"no {kind} named {name!r}; there are {', '.join(available(package))}, "
            f'and "package.module:Class" for one of your own'
        )
    module = importlib.import_module(f"{package}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(f"{module.__name__} must define exactly one {base.__name__}, it defines {len(classes)}")
    return classes[0]
