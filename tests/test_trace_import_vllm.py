"""What vLLM returns as routed experts becomes a trace, and malformed answers are refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_support import random_ids, read_with

from moert.errors import CorruptFileError
from moert.trace import (
    Phase,
)
from moert.trace.importing import recognise


def encoded(array: Any) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def response(routed: Any, num_prompt: int, **more: Any) -> dict[str, Any]:
    """As vLLM's server answers: a row for every token but the last."""
    generated = len(routed) + 1 - num_prompt
    return {
        "model": "m",
        "prompt_token_ids": list(range(100, 100 + num_prompt)),
        "choices": [{"token_ids": list(range(generated)), "routed_experts": encoded(routed.astype(np.int16))}],
        "usage": {"prompt_tokens": num_prompt},
        **more,
    }


def test_vllm_responses(tmp_path: Path) -> None:
    routed = [random_ids(6, 0), random_ids(9, 1)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(response(array, 4)) + "\n" for array in routed))
    assert recognise(path) == "vllm"
    header, sequences = read_with("vllm", path, experts=8, model="m")
    assert [layer.name for layer in header.layers] == ["layers.0", "layers.1", "layers.2"]
    for array, sequence in zip(routed, sequences, strict=True):
        np.testing.assert_array_equal(sequence.experts, array)
    first, second = sequences
    assert first.phases.tolist() == [Phase.PREFILL] * 4 + [Phase.DECODE] * 2
    assert first.steps.tolist() == [0, 0, 0, 0, 1, 2]
    assert second.steps.tolist() == [3, 3, 3, 3, 4, 5, 6, 7, 8]
    assert first.token_ids is not None
    assert first.token_ids.tolist() == [100, 101, 102, 103, 0, 1]


@pytest.mark.parametrize("layout", ["one document", "list", "indented", "lists", "older", "offline"])
def test_vllm_layouts(tmp_path: Path, layout: str) -> None:
    array = random_ids(6)
    document = response(array, 4)
    if layout == "lists":
        document["choices"][0]["routed_experts"] = array.tolist()
    if layout in ("older", "offline"):
        document["prompt_routed_experts"] = array[:4].tolist()
        document["choices"][0]["routed_experts"] = array[4:].tolist()
    if layout == "offline":
        document["outputs"] = document.pop("choices")
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps([document] if layout == "list" else document, indent=2 if layout == "indented" else None)
    )
    assert recognise(path) == "vllm"
    _, (sequence,) = read_with("vllm", path, experts=8)
    np.testing.assert_array_equal(sequence.experts, array)
    assert sequence.steps.tolist() == [0, 0, 0, 0, 1, 2]


def test_vllm_choices_each_have_the_prompt(tmp_path: Path) -> None:
    array, other = random_ids(6), random_ids(5, 1)
    document = response(array, 4)
    document["prompt_routed_experts"] = array[:4].tolist()
    document["choices"] = [{"routed_experts": part.tolist()} for part in (array[4:], other[4:])]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    _, (first, second) = read_with("vllm", path, experts=8)
    np.testing.assert_array_equal(first.experts, array)
    np.testing.assert_array_equal(second.experts, np.concatenate([array[:4], other[4:]]))
    assert (first.token_ids, second.token_ids) == (None, None)


def test_vllm_arrays(tmp_path: Path) -> None:
    array = random_ids(6)
    np.save(tmp_path / "x.npy", array.astype(np.uint8))
    assert recognise(tmp_path / "x.npy") == "vllm"
    _, (sequence,) = read_with("vllm", tmp_path / "x.npy", experts=8)
    np.testing.assert_array_equal(sequence.experts, array)
    assert sequence.steps.tolist() == [0, 1, 2, 3, 4, 5]
    _, (sequence,) = read_with("vllm", tmp_path / "x.npy", experts=8, phase=Phase.PREFILL)
    assert sequence.steps.tolist() == [0] * 6
    np.savez(tmp_path / "x.npz", routed_experts_0=array[4:], prompt_routed_experts_0=array[:4], routed_experts_1=array)
    assert recognise(tmp_path / "x.npz") == "vllm"
    _, (first, second) = read_with("vllm", tmp_path / "x.npz", experts=8)
    np.testing.assert_array_equal(first.experts, array)
    assert first.steps.tolist() == [0, 0, 0, 0, 1, 2]
    np.testing.assert_array_equal(second.experts, array)


