"""The options of all commands that open a model, made from the fields of `OffloadConfig`, and the MODEL argument."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import os
import re
import tempfile
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from moert.config import OffloadConfig
from moert.errors import ConfigError

MODEL_HELP = 'Folder of a checkpoint, id of a model on the hub, or "demo": the small model that comes with moert.'
JSON_HELP = "Print one JSON document on standard output and nothing else there."
DTYPES = ("auto", "float32", "bfloat16", "float16")

# What a user has no use for: `debug` fills freed slots with NaN.
_NOT_OFFERED = frozenset({"debug"})
_PANEL = "Memory and reading"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


@dataclass(frozen=True)
class LoadOptions:
    """How a command opens its model: moert's own options and those that go on to transformers."""

    offload: OffloadConfig
    dtype: str = "auto"
    revision: str | None = None

    @property
    def hf_kwargs(self) -> dict[str, Any]:
        """For `from_pretrained`."""
        return {"dtype": self.dtype, "revision": self.revision}

    @property
    def kwargs(self) -> dict[str, Any]:
        """For `moert.load`."""
        return {**asdict(self.offload), **self.hf_kwargs}


def with_load_options(
    *, only: Collection[str] | None = None, defaults: Mapping[str, Any] | None = None, hf: bool = True
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the options of `LoadOptions`; it takes them as its keyword argument `options`.

    Args:
        only: names of the `OffloadConfig` fields to offer; None offers all.
        defaults: field -> its default in this command, where that is another one.
        hf: offer --dtype and --revision too.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        hints = typing.get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name != "options"
        ]
        offered = [name for name in offered_fields() if only is None or name in only]
        added = [_parameter(name, (defaults or {}).get(name, MISSING)) for name in offered]
        added += _hf_parameters() if hf else []

        @functools.wraps(command)
        def wrapper(**values: Any) -> int:
            offload = OffloadConfig(**{name: values.pop(name) for name in offered})
            _check_folder_is_writable(offload.cache_dir)
            chosen = {name: values.pop(name) for name in ("dtype", "revision") if name in values}
            if chosen.get("dtype", "auto") not in DTYPES:
                raise ConfigError(f"--dtype={chosen['dtype']!r} must be one of {', '.join(DTYPES)}")
            return command(**values, options=LoadOptions(offload, **chosen))

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *added)]
        wrapper.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def offered_fields() -> tuple[str, ...]:
    """The fields of `OffloadConfig` that are options of the command line."""
    return tuple(field.name for field in fields(OffloadConfig) if field.name not in _NOT_OFFERED)


def flag_of(name: str) -> str:
    """`--host-memory` for `host_memory`."""
    return "--" + name.replace("_", "-")


def _parameter(name: str, default: Any) -> inspect.Parameter:
    field = next(field for field in fields(OffloadConfig) if field.name == name)
    kind, declaration = _type_of(field)
    option = typer.Option(
        declaration,
        help=_field_help()[name] + (" `moert policies` lists them." if name == "policy" else ""),
        rich_help_panel=_PANEL,
        metavar={"host_memory": "SIZE", "device_memory": "SIZE", "policy": "NAME", "cache_dir": "FOLDER"}.get(name),
        show_default=field.default is not None or default is not MISSING,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default if default is MISSING else default,
        annotation=Annotated[kind, option],
    )


def _type_of(field: Field[Any]) -> tuple[Any, str]:
    """The type that typer parses a field as, and the option's declaration."""
    names = {part.strip() for part in str(field.type).split("|")}
    flag = flag_of(field.name)
    if "bool" in names:
        return (bool | None if "None" in names else bool), f"{flag}/--no-{flag[2:]}"
    kind: Any = int if names <= {"int", "None"} else str
    return (kind | None if "None" in names else kind), flag


@functools.cache
def _field_help() -> dict[str, str]:
    """Field -> the text that stands below it in `OffloadConfig`, so that there is one description of each option."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(OffloadConfig)))
    assert isinstance(tree.body[0], ast.ClassDef)
    body = tree.body[0].body
    texts = dict.fromkeys((field.name for field in fields(OffloadConfig)), "")
    for statement, follower in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            described = isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant)
            if described and statement.target.id in texts:
                text = inspect.cleandoc(ast.literal_eval(typing.cast("ast.Expr", follower).value))
                texts[statement.target.id] = re.sub(r"\bNone: ", "Default: ", text.replace("\n", " "))
    return texts


def _hf_parameters() -> list[inspect.Parameter]:
    dtype = typer.Option(metavar="NAME", help=f"What to compute in: {', '.join(DTYPES)} (auto: as the checkpoint).")
    revision = typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.", show_default=False)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("dtype", kind, default="auto", annotation=Annotated[str, dtype]),
        inspect.Parameter("revision", kind, default=None, annotation=Annotated[str | None, revision]),
    ]


def resolve_model(name: str) -> str:
    """The folder or hub id that the MODEL argument stands for.

    Raises:
        ConfigError: it looks like a path and is no folder, or the demo's weights are not installed.
    """
    expanded = os.path.expanduser(name)
    if os.path.isdir(expanded):
        return expanded
    if name == "demo":
        return str(demo_folder())
    if os.path.exists(expanded) or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name!r} is not a folder; give the folder of a checkpoint, or a model id of the hub")
    return name


def demo_folder() -> Path:
    """Where the weights of the demo's model are.

    Raises:
        ConfigError: they are not installed.
    """
    import moert

    folder = Path(moert.__file__).parent / "data" / "demo"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the demo's model is not installed: {folder} has no config.json; install moert again")
    return folder


def _check_folder_is_writable(folder: str | None) -> None:
    """Raise ConfigError unless files can be made in `folder`, or `folder` can be made; leaves nothing behind."""
    if folder is None:
        return
    nearest = Path(folder).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"cache_dir={folder!r}: cannot write to {nearest}: {error.strerror}; give another folder"
        ) from None
