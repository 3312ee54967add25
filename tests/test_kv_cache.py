"""The planned KV cache: against closed forms from configurations, and what models really keep after some tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import SUPPORTED_FAMILIES, build, save, skeleton
from transformers import DynamicCache

from moert.hf.adapters import find_experts
from moert.hf.cache_needs import cache_layers
from moert.hf.model_needs import read_needs
from moert.planning.model import CacheLayer


def tensors(items: Mapping[Any, Any]) -> Iterator[torch.Tensor]:
    for value in items.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors(value)


def skip_unless_supported(family: str) -> None:
    """On a transformers before the one that these lists are of; later ones have all of them."""
    if family not in SUPPORTED_FAMILIES:
        assert tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), f"{family} is gone, or never was"
        pytest.skip(f"this transformers has no {family}")


def kept_bytes(model: Any, batch: int, tokens: int) -> int:
    """After a prompt and three more tokens, `tokens` in all."""
    cache: Any = DynamicCache(config=model.config)
    ids = torch.arange(batch * tokens).reshape(batch, tokens) % 16
    with torch.no_grad():
        model(input_ids=ids[:, :-3], past_key_values=cache, use_cache=True)
        for at in range(tokens - 3, tokens):
            model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors(vars(layer)))


def one_short(layers: tuple[CacheLayer, ...], batch: int, tokens: int) -> int:
    """Of a window transformers keeps one token less, and its length in 8 bytes."""
    windows = [layer for layer in layers if layer.window is not None]
    return sum((batch * layer.bytes_per_token if tokens >= layer.window else 0) - 8 for layer in windows)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("olmoe", torch.bfloat16),  # grouped queries
        ("mixtral", torch.float32),
        ("deepseek_v2", torch.bfloat16),  # latent attention
        ("deepseek_v3", torch.float32),
        ("deepseek_v32", torch.bfloat16),  # with an indexer
        ("glm_moe_dsa", torch.float32),
        ("hy_v4", torch.float32),
        ("dots3_note", torch.float32),  # and windows
        ("gpt_oss", torch.bfloat16),
        ("mimo_v2_flash", torch.float32),
        ("qwen3_next", torch.bfloat16),  # states of fixed size
        ("kimi_linear", torch.float32),
        ("granitemoehybrid", torch.bfloat16),
        ("jamba", torch.float32),
        ("nemotron_h", torch.float32),
        ("lfm2_moe", torch.bfloat16),
        ("bailing_hybrid", torch.float32),
        ("qwen3_5_moe", torch.float32),
        ("gemma4", torch.bfloat16),
        ("longcat_flash", torch.float32),
        ("exaone_moe", torch.float32),
    ],
)
def test_it_is_what_the_model_keeps(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    skip_unless_supported(family)
    model = build(family, dtype=dtype)
    save(model, tmp_path)
    needs = read_needs(tmp_path)
    assert needs.cache is not None, needs.cache_problem
    for batch, tokens in ((1, 6), (2, 41)):
        kept = kept_bytes(model, batch, tokens)
        assert needs.cache_bytes(tokens, batch) == kept + one_short(needs.cache, batch, tokens), (batch, tokens)


def test_entries_for_many_tokens_grow_with_the_text(tmp_path: Path) -> None:
    """One of 4 tokens in two layers, and of 128 in another, whose last tokens wait for theirs."""
    skip_unless_supported("deepseek_v4")
    model = build("deepseek_v4")
    layers = read_needs_of(model, tmp_path)
    width = 16 * 4
    # An indexer has entries of its own.
    assert [layer.unbounded_bytes_per_token for layer in layers] == [-(-width // 128), 2 * width // 4, 2 * width // 4]
    for tokens in (264, 392):
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.zeros((1, tokens), dtype=torch.long), past_key_values=cache, use_cache=True)
        kept = sum(tensor.nbytes for layer in cache.layers for tensor in tensors(vars(layer)))
        planned = sum(layer.nbytes(tokens) for layer in layers)
        # Whole bytes a token are a little more than an entry for 128.
        assert kept <= planned - one_short(layers, 1, tokens) <= kept + tokens


def read_needs_of(model: Any, folder: Path) -> tuple[CacheLayer, ...]:
    save(model, folder)
    needs = read_needs(folder)
    assert needs.cache is not None, needs.cache_problem
    return needs.cache


def test_closed_forms(tmp_path: Path) -> None:
    """Bytes of a token in each layer, and of a state, from the numbers of the configuration alone."""
    model = build("mixtral", dtype=torch.bfloat16)
    config = model.config
    grouped = CacheLayer(2 * config.num_key_value_heads * config.head_dim * 2, config.sliding_window)
    assert read_needs_of(model, tmp_path / "grouped") == (grouped,) * config.num_hidden_layers
    model = build("deepseek_v3")
    config = model.config
    whole = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    # As transformers has it: before it was decompressed or after.
    latent = [CacheLayer(width * 4) for width in (config.kv_lora_rank + config.qk_rope_head_dim, whole)]
    found = read_needs_of(model, tmp_path / "latent")
    assert found[0] in latent
    assert set(found) == {found[0]}
    model = build("granitemoehybrid", dtype=torch.bfloat16)
    config = model.config
    inner = config.mamba_expand * config.hidden_size
    channels = inner + 2 * config.mamba_n_groups * config.mamba_d_state
    state = config.mamba_n_heads * config.mamba_d_head * config.mamba_d_state
    found = read_needs_of(model, tmp_path / "hybrid")
    for layer, kind in zip(found, config.layers_block_type, strict=True):
        if kind in ("mamba", "linear_attention"):
            # The convolution's last inputs, and the state itself in the precision that it is kept in.
            assert layer.bytes_per_token == layer.unbounded_bytes_per_token == 0
            assert layer.fixed_bytes - channels * config.mamba_d_conv * 2 in (2 * state, 4 * state)
        else:
            heads = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
            assert layer == CacheLayer(heads * 2)
    assert len(set(config.layers_block_type)) == 2


@pytest.mark.parametrize(("family", "lengths"), [("jamba", [8]), ("mixtral", [8]), ("deepseek_v32", [8, 264])])
def test_a_longer_text_is_looked_at_only_where_something_else_grows(family: str, lengths: list[int]) -> None:
    """Code of state-space models may go over it token by token."""
    skip_unless_supported(family)
    model = skeleton(family)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True)
    cache_layers(model, [model.get_submodule(path) for path in find_experts(model)])
    assert seen == lengths


def test_a_layer_s_bytes_by_hand() -> None:
    layer = CacheLayer(10, window=100, fixed_bytes=7, unbounded_bytes_per_token=3)
    assert [layer.nbytes(n) for n in (1, 100, 5000)] == [7 + 10 + 3, 7 + 1000 + 300, 7 + 1000 + 15000]
