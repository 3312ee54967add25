"""What vLLM returns with `--enable-return-routed-experts`: ids [tokens, layers, k] for each request.

Read are saved responses of its server (JSON lines, or one JSON file with a response or a list of them), request outputs
written out in the same shape, and the arrays alone as .npy (one request) or .npz (`routed_experts...`, one a request,
each with its `prompt_routed_experts...` if there is one).

The ids are lists of lists or the base64 of an .npy file. Newer versions give one array for the prompt and all that was
generated but the last token, which never ran; older ones give the prompt's apart as `prompt_routed_experts`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moert.trace.importers._arrays import Archive, archive_names, read_npy
from moert.trace.importers.base import (
    Importer,
    ImportOptions,
    as_ids,
    beginning,
    cannot_read,
    checked,
    malformed,
    prompt_and_decode,
    read_lines,
    refuse_text_after,
    tokens_of,
    uniform_layers,
)
from moert.trace.sequence import LayerInfo, Sequence, TraceHeader

_NPY_MAGIC = b"\x93NUMPY"
_ARRAY = re.compile(r"(?P<prompt>prompt_)?routed_experts(?P<rest>.*)", re.DOTALL)


class _Request(NamedTuple):
    where: str
    experts: npt.NDArray[np.int32]
    """[T, layers that the file has, K]"""
    num_prompt: int | None
    """Of the T; None: unknown."""
    token_ids: npt.NDArray[np.int64] | None


class Vllm(Importer):
    """A request is a sequence; those of a response's several choices each have the prompt again.

    Layers without a router, for which vLLM has zeros, are left out: those where all tokens of the first request have
    one expert K times. A prompt is taken for one step, and each generated token for one: how vLLM had batched or
    chunked them is not in its outputs.
    """

    about = "vLLM return_routed_experts (.jsonl, .json, .npy, .npz)"

    def recognises(self, path: Path) -> bool:
        start = beginning(path)
        if start.startswith(_NPY_MAGIC):
            return True
        if start.lstrip()[:1] in (b"{", b"["):
            return b'routed_experts"' in start or b'"choices"' in start
        return any(_ARRAY.fullmatch(name) for name in archive_names(path))

    def read(self, path: Path, options: ImportOptions) -> tuple[TraceHeader, Iterator[Sequence]]:
        requests = _requests(path, options)
        first = next(requests, None)
        if first is None:
            raise malformed(path, "file", "there is no request with routed experts")
        routed = _routed_layers(path, first)
        every = uniform_layers(first.experts.shape[1], options, path, first.experts.shape[2])
        layers = tuple(layer for layer, has_router in zip(every, routed, strict=True) if has_router)
        header = TraceHeader(layers=layers, model=options.model, source="vllm")
        return header, _sequences(path, chain([first], requests), routed, every, header, options)


def _sequences(
    path: Path,
    requests: Iterator[_Request],
    routed: npt.NDArray[np.bool_],
    every: tuple[LayerInfo, ...],
    header: TraceHeader,
    options: ImportOptions,
) -> Iterator[Sequence]:
    first_step = 0
    for number, request in enumerate(requests):
        experts = request.experts
        if experts.shape[1:] != (len(every), header.top_k):
            raise malformed(
                path,
                request.where,
                f"{experts.shape[1]} layers and {experts.shape[2]} experts a token, the first request has {len(every)} "
                f"and {header.top_k}",
            )
        if request.num_prompt is None:
            phases, steps = tokens_of(options.phase, len(experts), first_step)
        else:
            phases, steps = prompt_and_decode(request.num_prompt, len(experts), first_step)
        first_step = int(steps[-1]) + 1
        picked = np.ascontiguousarray(experts[:, routed])
        sequence = Sequence(picked, steps, phases, token_ids=request.token_ids, name=f"{path.stem}/{number}")
        yield checked(sequence, header, path, request.where)


def _routed_layers(path: Path, request: _Request) -> npt.NDArray[np.bool_]:
    """[L] whether a layer has a router. With one expert a token nobody can tell."""
    experts = request.experts
    if experts.shape[2] == 1:
        return np.ones(experts.shape[1], dtype=np.bool_)
    routed: npt.NDArray[np.bool_] = (experts != experts[:, :, :1]).any(axis=(0, 2))
    if not routed.any():
        raise malformed(
            path,
            request.where,
            "every token has the same expert in all places of all layers: some of vLLM's fused kernels report no "
            "routing; record again with --moe-backend triton",
        )
    return routed


def _requests(path: Path, options: ImportOptions) -> Iterator[_Request]:
    start = beginning(path, 64)
    if start.startswith(_NPY_MAGIC):
        yield _Request("array", _ids(path, "array", read_npy(path)), None, None)
    elif start.startswith(b"PK"):
        yield from _archive_requests(path, options)
    else:
        for where, document in _documents(path, options):
            yield from _document_requests(path, where, document)


def _archive_requests(path: Path, options: ImportOptions) -> Iterator[_Request]:
    archive = Archive(path)
    names = {match["rest"]: name for name in archive.names if (match := _ARRAY.fullmatch(name)) and not match["prompt"]}
    prompts = {match["rest"]: name for name in archive.names if (match := _ARRAY.fullmatch(name)) and match["prompt"]}
    strange = set(archive.names) - set(names.values()) - set(prompts.values())
    if strange or set(prompts) - set(names):
        name = min(strange) if strange else prompts[min(set(prompts) - set(names))]
        raise malformed(path, f"array {name!r}", "is no routed_experts..., nor the prompt_routed_experts... of one")
    for place, (rest, name) in enumerate(names.items()):
        where = f"array {name!r}"
        experts = _ids(path, where, archive.read(name))
        num_prompt = None
        if rest in prompts:
            experts, num_prompt = _join(path, where, _ids(path, where, archive.read(prompts[rest])), experts)
        yield _Request(where, experts, num_prompt, None)
        options.report(place + 1, len(names))


def _documents(path: Path, options: ImportOptions) -> Iterator[tuple[str, Any]]:
    """The objects in a file of JSON lines, or of one JSON document, and where they are."""
    lines = read_lines(path, options)
    number, text = next(lines, (1, ""))
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        yield from _whole(path)
        return
    if isinstance(document, list):
        yield from _items(document)
        refuse_text_after(path, chain(lines), number + 1)
        return
    yield f"line {number}", document
    for number, text in lines:
        if not text.strip():
            refuse_text_after(path, lines, number)
            return
        try:
            yield f"line {number}", json.loads(text)
        except (ValueError, RecursionError) as error:
            raise malformed(path, f"line {number}", f"not JSON ({error})") from error


def _whole(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise cannot_read(error, path) from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise malformed(path, f"line {line}", f"neither JSON nor JSON lines ({error})") from error
    yield from _items(document if isinstance(document, list) else [document])


def _items(documents: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"item {number}", document) for number, document in enumerate(documents))


def _document_requests(path: Path, where: str, document: Any) -> Iterator[_Request]:
    if not isinstance(document, dict):
        raise malformed(path, where, f"a JSON {type(document).__name__}, not an object")
    choices = document.get("choices", document.get("outputs"))
    if choices is None:
        choices = [document]
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise malformed(path, where, '"choices" is not a list of objects')
    for index, choice in enumerate(choices):
        place = where if len(choices) == 1 else f"{where}, choice {index}"
        if choice.get("routed_experts") is None:
            raise malformed(path, place, 'there is no "routed_experts": was it asked for?')
        yield _choice(path, place, document, choice)


def _choice(path: Path, where: str, document: dict[str, Any], choice: dict[str, Any]) -> _Request:
    experts = _ids(path, where, _array(path, where, choice["routed_experts"]))
    prompt_ids = _token_ids(path, where, document.get("prompt_token_ids", choice.get("prompt_token_ids")))
    num_prompt = None if prompt_ids is None else len(prompt_ids)
    if num_prompt is None and isinstance(usage := document.get("usage"), dict):
        value = usage.get("prompt_tokens")
        num_prompt = value if type(value) is int and value >= 0 else None
    if document.get("prompt_routed_experts") is not None:
        before = _ids(path, where, _array(path, where, document["prompt_routed_experts"]))
        experts, found = _join(path, where, before, experts)
        if num_prompt is not None and found != num_prompt:
            raise malformed(path, where, f"{found} rows for a prompt of {num_prompt} tokens")
        num_prompt = found
    if num_prompt is not None and len(experts) < num_prompt:
        raise malformed(path, where, f"{len(experts)} rows are fewer than the prompt's {num_prompt} tokens")
    generated = _token_ids(path, where, choice.get("token_ids"))
    token_ids = None
    if prompt_ids is not None and generated is not None:
        token_ids = np.concatenate([prompt_ids, generated])
        if len(token_ids) < len(experts):
            raise malformed(path, where, f"{len(experts)} rows for {len(token_ids)} tokens")
        token_ids = token_ids[: len(experts)]
    return _Request(where, experts, num_prompt, token_ids)


def _array(path: Path, where: str, value: Any) -> npt.NDArray[Any]:
    try:
        if isinstance(value, str):
            return np.asarray(np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False))
        return np.array(value)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        text = "routed experts are neither an array in base64 nor even lists of lists of lists"
        raise malformed(path, where, f"{text} ({error})") from error


def _ids(path: Path, where: str, array: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if array.ndim != 3 or 0 in array.shape:
        raise malformed(path, where, f"routed experts of shape {list(array.shape)}, not [tokens, layers, k]")
    return as_ids(array, path, where)


def _join(
    path: Path, where: str, prompt: npt.NDArray[np.int32], generated: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], int]:
    if prompt.shape[1:] != generated.shape[1:]:
        raise malformed(
            path, where, f"the prompt has {prompt.shape[1:]} layers and experts, else {generated.shape[1:]}"
        )
    return np.concatenate([prompt, generated]), len(prompt)


def _token_ids(path: Path, where: str, value: Any) -> npt.NDArray[np.int64] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(token) is int and abs(token) < 2**31 for token in value):
        raise malformed(path, where, "token ids are not a list of whole numbers")
    return np.array(value, dtype=np.int64)