def test_vllm_dense_layers_are_left_out(tmp_path: Path) -> None:
    array = random_ids(6)
    array[:, 1] = 0
    np.save(tmp_path / "x.npy", array)
    header, (sequence,) = read_with("vllm", tmp_path / "x.npy", experts=8)
    assert [layer.name for layer in header.layers] == ["layers.0", "layers.2"]
    np.testing.assert_array_equal(sequence.experts, array[:, [0, 2]])
    np.save(tmp_path / "zero.npy", np.zeros_like(array))
    with pytest.raises(CorruptFileError, match="some of vLLM's fused kernels report no routing"):
        read_with("vllm", tmp_path / "zero.npy", experts=8)


def vllm_case(**changes: Any) -> dict[str, Any]:
    document = response(random_ids(6), 4)
    for key, value in changes.items():
        (document["choices"][0] if key in document["choices"][0] else document)[key] = value
    return document


VLLM_MALFORMED: list[tuple[Any, str]] = [
    (vllm_case(routed_experts=None), 'line 2: there is no "routed_experts": was it asked for'),
    (vllm_case(routed_experts="%%%"), "line 2: routed experts are neither an array in base64"),
    (vllm_case(routed_experts=encoded(random_ids(6))[:200]), "line 2: routed experts are neither"),
    (vllm_case(routed_experts=[[[0, 1]], [[0]]]), "line 2: routed experts are neither"),
    (vllm_case(routed_experts=[[0, 1]]), r"line 2: routed experts of shape \[1, 2\]"),
    (vllm_case(routed_experts=[]), r"line 2: routed experts of shape \[0\]"),
    (vllm_case(routed_experts=(random_ids(6) + 0.5).tolist()), "line 2: expert ids must be integers"),
    (vllm_case(routed_experts=(random_ids(6) + 7).tolist()), r"line 2: experts: token \d, layer \d: id \d+"),
    (vllm_case(routed_experts=(random_ids(6) * 0).tolist()), "line 2: experts: token 0, layer 0: expert 0 twice"),
    (vllm_case(routed_experts=random_ids(6, layers=2).tolist()), "line 2: 2 layers and 2 experts a token, the first"),
    (vllm_case(routed_experts=random_ids(3).tolist()), "line 2: 3 rows are fewer than the prompt's 4"),
    (vllm_case(token_ids=[1]), "line 2: 6 rows for 5 tokens"),
    (vllm_case(token_ids=[1, "2", 3]), "line 2: token ids are not a list of whole numbers"),
    (vllm_case(choices=3), 'line 2: "choices" is not a list of objects'),
    (vllm_case(prompt_routed_experts=random_ids(3).tolist()), "line 2: 3 rows for a prompt of 4 tokens"),
    (vllm_case(prompt_routed_experts=random_ids(4, layers=2).tolist()), "line 2: the prompt has"),
    (3, "line 2: a JSON int, not an object"),
]


@pytest.mark.parametrize(("document", "message"), VLLM_MALFORMED)
def test_vllm_malformed(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(vllm_case()) + "\n" + json.dumps(document) + "\n")
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_with("vllm", path, experts=8)
    assert str(path) in str(caught.value)


def test_vllm_malformed_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    good = json.dumps(vllm_case())
    for text, message in [
        (good + "\n{\n", "line 2: not JSON"),
        (good + "\n\n" + good, "line 2: empty, but line 3 is not"),
        ('{\n"choices": ,\n}', "line 2: neither JSON nor JSON lines"),
        ("[]", "there is no request"),
        ('{"choices": []}', "there is no request"),
    ]:
        path.write_text(text)
        with pytest.raises(CorruptFileError, match=message):
            read_with("vllm", path, experts=8)
    np.savez(tmp_path / "x.npz", prompt_routed_experts=random_ids(3))
    with pytest.raises(CorruptFileError, match="'prompt_routed_experts': is no routed_experts"):
        read_with("vllm", tmp_path / "x.npz", experts=8)
    np.save(tmp_path / "x.npy", random_ids(3)[0])
    with pytest.raises(CorruptFileError, match=r"array: routed experts of shape \[3, 2\]"):
        read_with("vllm", tmp_path / "x.npy", experts=8)
    np.save(tmp_path / "x.npy", np.array([None]))
    with pytest.raises(CorruptFileError, match="Object arrays"):
        read_with("vllm", tmp_path / "x.npy", experts=8)
