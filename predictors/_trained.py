"""Files of trained predictors: what `moert train-predictor` writes and their predictors read.

A file is a safetensors file whose metadata has one entry, `moert_predictor`: a JSON object with `version`, that of the
format, `about`, with the fields of `About`, and `content_hash`, the xxh3-128 of `about` as JSON without spaces and of
the tensors in the order of their names. The same predictor makes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from moert.errors import ConfigError, CorruptFileError, TransferError
from moert.predictors.base import Model
from moert.tiers.durable import release, write_whole

VERSION = 1
KEY = "moert_predictor"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class About:
    """What a file says of the predictor in it."""

    predictor: str
    """Its name, without parameters."""
    num_experts: tuple[int, ...]
    """Of each layer of the model."""
    top_k: tuple[int, ...]
    """Of each layer."""
    model: str = ""
    """The model's id, or the last part of its path; empty: unknown."""
    config_hash: str = ""
    """Of the model's configuration, as traces carry it; empty: unknown."""
    trace_hash: str = ""
    """Of the routing and the token ids it was trained and tested on."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """All that the trainer was told, defaults included."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """On the sequences it was not trained on."""
    moert_version: str = ""


class Trained(NamedTuple):
    """A file's content; the arrays are read only."""

    path: Path
    about: About
    tensors: dict[str, Array]

    def tensor(self, name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> Array:
        """The tensor `name`, None standing for any size.

        Raises:
            CorruptFileError: there is none, it is of another dtype or shape, or it has numbers that are not finite.
        """
        found = self.tensors.get(name)
        if found is None:
            raise CorruptFileError(f"{self.path}: tensor {name!r} is missing; train the predictor again")
        fits = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        if found.dtype != dtype or not fits:
            wanted = ", ".join("n" if n is None else str(n) for n in shape)
            raise CorruptFileError(
                f"{self.path}: tensor {name!r} is {found.dtype} {list(found.shape)}, not {np.dtype(dtype)} [{wanted}]; "
                "train the predictor again"
            )
        if np.issubdtype(found.dtype, np.floating) and not np.isfinite(found).all():
            raise CorruptFileError(f"{self.path}: tensor {name!r} has numbers that are not finite")
        return found


def save_trained(path: Path, about: About, tensors: Mapping[str, Array]) -> None:
    """Write a file whole: what had its name is replaced only then. Blocks.

    Raises:
        TransferError: it cannot be written, and nothing is left.
    """
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    document = {"version": VERSION, "about": asdict(about)}
    document["content_hash"] = content_hash(document["about"], whole)
    # In one entry, as the library writes several in an order that chance decides.
    metadata = {KEY: json.dumps(document, ensure_ascii=False)}
    try:
        write_whole(path, save_tensors(whole, metadata=metadata))
    except BaseException:
        release(path.parent, [path.name])
        raise


def load_trained(path: str | Path, predictor: str, model: Model) -> Trained:
    """The file at `path`, if it holds a `predictor` for `model`. Blocks.

    Raises:
        ConfigError: `path` is empty; or it holds another predictor, or one for another model; both are named.
        CorruptFileError: it is malformed.
        TransferError: it cannot be read.
    """
    if not path:
        raise ConfigError(f"predictor {predictor} needs a file that `moert train-predictor` wrote: file=PATH")
    found = read_trained(path)
    if found.about.predictor != predictor:
        raise ConfigError(
            f"{found.path} holds the predictor {found.about.predictor!r}, not {predictor!r}; write "
            f"{found.about.predictor},file={found.path}"
        )
    problem = _unlike(found.about, model)
    if problem:
        raise ConfigError(f"{found.path} was trained for another model: {problem}; train one for this model")
    return found


def read_trained(path: str | Path) -> Trained:
    """Whatever predictor is in the file at `path`. Blocks.

    Raises:
        ConfigError: it is of a newer version, or holds no predictor.
        CorruptFileError: it is malformed.
        TransferError: it cannot be read.
    """
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TransferError(error.errno, f"{error.strerror}; cannot read a trained predictor", str(path)) from error
    try:
        tensors = load_tensors(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path}: no sound safetensors file ({type(error).__name__}: {error}); train the predictor again, or copy "
            "it again"
        ) from error
    if KEY not in metadata:
        raise ConfigError(f"{path} holds no predictor; `moert train-predictor` makes such files")
    document = _document(path, metadata[KEY])
    if document.get("version") != VERSION:
        raise ConfigError(
            f"{path} is of version {document.get('version')!r}, this moert reads version {VERSION}: train it again"
        )
    found = content_hash(document.get("about"), tensors)
    if document.get("content_hash") != found:
        raise CorruptFileError(
            f"{path} is not what was written (its hash is {found}, and should be {document.get('content_hash')}); "
            "train the predictor again, or copy it again"
        )
    for array in tensors.values():
        array.flags.writeable = False
    return Trained(path, _about(path, document.get("about")), tensors)


def _document(path: Path, text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: what it says of itself is malformed ({error!r}); train it again") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path}: what it says of itself is a JSON {type(found).__name__}; train it again")
    return found


def _about(path: Path, found: Any) -> About:
    kinds = {"num_experts": list, "top_k": list, "options": dict, "metrics": dict}
    try:
        known = {one.name: found[one.name] for one in fields(About)}
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: what it says of itself is malformed ({error!r}); train it again") from error
    for name, value in known.items():
        if not isinstance(value, kinds.get(name, str)):
            raise CorruptFileError(f"{path}: {name!r} is {value!r}; train the predictor again")
    sizes = known["num_experts"], known["top_k"]
    for size in sizes:
        if not size or len(size) != len(sizes[0]) or not all(type(n) is int and n > 0 for n in size):
            raise CorruptFileError(f"{path}: its layers are {sizes[0]} and {sizes[1]}; train the predictor again")
    return About(**{**known, "num_experts": tuple(sizes[0]), "top_k": tuple(sizes[1])})


def _unlike(about: About, model: Model) -> str:
    """How the model it was trained for is not `model`; empty: nothing says so."""
    if about.config_hash and model.config_hash:
        if about.config_hash != model.config_hash:
            there, here = about.model or "unnamed", model.name or "unnamed"
            return f"{there} (configuration {about.config_hash}), and this is {here} ({model.config_hash})"
    elif about.model and model.name and about.model != model.name:
        return f"{about.model!r}, and this is {model.name!r}"
    if about.num_experts != tuple(model.num_experts):
        return (
            f"{_shape(about.num_experts)} ({about.model or 'unnamed'}), and this one has {_shape(model.num_experts)} "
            f"({model.name or 'unnamed'})"
        )
    return ""


def _shape(num_experts: tuple[int, ...]) -> str:
    counts = sorted(set(num_experts))
    return f"{len(num_experts)} layers of {' or '.join(map(str, counts))} experts"


def content_hash(about: Any, tensors: Mapping[str, Array]) -> str:
    """Of what a file says of itself, and of its tensors."""
    state = xxhash.xxh3_128(json.dumps(about, separators=(",", ":")).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        state.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        state.update(array.data.cast("B") if array.nbytes else b"")
    return state.hexdigest()
