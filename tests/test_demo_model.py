"""The embedded demo model is there, is small and is trained (random weights fail the tests of its text and routing)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "moert" / "data" / "demo"
# Held-out files that every Python from 3.10 on has.
SAMPLE = (
    "copyreg.py",
    "sched.py",
    "token.py",
    "email/__init__.py",
    "email/_encoded_words.py",
    "email/contentmanager.py",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Imports a script of bench/ by its name; those import one another as top-level modules."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "bench"))

    def get(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield get
    sys.path.remove(str(ROOT / "bench"))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == ROOT / "bench":
            del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="module")
def sample(bench: Any) -> list[Any]:
    text = bench("stdlib_text")
    texts = {path: text.read_text(text.stdlib_folder(), path) for path in SAMPLE}
    assert all(texts.values()), [path for path, found in texts.items() if not found]
    assert all(map(text.is_heldout, SAMPLE))
    return [text.TextFile(path, found) for path, found in texts.items()]


def test_files_are_there_and_small() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names | {"README.md", "training_log.csv"} == {path.name for path in DEMO.iterdir()}
    assert (DEMO / "model.safetensors").stat().st_size <= 24_000_000
    assert (DEMO / "training_log.csv").stat().st_size < 200_000


def test_checkpoint_has_the_hub_layout() -> None:
    from safetensors import safe_open

    with safe_open(DEMO / "model.safetensors", "pt") as file:
        names = set(file.keys())
        record = file.get_tensor("model.layers.7.mlp.experts.31.down_proj.weight")
    assert record.dtype == torch.bfloat16
    experts = [name for name in names if ".mlp.experts." in name]
    assert len(experts) == 8 * 32 * 3
    assert "lm_head.weight" not in names


def test_beats_gzip_on_heldout_text(bench: Any, model: Any, tokenizer: Any, sample: list[Any]) -> None:
    bits = bench("eval_demo").bits_per_file(model, tokenizer, sample, context=512, stride=512, batch=4)
    per_file, concatenated = bench("stdlib_text").gzip_bits_per_byte([file.text for file in sample])
    size_bytes = sum(file.size_bytes for file in sample)
    assert sum(bits) / size_bytes < 0.75 * min(per_file, concatenated)


def test_routing_is_specialised_and_local(bench: Any, model: Any, tokenizer: Any, sample: list[Any]) -> None:
    evaluation = bench("eval_demo")
    report = evaluation.routing_report(model, evaluation.whole_windows(tokenizer, sample, 512, 5))
    assert min(report["usage"]["entropy_share"]) > 0.75
    overlap = report["overlap"]
    assert overlap["random"] == 4 / 32
    assert overlap["mean"] > 1.5 * overlap["random"]
    assert overlap["mean"] > 1.2 * overlap["popularity_alone"]
    # Fresh random weights route even more locally, so locality alone proves nothing: their experts are interchangeable.
    assert report["bits_per_token"]["wrong_experts"] > report["bits_per_token"]["own_experts"] + 1


def test_continues_code_the_same_way_twice(model: Any, tokenizer: Any) -> None:
    prompt = "class Point:\n    def __init__(self, name, value):\n        self."
    inputs = tokenizer(prompt, return_tensors="pt")
    first, second = (model.generate(**inputs, max_new_tokens=24, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    text = tokenizer.decode(first[0])
    assert text.startswith(prompt + "name = name\n"), text


def test_tokenizer_gives_every_byte_back(tokenizer: Any) -> None:
    text = "def f(x):\n\treturn 'naïve ☃ \\x00'  # \x00\x7f\r\n        \n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_target_is_scored_once(bench: Any) -> None:
    cut = bench("eval_demo").cut
    for length in (2, 9, 10, 33, 64):
        ids = torch.arange(length)
        scored = [window[first + 1 :] for window, first in cut(ids, context=8, stride=4)]
        assert torch.cat(scored).tolist() == list(range(1, length))
        assert all(len(window) <= 9 for window, _ in cut(ids, context=8, stride=4))


def test_segment_routing_against_its_definition(bench: Any) -> None:
    window = 4
    chosen = np.random.default_rng(0).random((2, 9, 3, 5)) < 0.4
    best = (0.0, 0.0)
    for threshold in range(1, window + 1):
        matches = predictions = acts = 0
        for sequence in chosen:
            for start in range(len(sequence) - window + 1):
                counts = sequence[start : start + window].sum(0)
                matches += counts[counts >= threshold].sum()
                predictions += window * (counts >= threshold).sum()
                acts += counts.sum()
        best = max(best, (2 * matches / (predictions + acts), predictions / acts))
    assert bench("eval_demo").segment_routing(chosen, window) == pytest.approx(best)


def test_fast_training_forward_is_the_model(bench: Any) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=True, initializer_range=0.2, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    ids, direction = torch.randint(64, (3, 77)), torch.randn(3, 77, 64)
    (model(ids).logits * direction).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits, _, counts = bench("demo_forward").FastForward(model, torch.float32)(ids)
    (logits * direction).sum().backward()
    assert torch.allclose(logits, model(ids).logits, atol=1e-4)
    assert counts.sum(-1).tolist() == [3 * 77 * 2] * 2
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() < 1e-4 * scale, name
