"""Long prompts: each expert is read once a layer, however long the prompt is, and again where a chunk forces it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moert
from moert.runtime.stats import Stats

LAYERS, E = 2, 8
EXPERT_BYTES = 3 * 256 * 352 * 4
TOKENS = 2048


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE with experts of a MiB, beside which the blocks at the ends of a record are little."""
    folder = tmp_path_factory.mktemp("prefill")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=E,
        num_experts_per_tok=2,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


def prefill(model: Any, chunk: int = TOKENS) -> tuple[torch.Tensor, Stats]:
    """The last position's logits of a prompt of 2,048 tokens, `chunk` of them at a time, and what it took."""
    ids = torch.arange(TOKENS).mul(7).remainder(96)[None]
    cache = None
    with torch.inference_mode():
        for part in ids.split(chunk, dim=1):
            out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
    return out.logits, moert.stats(model)


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> dict[int, torch.Tensor]:
    """What a model computes that has every expert in memory, by the size of the chunks."""
    with moert.load(checkpoint, host_memory="100%") as model:
        return {chunk: prefill(model, chunk)[0] for chunk in (TOKENS, TOKENS // 4)}


@pytest.mark.parametrize("share", ["25%", "50%", "100%"])
def test_each_expert_is_read_once_a_layer(share: str, checkpoint: Path, right: dict[int, torch.Tensor]) -> None:
    with moert.load(checkpoint, host_memory=share, preload=False) as model:
        logits, stats = prefill(model)
    assert torch.equal(logits, right[TOKENS])
    assert (stats.hits, stats.misses) == (0, LAYERS * E), "a long prompt needs them all"
    assert LAYERS * E * EXPERT_BYTES <= stats.bytes_read <= 1.02 * LAYERS * E * EXPERT_BYTES


@pytest.mark.parametrize("share", ["25%", "75%", "100%"])
def test_a_chunk_reads_only_what_has_no_slot(share: str, checkpoint: Path, right: dict[int, torch.Tensor]) -> None:
    with moert.load(checkpoint, host_memory=share, preload=False) as model:
        logits, stats = prefill(model, TOKENS // 4)
    assert torch.equal(logits, right[TOKENS // 4])
    without_slot = E - int(E * float(share.strip("%")) / 100)
    assert stats.hits + stats.misses > 3 * LAYERS * E, "a chunk needs nearly all of them"
    assert LAYERS * E <= stats.misses <= LAYERS * (E + 3 * without_slot)
    assert stats.bytes_read <= 1.02 * LAYERS * (E + 3 * without_slot) * EXPERT_BYTES
