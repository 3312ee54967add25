"""Router logits of transformers become a trace, those of a real model among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from trace_support import read_with
from transformers import AutoModelForCausalLM, OlmoeConfig

from moert.errors import ConfigError, CorruptFileError
from moert.trace import (
    Phase,
)
from moert.trace.importing import recognise


@pytest.fixture(scope="module")
def routed() -> tuple[Any, Any, tuple[torch.Tensor, ...]]:
    """Ids [2, 5], a mask, and the logits that a real model returns for them."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    token_ids = torch.randint(1, 64, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        out = model(token_ids, attention_mask=mask, output_router_logits=True)
    return token_ids, mask, out.router_logits


def save_logits(path: Path, layers: tuple[torch.Tensor, ...], **beside: torch.Tensor) -> None:
    arrays = {f"router_logits.{index}": layer.numpy() for index, layer in enumerate(layers)}
    others = {name: value.numpy() for name, value in beside.items()}
    if path.suffix == ".pt":
        torch.save({"router_logits": layers, **beside}, path)
    elif path.suffix == ".npz":
        np.savez(path, router_logits=np.stack(list(arrays.values())), **others)
    elif path.suffix == ".safetensors":
        save_file({**arrays, **others}, path)
    else:
        save_torch({f"router_logits_{i}": layer.bfloat16() for i, layer in enumerate(layers)} | beside, path)


@pytest.mark.parametrize("name", ["x.pt", "x.npz", "x.safetensors", "x.bf16"])
def test_router_logits_of_a_model(tmp_path: Path, routed: Any, name: str) -> None:
    token_ids, mask, layers = routed
    path = tmp_path / name
    save_logits(path, layers, input_ids=token_ids, attention_mask=mask)
    assert recognise(path) == "hf_router_logits"
    header, sequences = read_with("hf_router_logits", path, top_k=2, experts=8, phase=Phase.PREFILL)
    assert [(layer.num_experts, layer.top_k) for layer in header.layers] == [(8, 2)] * 3
    logits = torch.stack(layers).unflatten(1, (2, 5))
    if name == "x.bf16":
        logits = logits.bfloat16().float()
    for row, sequence in enumerate(sequences):
        expected = logits[:, row].topk(2).indices.transpose(0, 1)
        np.testing.assert_array_equal(sequence.experts, expected)
        assert sequence.scores is not None
        np.testing.assert_allclose(sequence.scores, logits[:, row].softmax(-1).transpose(0, 1), atol=1e-6)
        assert sequence.weights is None
        assert sequence.token_ids is not None
        assert sequence.token_ids.tolist() == token_ids[row].tolist()
        assert sequence.steps.tolist() == [0] * 5
    assert sequences[1].phases.tolist() == [Phase.PADDING] * 2 + [Phase.PREFILL] * 3
    _, (first, second) = read_with("hf_router_logits", path, top_k=2)
    assert first.steps.tolist() == second.steps.tolist() == [0, 1, 2, 3, 4]


def test_router_logits_without_a_batch(tmp_path: Path, routed: Any) -> None:
    _, _, layers = routed
    torch.save(layers, tmp_path / "x.pt")
    _, (sequence,) = read_with("hf_router_logits", tmp_path / "x.pt", top_k=3)
    assert sequence.experts.shape == (10, 3, 3)
    torch.save(torch.stack(layers), tmp_path / "x.pt")
    _, (same,) = read_with("hf_router_logits", tmp_path / "x.pt", top_k=3)
    np.testing.assert_array_equal(sequence.experts, same.experts)


def test_router_logits_of_equal_height(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", router_logits=np.array([[[1.0, 3.0, 3.0, 3.0]]], dtype=np.float32))
    _, (sequence,) = read_with("hf_router_logits", tmp_path / "x.npz", top_k=2)
    assert sequence.experts.tolist() == [[[1, 2]]]


GOOD = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"router_logits": GOOD[0]}, r"'router_logits': \[3, 4\] is not \[layers, tokens, experts\]"),
        ({"router_logits": GOOD.astype(np.int64)}, "is not floats"),
        ({"router_logits": np.where(GOOD == 17, np.nan, GOOD)}, r"\[1\]: token 1, expert 1: nan is not finite"),
        ({"router_logits.0": GOOD[0], "router_logits.2": GOOD[1]}, "'router_logits.1': is missing, of 3 layers"),
        (
            {"router_logits.0": GOOD[0], "router_logits.1": GOOD[1, :2]},
            "router_logits.1: 2 tokens, the first layer",
        ),
        ({"router_logits": GOOD, "input_ids": np.arange(3)}, r"'input_ids': int64 \[3\] is not \[batch, length\]"),
        ({"router_logits": GOOD, "attention_mask": np.ones((2, 3), np.int64)}, r"is not \[batch, length\] of 3 tokens"),
        ({"router_logits": GOOD, "input_ids": np.full((1, 3), 2**40)}, "does not fit 32 bits"),
    ],
)
def test_router_logits_malformed(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    for path in (tmp_path / "x.npz", tmp_path / "x.safetensors"):
        if path.suffix == ".npz":
            np.savez(path, **arrays)
        else:
            save_file(arrays, path)
        with pytest.raises(CorruptFileError, match=message) as caught:
            read_with("hf_router_logits", path, top_k=2)
        assert str(path) in str(caught.value)


def test_router_logits_need_top_k(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, router_logits=GOOD)
    for options, message in [
        ({}, r"number of experts a token \(top-k\); give it with --top-k N"),
        ({"top_k": 5}, "--top-k=5 is more than the 4 experts"),
        ({"top_k": 2, "experts": 8}, "has 4 experts a layer, --experts says 8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_with("hf_router_logits", path, **options)


def test_router_logits_in_other_containers(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for document, message in [
        ({"logits": torch.zeros(3)}, "'router_logits': is a NoneType, not a tensor"),
        ({"router_logits": ()}, "there are no layers"),
        ({"router_logits": (torch.zeros(3, 4), 3)}, r"'router_logits.1': is a int, not a tensor"),
        (3, "is a int, not a tensor"),
    ]:
        torch.save(document, path)
        with pytest.raises(CorruptFileError, match=message):
            read_with("hf_router_logits", path, top_k=2)
    save_file({"x": GOOD}, tmp_path / "x.safetensors")
    with pytest.raises(CorruptFileError, match="there is no router_logits"):
        read_with("hf_router_logits", tmp_path / "x.safetensors", top_k=2)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    with pytest.raises(CorruptFileError, match="header"):
        read_with("hf_router_logits", tmp_path / "x.safetensors", top_k=2)
