"""Where a model's own code runs in place of one call of the kernels, or sees all that it did."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import decoder_support
import pytest
import torch
from decoder_support import PROMPT, Counted, autocast, both_ways, decode, layers_own_code, training
from families import Zoo
from transformers.cache_utils import StaticCache

import moert
from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.dense_compute import count
from moert.hf.self_attention import SelfAttentionForward

counted = decoder_support.counted


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_computes_something_else_is_left_alone(family: str, zoo: Zoo) -> None:
    with moert.patch(zoo.fresh(family, torch.bfloat16), host_memory="100%") as model:
        assert count(model, DecoderLayerForward) == count(model, SelfAttentionForward) == 0


def test_settings_that_are_not_tried_keep_the_code(zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.bfloat16)
    model.config.clip_qkv = 8.0
    with moert.patch(model, host_memory="100%"):
        assert count(model, SelfAttentionForward) == 0
    model = zoo.fresh("granitemoe", torch.bfloat16)
    for layer in model.model.layers:
        layer.residual_multiplier = 0.5
    with moert.patch(model, host_memory="100%"):
        assert count(model, DecoderLayerForward) == 0 < count(model, SelfAttentionForward)


def test_without_dense_kernels(zoo: Zoo) -> None:
    with moert.patch(zoo.fresh("olmoe", torch.bfloat16), host_memory="100%", dense_kernels=False) as model:
        assert count(model, DecoderLayerForward) == count(model, SelfAttentionForward) == 0


HOOKED = [
    "model.layers.1",
    "model.layers.1.input_layernorm",
    "model.layers.1.self_attn",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.q_norm",
    "model.layers.1.post_attention_layernorm",
    "model.layers.1.mlp",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.experts",
]


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_see_what_they_did(path: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(model: Any) -> Any:
        seen: list[Any] = []
        module = model.get_submodule(path)

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [*args, *kwargs.values(), *(output if isinstance(output, tuple) else (output,))]
            seen.extend(value.clone() for value in tensors if isinstance(value, torch.Tensor))

        handle = module.register_forward_hook(look, with_kwargs=True)
        logits = decode(model, steps=2)
        handle.remove()
        return [*seen, logits, decode(model, steps=2)]

    wanted, found = both_ways(zoo.fresh("qwen3_moe", torch.bfloat16), monkeypatch, watch)
    assert len(found) == len(wanted) > 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_hooks_may_change_things(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturb(model: Any) -> Any:
        experts = model.model.layers[1].mlp.experts
        handle = experts.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
        changed = decode(model)
        handle.remove()
        return torch.stack([changed, decode(model)])

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, disturb)
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], found[1])


def test_hooks_on_every_module(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(model: Any) -> Any:
        names: list[str] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: names.append(type(module).__name__)
        )
        try:
            decode(model)
        finally:
            handle.remove()
        return names

    wanted, found = both_ways(zoo.fresh("olmoe", torch.bfloat16), monkeypatch, watch)
    assert found == wanted


def _batch(model: Any) -> torch.Tensor:
    return decode(model, torch.cat([PROMPT, PROMPT.flip(1)]))


def _padded(model: Any) -> torch.Tensor:
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0
    return decode(model, attention_mask=mask)


def _static(model: Any) -> torch.Tensor:
    return decode(model, cache=StaticCache(config=model.config, max_cache_len=32))


def _eager(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    try:
        return decode(model)
    finally:
        model.set_attn_implementation("sdpa")


def _watched(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        PROMPT,
        max_new_tokens=4,
        do_sample=False,
        output_hidden_states=True,
        output_attentions=False,
        return_dict_in_generate=True,
    ).hidden_states[-1][-1]
    return found


@pytest.mark.parametrize("run", [_batch, _padded, _static, _eager, training, autocast, _watched])
def test_what_the_kernels_are_not_for(
    run: Callable[[Any], torch.Tensor], zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, found = both_ways(zoo.fresh("qwen3_moe", torch.bfloat16), monkeypatch, run)
    assert torch.equal(found, wanted)
    if run is not _watched:
        assert counted.take()[1] == 0


def test_sliding_windows(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("mixtral", torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.sliding_window = 4
    wanted, found = both_ways(model, monkeypatch)
    assert torch.equal(found, wanted)
    assert counted.take()[1] == 0


def change_weight_data(model: Any) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.clone() * 2


def change_weight(model: Any) -> None:
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach() * 2)


def change_module(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj, torch.nn.Hardtanh(-0.01, 0.01))


def change_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_forward(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    plain = type(gate).forward
    gate.forward = lambda x: plain(gate, 3 * x)


def change_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 2.0


def change_router(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    gate.weight.data = gate.weight.data.flip(0).clone()


CHANGES = [
    change_weight_data,
    change_weight,
    change_module,
    change_norm,
    change_forward,
    change_scale,
    change_router,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_count(change: Callable[[Any], None], zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for own in (True, False):
        model = zoo.fresh("qwen3_moe", torch.bfloat16)
        with layers_own_code(monkeypatch) if own else nullcontext():
            patched = moert.patch(model, host_memory="100%")
        before = decode(patched)
        change(patched)
        found[own] = decode(patched)
        assert not torch.equal(found[own], before)
        moert.close(patched)
    assert torch.equal(found[True], found[False])


def test_code_of_another_class_runs(zoo: Zoo, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.fresh("mixtral", torch.bfloat16)
    block = type(model.model.layers[0].mlp)
    own = block.forward
    with moert.patch(model, host_memory="100%"):
        before = decode(model)
        monkeypatch.setattr(block, "forward", lambda module, x: own(module, x) * 0.5)
        counted.take()
        assert not torch.equal(decode(model), before)
        assert counted.take()[1] == 0
