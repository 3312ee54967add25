"""Router logits as transformers returns them with `output_router_logits=True`: [tokens, experts] for each layer.

Read are .safetensors, .npz and .pt files with `router_logits`: one tensor [L, T, E], or one [T, E] a layer, in .pt a
tuple or list, elsewhere `router_logits.0`, `router_logits.1` and so on (`_` for `.` will do). Beside them there may be
`input_ids` and `attention_mask`, [batch, length], with which the tokens of a batch are told apart; without them they
are one sequence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moert.errors import ConfigError
from moert.trace.importers._arrays import (
    Archive,
    archive_names,
    load_pt,
    pickled_words,
    read_safetensors,
    safetensors_names,
)
from moert.trace.importers.base import Importer, ImportOptions, beginning, checked, malformed
from moert.trace.sequence import LayerInfo, Phase, Sequence, TraceHeader

_NAME = re.compile(r"router_logits(?:[._]([0-9]{1,6}))?")
_BESIDE = ("input_ids", "attention_mask")


class HfRouterLogits(Importer):
    """Ids are those of the top-k logits, the lower id first where they are equal; scores are their softmax.

    That is the router of most families, but not of those that add a bias, choose among groups or use a sigmoid; and how
    the picks were weighted is not known, so a trace made from logits has no weights.
    """

    about = "transformers router_logits (.safetensors, .npz, .pt)"

    def recognises(self, path: Path) -> bool:
        if b"router_logits" in pickled_words(path) or any(_NAME.fullmatch(name) for name in archive_names(path)):
            return True
        start = beginning(path)
        return start[8:9] == b"{" and b'"router_logits' in start

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        top_k = options.need("top_k", path)
        layers, beside = _open(path)
        logits = [_layer(path, where, read()) for where, read in layers]
        for index, layer in enumerate(logits):
            if len(layer) != len(logits[0]):
                raise malformed(path, layers[index][0], f"{len(layer)} tokens, the first layer has {len(logits[0])}")
        experts = [layer.shape[1] for layer in logits]
        if options.experts is not None and {options.experts} != set(experts):
            raise ConfigError(f"{path} has {experts[0]} experts a layer, --experts says {options.experts}")
        if top_k > min(experts):
            raise ConfigError(f"--top-k={top_k} is more than the {min(experts)} experts of a layer of {path}")
        header = TraceHeader(
            layers=tuple(
                LayerInfo(f"layers.{index}", count, top_k, options.native_top_k) for index, count in enumerate(experts)
            ),
            model=options.model,
            source="hf_router_logits",
        )
        return header, _sequences(path, logits, beside, header, options)


def _sequences(
    path: Path,
    logits: list[npt.NDArray[np.float32]],
    beside: dict[str, npt.NDArray[Any]],
    header: TraceHeader,
    options: ImportOptions,
) -> Iterator[Sequence]:
    num_tokens = len(logits[0])
    ids, mask = (beside.get(name) for name in _BESIDE)
    shape = next((array.shape for array in (ids, mask) if array is not None), (1, num_tokens))
    for name, array in beside.items():
        if array.ndim != 2 or array.shape != shape or array.size != num_tokens or array.dtype.kind not in "iub":
            raise malformed(
                path, f"{name!r}", f"{array.dtype} {list(array.shape)} is not [batch, length] of {num_tokens} tokens"
            )
    batch, length = shape
    first_step = 0
    for row in range(batch):
        rows = slice(row * length, (row + 1) * length)
        experts, scores = _route([layer[rows] for layer in logits], header)
        phases = np.full(length, options.phase, dtype=np.uint8)
        if mask is not None:
            phases[mask[row] == 0] = Phase.PADDING
        # A batch runs together; as if decoded, a token of each sequence a step.
        steps = np.full(length, first_step, dtype=np.int64)
        if options.phase is not Phase.PREFILL:
            steps += np.arange(length)
        token_ids = None if ids is None else ids[row].astype(np.int64)
        sequence = Sequence(experts, steps, phases, None, scores, token_ids, f"{path.stem}/{row}")
        yield checked(sequence, header, path, f"sequence {row}")
        options.report(row + 1, batch)


def _route(
    logits: list[npt.NDArray[np.float32]], header: TraceHeader
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids [T, L, K] and scores [T, L, E] of logits [T, E] of each layer."""
    num_tokens = len(logits[0])
    widest = max(layer.num_experts for layer in header.layers)
    experts = np.empty((num_tokens, len(logits), header.top_k), dtype=np.int32)
    scores = np.zeros((num_tokens, len(logits), widest), dtype=np.float32)
    for index, layer in enumerate(logits):
        experts[:, index] = np.argsort(-layer, axis=1, kind="stable")[:, : header.top_k]
        powers = np.exp(layer - layer.max(axis=1, keepdims=True))
        scores[:, index, : layer.shape[1]] = powers / powers.sum(axis=1, keepdims=True)
    return experts, scores


