"""torch.compile of a model with offloaded experts: its graphs end where experts begin, and the tokens stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_support import checkpoint
from transformers import AutoModelForCausalLM

import moert

IDS = torch.tensor([[5, 6, 7, 8, 9]])


# What torch warns of where it takes moert's own functions into a graph.
pytestmark = pytest.mark.filterwarnings("error:Dynamo does not know how to trace")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_layers_compute_what_layers_do(tmp_path: Path) -> None:
    with moert.load(checkpoint(tmp_path, "demo"), host_memory="25%") as model, torch.no_grad():
        plain = model(IDS).logits
        for layer in model.model.layers[:3]:
            layer.compile(backend="eager")
        moert.reset_stats(model)
        torch.testing.assert_close(model(IDS).logits, plain)
        assert moert.stats(model).misses > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_computes_what_the_model_does(tmp_path: Path, dtype: torch.dtype) -> None:
    with moert.load(checkpoint(tmp_path, "olmoe"), host_memory="50%", dtype=dtype) as model:
        plain = model(IDS).logits
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS).logits, plain.detach())
        torch.testing.assert_close(compiled(IDS).logits, plain)  # autograd records


@pytest.mark.slow
def test_generate_goes_through_a_compiled_forward(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_moe")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = reference.generate(IDS, max_new_tokens=6, do_sample=False)
    with moert.load(folder, host_memory="50%", dtype=torch.float32) as model:
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)
