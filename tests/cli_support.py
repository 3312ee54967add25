"""Checkpoints that a command line can be pointed at, and running it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from report_support import write
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moert.cli import main

VOCABULARY = 512
PROMPT = "def main(path):"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    # The shape of the model that comes with moert, thinner.
    "demo": {
        "num_hidden_layers": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    "llama": {},
}


@dataclass(frozen=True)
class Ran:
    """What one run of the command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output, which is one JSON document and nothing else."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """The one line that a run with bad input leaves."""
        assert self.code == 2, f"exit code {self.code}, not 2; {self.out}{self.err}"
        assert self.out == ""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("moert: error: ")
        return self.err.removeprefix("moert: error: ").rstrip("\n")


class Cli:
    """Runs the command line in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Ran:
        self._capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        return Ran(code, out, err)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A command line 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    return Cli(capfd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A trace file, alone in a folder."""
    return write(tmp_path / "tiny.safetensors")


def document_of(cli: Cli, *arguments: object) -> dict[str, Any]:
    """What a run that ends well prints as JSON."""
    ran = cli(*arguments, "--json")
    assert ran.code == 0, ran.err
    return ran.document


def rows_of(cli: Cli, *arguments: object) -> list[dict[str, Any]]:
    """The rows of such a run's results."""
    found: list[dict[str, Any]] = document_of(cli, *arguments)["results"]
    return found


@cache
def checkpoint(root: Path, family: str = "olmoe", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny checkpoint of random weights with a tokenizer, made once below `root`; read only."""
    from transformers import AutoConfig

    folder = root / f"{family}-{str(dtype).removeprefix('torch.')}"
    model_type = {"demo": "qwen3_moe"}.get(family, family)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **_FAMILIES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1 / math.sqrt(weight.shape[-1]))
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of text; the ids above are words with a space before them, so that text streams."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    vocabulary.update({f"Ġw{place}": place for place in range(len(letters), VOCABULARY)})
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, clean_up_tokenization_spaces=False)


def plain_tokens(folder: Path, prompt: str, n: int, **options: Any) -> list[int]:
    """The `n` greedy tokens that plain transformers puts after `prompt`; `options` are those of `generate`."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    inputs = tokenizer()(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, pad_token_id=0, **options
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens
