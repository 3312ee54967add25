"""Every family of mixture-of-experts models gives the same result offloaded as it does in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import (
    LAYOUT_FAMILIES,
    OUTSIDE_EXPERTS_CLASSES,
    SUPPORTED_FAMILIES,
    UNSUPPORTED_FAMILIES,
    Zoo,
    build,
    experts_modules,
    inputs_for,
    logits,
    model_class,
    plain_load,
    save,
    tiny_config,
    use_eager_experts,
)
from families.checks import (
    BF16_TOLERANCE,
    RELATIVE_TOLERANCE,
    assert_dense_weights_loaded,
    assert_offloaded,
    assert_same_logits,
    assert_same_objects,
    assert_same_results,
    calls_of,
    experts_paths,
    relative_error,
)

import moert

QUICK_IN_BF16 = {
    "olmoe",
    "qwen3_moe",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "glm4_moe",
    "dbrx",
    "longcat_flash",
    "step3p7",
    "diffusion_gemma",
}
"""Families of different kinds; in bf16 the others are left to the slow tests."""


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_load_is_transparent(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family)
    model = moert.load(specimen.path, host_memory="25%", dtype=torch.float32)
    try:
        assert isinstance(model, model_class(family))
        assert not model.training
        assert_dense_weights_loaded(model, specimen)
        assert_same_results(model, specimen)
        assert_offloaded(model, specimen, share=0.25)
    finally:
        moert.close(model)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in QUICK_IN_BF16 else pytest.mark.slow) for family in SUPPORTED_FAMILIES],
)
def test_measuring_memory_leaves_the_model_as_it_is(family: str, zoo: Zoo) -> None:
    """The KV cache is found out by running a copy of the model without weights."""
    specimen = zoo.specimen(family)
    model = moert.load(specimen.path, dtype=torch.float32)
    try:
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert_dense_weights_loaded(model, specimen)
        assert_same_results(model, specimen)
    finally:
        moert.close(model)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in QUICK_IN_BF16 else pytest.mark.slow) for family in SUPPORTED_FAMILIES],
)
def test_load_in_bf16_keeps_each_experts_dtype(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family, torch.bfloat16)
    model = moert.load(specimen.path, host_memory="25%", dtype=torch.bfloat16)
    try:
        assert_dense_weights_loaded(model, specimen)
        calls = calls_of(specimen.model, specimen.inputs, experts_paths(specimen.model))
        assert calls
        for path, call in calls.items():
            with torch.no_grad():
                found = model.get_submodule(path)(*call.arguments)
            assert found.dtype == call.output.dtype
            assert relative_error(found.float(), call.output.float()) <= BF16_TOLERANCE
    finally:
        moert.close(model)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_load_gives_the_same_bits_with_any_budget(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family)
    found = []
    for budget in ("25%", "50%", "100%"):
        model = moert.load(specimen.path, host_memory=budget, dtype=torch.float32)
        try:
            found.append(logits(model, specimen.inputs))
        finally:
            moert.close(model)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sums_over_many_picks_do_not_depend_on_which_expert_was_there_first(tmp_path: Path) -> None:
    # Two picks would not tell: a + b is b + a.
    config = tiny_config("qwen3_moe")
    config.num_experts, config.num_experts_per_tok = 16, 7
    made = build("qwen3_moe", config=config)
    save(made, tmp_path)
    inputs = inputs_for("qwen3_moe", made)
    expected = logits(made, inputs)
    found = []
    for budget in ("45%", "60%", "80%", "100%"):
        model = moert.load(tmp_path, host_memory=budget, dtype=torch.float32)
        try:
            # Other experts are resident at each.
            found += [logits(model, inputs) for _ in range(3)]
        finally:
            moert.close(model)
    assert relative_error(found[0], expected) <= RELATIVE_TOLERANCE
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_patch_is_transparent_and_undone(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family)
    model = zoo.fresh(family)
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))

    assert moert.patch(model, host_memory="25%") is model
    assert_same_results(model, specimen)
    assert_offloaded(model, specimen, share=0.25)

    assert moert.unpatch(model) is model
    assert type(model) is model_class(family)
    assert_same_objects(dict(model.named_modules(remove_duplicate=False)), modules)
    assert_same_objects(dict(model.named_parameters(remove_duplicate=False)), parameters)
    assert_same_objects(dict(model.named_buffers(remove_duplicate=False)), buffers)
    weights = specimen.model.state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])] == []
    assert torch.equal(logits(model, specimen.inputs), specimen.logits)


def test_patch_is_undone_when_its_block_ends(zoo: Zoo) -> None:
    specimen = zoo.specimen("qwen3_moe")
    model = zoo.fresh("qwen3_moe")
    modules = dict(model.named_modules())
    with moert.patch(model, host_memory="25%") as patched:
        assert patched is model
        assert_same_logits(model, specimen)
        assert moert.stats(model).as_dict()["misses"] > 0
    assert_same_objects(dict(model.named_modules()), modules)
    with pytest.raises(KeyError, match="out of the block"), moert.patch(model, host_memory="25%"):
        raise KeyError("out of the block")
    assert_same_objects(dict(model.named_modules()), modules)
    assert torch.equal(logits(model, specimen.inputs), specimen.logits)


@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_patch_gives_the_bits_that_load_does(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family)
    model = moert.load(specimen.path, host_memory="100%", dtype=torch.float32)
    try:
        expected = logits(model, specimen.inputs)
    finally:
        moert.close(model)
    model = zoo.fresh(family)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with moert.patch(model):
        assert torch.equal(logits(model, specimen.inputs), expected)
        assert moert.stats(model).as_dict()["misses"] == 0
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    with moert.patch(model, host_memory="50%"):
        assert torch.equal(logits(model, specimen.inputs), expected)


@pytest.mark.parametrize("family", [*LAYOUT_FAMILIES, "diffusion_gemma"])
def test_unpatch_after_load_gives_what_transformers_loads(family: str, zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen(family)
    model = moert.load(specimen.path, host_memory="25%", dtype=torch.float32)
    assert moert.unpatch(model) is model
    assert type(model) is model_class(family)
    use_eager_experts(model)
    expected, found = specimen.model.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    # LongCat-Flash has rows for its zero-computation experts too, which nothing reads.
    read = {path: getattr(module, "num_routed_experts", None) for path, module in experts_modules(specimen.model)}
    for name, tensor in expected.items():
        rows = read.get(name.rpartition(".")[0])
        assert torch.equal(found[name][:rows] if rows else found[name], tensor[:rows] if rows else tensor), name
    assert torch.equal(logits(model, specimen.inputs), specimen.logits)
    save(model, tmp_path)
    assert torch.equal(logits(plain_load(family, tmp_path), specimen.inputs), specimen.logits)


@pytest.mark.parametrize("family", UNSUPPORTED_FAMILIES)
def test_unsupported_family_is_refused_by_patch(family: str) -> None:
    model = build(family)
    inputs = inputs_for(family, model)
    before = logits(model, inputs)
    modules = dict(model.named_modules())
    with pytest.raises(moert.UnsupportedModelError) as refusal:
        moert.patch(model, host_memory="25%")
    assert_names_class_and_reason(str(refusal.value), family)
    assert_same_objects(dict(model.named_modules()), modules)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("family", UNSUPPORTED_FAMILIES)
def test_unsupported_family_is_refused_by_load(family: str, tmp_path: Path) -> None:
    save(build(family), tmp_path)
    with pytest.raises(moert.UnsupportedModelError) as refusal:
        moert.load(tmp_path, host_memory="25%", dtype=torch.float32)
    assert_names_class_and_reason(str(refusal.value), family)


def assert_names_class_and_reason(message: str, family: str) -> None:
    assert OUTSIDE_EXPERTS_CLASSES[family] in message
    assert len(message.split()) > 8, f"no reason in {message!r}"


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(moert.UnsupportedModelError, match="LlamaForCausalLM"):
        moert.patch(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(moert.UnsupportedModelError, match="LlamaForCausalLM"):
        moert.load(tmp_path)