_Reader = tuple[str, Callable[[], npt.NDArray[Any]]]


def _open(path: Path) -> tuple[list[_Reader], dict[str, npt.NDArray[Any]]]:
    """Where the layers' logits are and how each is read, and the arrays beside them."""
    start = beginning(path, 9)
    if start[8:9] == b"{":
        return _named(path, safetensors_names(path), lambda name: read_safetensors(path, name))
    names = archive_names(path)
    if names:
        return _named(path, names, Archive(path).read)
    document = load_pt(path)
    if isinstance(document, dict):
        beside = {name: _tensor(path, name, document[name]) for name in _BESIDE if document.get(name) is not None}
        document = document.get("router_logits")
    else:
        beside = {}
    if not isinstance(document, (tuple, list)):
        return _split(path, _tensor(path, "router_logits", document)), beside
    layers = [_tensor(path, f"router_logits.{index}", layer) for index, layer in enumerate(document)]
    if not layers:
        raise malformed(path, "router_logits", "there are no layers")
    return [(f"router_logits.{index}", partial(np.asarray, layer)) for index, layer in enumerate(layers)], beside


def _named(
    path: Path, names: list[str], read: Callable[[str], npt.NDArray[Any]]
) -> tuple[list[_Reader], dict[str, npt.NDArray[Any]]]:
    beside = {name: read(name) for name in _BESIDE if name in names}
    numbered = {int(match[1]): name for name in names if (match := _NAME.fullmatch(name)) and match[1]}
    if "router_logits" in names:
        return _split(path, read("router_logits")), beside
    if not numbered:
        raise malformed(path, "file", "there is no router_logits")
    missing = set(range(max(numbered) + 1)) - set(numbered)
    if missing:
        raise malformed(path, f"'router_logits.{min(missing)}'", f"is missing, of {max(numbered) + 1} layers")
    return [(name, partial(read, name)) for _, name in sorted(numbered.items())], beside


def _split(path: Path, array: npt.NDArray[Any]) -> list[_Reader]:
    if array.ndim != 3 or len(array) == 0:
        raise malformed(path, "'router_logits'", f"{list(array.shape)} is not [layers, tokens, experts]")
    return [(f"'router_logits'[{index}]", partial(np.asarray, layer)) for index, layer in enumerate(array)]


def _layer(path: Path, where: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if array.dtype.kind != "f" or array.ndim != 2 or 0 in array.shape:
        raise malformed(path, where, f"{array.dtype} {list(array.shape)} is not floats [tokens, experts]")
    array = array.astype(np.float32)
    wrong = ~np.isfinite(array)
    if wrong.any():
        token, expert = (int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))
        raise malformed(path, where, f"token {token}, expert {expert}: {array[token, expert]} is not finite")
    return array


def _tensor(path: Path, name: str, value: Any) -> npt.NDArray[Any]:
    import torch

    if not isinstance(value, torch.Tensor):
        raise malformed(path, f"{name!r}", f"is a {type(value).__name__}, not a tensor")
    value = value.detach()
    return np.asarray((value.float() if value.is_floating_point() else value).numpy())
