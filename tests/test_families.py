"""Every family of mixture-of-experts models gives the same result offloaded as it does in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import (
    ADAPTER_FAMILIES,
    FAMILIES,
    HOOK_FAMILIES,
    OUTSIDE_EXPERTS_CLASSES,
    SUPPORTED_FAMILIES,
    UNSUPPORTED_FAMILIES,
    Specimen,
    Zoo,
    build,
    expert_parameter_names,
    experts_modules,
    greedy_tokens,
    inputs_for,
    logits,
    model_class,
    plain_load,
    save,
    stacked_parameters,
    support_table,
    tiny_config,
    transpose_fused_experts,
    use_eager_experts,
    zoo_at,
)
from torch import nn

import moert

# Sums of an expert's products may be ordered otherwise than in eager mode; everything else is the same arithmetic.
RELATIVE_TOLERANCE = 1e-5

LAYOUT_FAMILIES = tuple(
    family
    for family in (
        "dbrx",
        "deepseek_v3",
        "ernie4_5_vl_moe",
        "gpt_oss",
        "granitemoe",
        "inkling2",
        "jamba",
        "longcat_flash",
        "minimax_m3_vl+vl",
        "mixtral",
        "nemotron_h",
        "qwen3_moe",
        "qwen3_vl_moe",
        "step3p7",
    )
    if family in FAMILIES
)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return zoo_at(tmp_path_factory.getbasetemp() / "families")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_results(model: Any, specimen: Specimen) -> None:
    error = relative_error(logits(model, specimen.inputs), specimen.logits)
    assert error <= RELATIVE_TOLERANCE, f"logits differ by {error:.2e} of the largest"
    assert torch.equal(greedy_tokens(model, specimen.inputs), specimen.tokens)


def assert_offloaded(model: Any, specimen: Specimen, share: float) -> None:
    stats = moert.stats(model).as_dict()
    assert stats["hits"] + stats["misses"] > 0
    assert 0 < stats["resident_bytes"] <= share * specimen.expert_bytes
    assert not expert_parameter_names(specimen.model) & set(model.state_dict())


def assert_dense_weights_loaded(model: nn.Module, specimen: Specimen) -> None:
    expected = specimen.model.state_dict()
    for name in expert_parameter_names(specimen.model):
        del expected[name]
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.is_meta] == []


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="counted in transformers 5.23")
def test_zoo_holds_every_family_of_the_experts_hook() -> None:
    assert len(HOOK_FAMILIES) == 64
    assert len(FAMILIES) == 64 + 9 + 3 + 5


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_zoo_specimen_is_sound(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family)
    made = build(family)
    assert torch.isfinite(specimen.logits).all()
    assert torch.equal(logits(specimen.model, specimen.inputs), specimen.logits), "forward is not deterministic"
    assert relative_error(logits(made, inputs_for(family, made)), specimen.logits) < 1e-6, "saving changed the model"
    assert relative_error(specimen.silent_logits, specimen.logits) > 0.05, "experts do not matter"
    assert set(calls_of(specimen)) == {name for name, _ in experts_modules(specimen.model)}, (
        "an experts module never ran"
    )
    assert specimen.tokens.shape[0] == specimen.logits.shape[0]


def calls_of(specimen: Specimen) -> dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """What each experts module was called with in one forward, and what it returned."""
    calls: dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, output, path=path: calls.update({path: (args, output)}))
        for path, module in experts_modules(specimen.model)
    ]
    logits(specimen.model, specimen.inputs)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4", "dbrx"])
def test_zoo_builds_depend_on_the_seed_alone(family: str) -> None:
    first, again, other = build(family), build(family), build(family, seed=1)
    weights = first.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
    assert not all(torch.equal(weights[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.skipif("longcat_flash" not in FAMILIES, reason="not in this transformers")
def test_zoo_longcat_flash_picks_zero_computation_experts(zoo: Zoo) -> None:
    specimen = zoo.specimen("longcat_flash")
    experts = dict(experts_modules(specimen.model))
    for path, ((_, ids, _), _) in calls_of(specimen).items():
        routed = experts[path].num_routed_experts
        assert (ids >= routed).any()
        assert (ids < routed).any()


@pytest.mark.skipif("step3p7" not in FAMILIES, reason="not in this transformers")
def test_zoo_step3p7_limits_clamp(zoo: Zoo) -> None:
    model = zoo.fresh("step3p7")
    limits = [module.limit for _, module in experts_modules(model)]
    assert len(set(limits)) == 3
    for _, module in experts_modules(model):
        module.limit = float("inf")
    specimen = zoo.specimen("step3p7")
    assert relative_error(logits(model, specimen.inputs), specimen.logits) > 0.05


def test_zoo_support_table_has_a_row_a_family() -> None:
    rows = support_table()
    assert tuple(row.family for row in rows) == FAMILIES
    assert all(row.experts_class for row in rows)
    assert {row.family for row in rows if not row.supported} == set(UNSUPPORTED_FAMILIES)


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
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert torch.equal(logits(model, specimen.inputs), specimen.logits)
    save(model, tmp_path)
    assert torch.equal(logits(plain_load(family, tmp_path), specimen.inputs), specimen.logits)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_load_in_bf16_keeps_each_experts_dtype(family: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family, torch.bfloat16)
    model = moert.load(specimen.path, host_memory="25%", dtype=torch.bfloat16)
    try:
        assert_dense_weights_loaded(model, specimen)
        calls = calls_of(specimen)
        assert calls
        for path, (arguments, expected) in calls.items():
            with torch.no_grad():
                found = model.get_submodule(path)(*arguments)
            assert found.dtype == expected.dtype
            assert relative_error(found.float(), expected.float()) <= 2**-6
    finally:
        moert.close(model)


def assert_same_objects(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    assert [name for name, value in expected.items() if found[name] is not value] == []


def test_patch_is_undone_when_its_block_ends(zoo: Zoo) -> None:
    specimen = zoo.specimen("qwen3_moe")
    model = zoo.fresh("qwen3_moe")
    modules = dict(model.named_modules())
    with moert.patch(model, host_memory="25%") as patched:
        assert patched is model
        assert_offloaded_forward(model, specimen)
    assert_same_objects(dict(model.named_modules()), modules)
    with pytest.raises(KeyError, match="out of the block"), moert.patch(model, host_memory="25%"):
        raise KeyError("out of the block")
    assert_same_objects(dict(model.named_modules()), modules)
    assert torch.equal(logits(model, specimen.inputs), specimen.logits)


def assert_offloaded_forward(model: Any, specimen: Specimen) -> None:
    assert relative_error(logits(model, specimen.inputs), specimen.logits) <= RELATIVE_TOLERANCE
    assert moert.stats(model).as_dict()["misses"] > 0


def load_and_compare(path: Path, specimen: Specimen) -> None:
    reference = plain_load(specimen.family, path)
    expected = logits(reference, specimen.inputs)
    model = moert.load(path, host_memory="25%", dtype=torch.float32)
    try:
        assert_dense_weights_loaded(model, specimen)
        assert relative_error(logits(model, specimen.inputs), expected) <= RELATIVE_TOLERANCE
        assert_offloaded(model, specimen, share=0.25)
    finally:
        moert.close(model)


@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_load_reads_fused_names(family: str, zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen(family)
    save(specimen.model, tmp_path, fused=True)
    load_and_compare(tmp_path, specimen)


@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
def test_load_reads_shards(family: str, zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen(family)
    save(specimen.model, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    load_and_compare(tmp_path, specimen)


@pytest.mark.parametrize(("family", "field"), [("qwen3_moe", "num_experts"), ("ernie4_5_vl_moe", "moe_num_experts")])
def test_load_takes_expert_2_before_expert_10(family: str, field: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    setattr(config.get_text_config(), field, 12)
    made = build(family, config=config)
    assert {module.num_experts for _, module in experts_modules(made)} == {12}
    save(made, tmp_path)
    inputs = inputs_for(family, made)
    model = moert.load(tmp_path, host_memory="25%", dtype=torch.float32)
    try:
        assert relative_error(logits(model, inputs), logits(made, inputs)) <= RELATIVE_TOLERANCE
    finally:
        moert.close(model)


@pytest.mark.parametrize("shard_bytes", [None, 100_000])
def test_load_reads_fused_experts_stored_transposed(shard_bytes: int | None, zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen("qwen3_vl_moe")
    save(specimen.model, tmp_path, shard_bytes=shard_bytes)
    transpose_fused_experts(tmp_path)
    load_and_compare(tmp_path, specimen)


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


@pytest.mark.parametrize("family", ADAPTER_FAMILIES)
def test_family_outside_the_hook_has_its_experts_found(family: str, zoo: Zoo) -> None:
    experts = experts_modules(zoo.specimen(family).model)
    assert {type(module).__name__ for _, module in experts} == {OUTSIDE_EXPERTS_CLASSES[family]}
    assert all(stacked_parameters(module) for _, module in experts)
