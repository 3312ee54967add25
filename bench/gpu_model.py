"""A whole model on the GPU, as transformers runs it and patched: a prompt, and tokens one by one by `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_layers import Setting
from gpu_results import Rows

import moert
from moert.runtime import device_layer


def run(setting: Setting, rows: Rows) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape, dry = setting.shape, setting.is_dry
    if dry:
        device_layer.DEVICE_TYPES.add("cpu")
    layers, prompt, new = (2, 9, 2) if dry else (8, 2048, 64)
    config = Qwen3MoeConfig(
        vocab_size=128 if dry else 32768,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        num_hidden_layers=layers,
        num_attention_heads=4 if dry else 32,
        num_key_value_heads=4,
        head_dim=16 if dry else 128,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if dry else torch.bfloat16
    with torch.device(setting.device):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=dtype).eval()
        ids = torch.randint(0, config.vocab_size, (1, prompt))
    kept: dict[str, torch.Tensor] = {}
    times: dict[str, tuple[float, float]] = {}
    for name in ("grouped_mm", "batched_mm", "moert"):
        if name == "moert":
            moert.patch(model)
        else:
            model.config._experts_implementation = name
        # Its copies of weights for a long prompt would not fit.
        long = name != "batched_mm"
        inputs = ids if long else ids[:, :16]
        _generate(model, inputs, new, setting)
        first_s, tokens = _generate(model, inputs, 1, setting)
        both_s, tokens = _generate(model, inputs, new, setting)
        times[name] = first_s, (both_s - first_s) / (new - 1)
        if long:
            kept[name] = tokens
            rows.add(f"{name}, {prompt} tokens of prompt and one more", 1e3 * first_s, "ms")
        rows.add(f"{name}, a token by generate, {layers} layers", 1e3 * times[name][1], "ms")
    same = int((kept["moert"] == kept["grouped_mm"]).int().cumprod(1).sum())
    rows.add(f"first tokens that are those of grouped_mm, of {new}", float(same), "tokens", dtype=str(dtype))
    for part, place in (("prompt", 0), ("token", 1)):
        ratio = times["grouped_mm"][place] / times["moert"][place]
        rows.add(f"grouped_mm over moert.patch, a {part}", ratio, "x", goal="end to end")
    stats = moert.stats(model)
    rows.add("layers that run the model's own code", float(sum(bool(one.fallback) for one in stats.layers)), "layers")
    moert.unpatch(model)


def _generate(model: Any, ids: torch.Tensor, new: int, setting: Setting) -> tuple[float, torch.Tensor]:
    if not setting.is_dry:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    if not setting.is_dry:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, out[:, ids.shape[1] :]
