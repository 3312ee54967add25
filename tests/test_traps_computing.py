"""Ways in which real experts modules break a generic runtime, each guarded by a test of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    HOOK_FAMILIES,
    Zoo,
    build,
    experts_modules,
    inputs_for,
    logits,
    plain_load,
    save,
    tiny_config,
)
from families.checks import (
    BF16_TOLERANCE,
    RELATIVE_TOLERANCE,
    assert_same_logits,
    calls_of,
    experts_paths,
    relative_error,
)
from torch import nn

import moert
from moert.hf.reference import round_as_moert

# (beam's own gate is the default one in fp32; in bf16 it differs, and is among the bf16 tests.)
OWN_GATE_FAMILIES = (
    "deepseek_v4",
    "glm5_next",
    "gpt_oss",
    "hy_v4",
    "inkling2",
    "minimax_m3_vl",
    "openai_privacy_filter",
)

Loader = Callable[..., Any]


def picks_of(stats: dict[str, Any]) -> int:
    """The experts that steps asked for: of a model's stats or of one layer's."""
    return int(stats["hits"] + stats["misses"])


def picks_so_far(model: Any) -> int:
    return picks_of(moert.stats(model).as_dict())


# 6. The activation belongs to the class, and its constants to the instance.


def test_own_gates_are_those_known(zoo: Zoo) -> None:
    found = []
    for family in HOOK_FAMILIES:
        experts = experts_modules(zoo.specimen(family).model)[0][1]
        if type(experts)._apply_gate.__name__ != "_default_apply_gate":
            found.append(family)
    assert set(OWN_GATE_FAMILIES) & set(HOOK_FAMILIES) <= set(found)


@pytest.mark.parametrize("family", OWN_GATE_FAMILIES)
def test_own_gate_of_a_class_is_called(family: str, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen(family)

    def default_gate(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    other = zoo.fresh(family)
    for _, experts in experts_modules(other):
        experts._apply_gate = default_gate.__get__(experts)
    assert relative_error(logits(other, specimen.inputs), specimen.logits) > 0.01, "the gate does not show"
    assert_same_logits(load(family), specimen)


@pytest.mark.parametrize(
    ("family", "constant"), [("gpt_oss", "alpha"), ("gpt_oss", "limit"), ("minimax_m3_vl", "swiglu_limit")]
)
def test_constants_of_a_gate_are_read_from_the_instance(family: str, constant: str, zoo: Zoo) -> None:
    specimen = zoo.specimen(family)
    model = zoo.fresh(family)
    for _, experts in experts_modules(model):
        assert hasattr(experts, constant)
        setattr(experts, constant, 0.3)
    expected = logits(model, specimen.inputs)
    assert relative_error(expected, specimen.logits) > 0.01
    with moert.patch(model, host_memory="25%"):
        assert relative_error(logits(model, specimen.inputs), expected) <= RELATIVE_TOLERANCE


# 7. Routing weights may be wider than the hidden states.


@pytest.mark.parametrize(("family", "weights_dtype"), [("qwen3_moe", torch.bfloat16), ("deepseek_v3", torch.float32)])
def test_experts_of_a_bf16_model_return_bf16(family: str, weights_dtype: torch.dtype, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen(family, torch.bfloat16)
    model = load(family, dtype=torch.bfloat16)
    for path, call in calls_of(specimen.model, specimen.inputs, experts_paths(specimen.model)).items():
        assert call.weights.dtype == weights_dtype
        with torch.no_grad():
            found = model.get_submodule(path)(*call.arguments)
        assert found.dtype == torch.bfloat16
        assert relative_error(found.float(), call.output.float()) <= BF16_TOLERANCE
    # Rounded in other places, a routing that is nearly a tie may go the other way: this one rounds in the same places.
    reference = zoo.fresh(family, torch.bfloat16)
    products = round_as_moert(reference)
    assert relative_error(logits(model, specimen.inputs), logits(reference, specimen.inputs)) <= BF16_TOLERANCE
    assert products is not None
    assert products.largest_error_ulps <= 1


# 8. The width of experts is not the config's hidden size.


def test_experts_narrower_than_the_model_run(zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen("muse_spark")
    path = experts_paths(specimen.model)[0]
    call = calls_of(specimen.model, specimen.inputs, [path])[path]
    assert call.hidden.shape[-1] != specimen.model.config.text_config.hidden_size
    assert_same_logits(load("muse_spark"), specimen)


def test_latent_experts_of_nemotron_h_run(load: Loader, tmp_path: Path) -> None:
    config = tiny_config("nemotron_h")
    config.moe_latent_size = 16
    model = build("nemotron_h", config=config)
    _, experts = experts_modules(model)[0]
    assert experts.down_proj.shape[1] == 16 != config.hidden_size
    save(model, tmp_path)
    inputs = inputs_for("nemotron_h", model)
    expected = logits(plain_load("nemotron_h", tmp_path), inputs)
    assert relative_error(logits(load(tmp_path), inputs), expected) <= RELATIVE_TOLERANCE


@pytest.mark.parametrize("image_tokens", [0, 12], ids=["text alone", "image alone"])
def test_ernie_experts_of_two_widths_run_with_no_tokens_for_one(image_tokens: int, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen("ernie4_5_vl_moe")
    widths = {module.down_proj.shape[-1] for _, module in experts_modules(specimen.model)}
    assert len(widths) == 2
    kinds = torch.zeros_like(specimen.inputs["input_ids"])
    kinds[:, :image_tokens] = 1
    inputs = {**specimen.inputs, "moe_mm_token_type_ids": kinds}
    expected = logits(specimen.model, inputs)
    assert relative_error(logits(load("ernie4_5_vl_moe"), inputs), expected) <= RELATIVE_TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_no_tokens_give_no_rows_and_fetch_nothing(family: str, zoo: Zoo, load: Loader) -> None:
    model = load(family)
    path = experts_paths(zoo.specimen(family).model)[0]
    before = picks_so_far(model)
    none = model.get_submodule(path)(torch.empty(0, 64), torch.empty((0, 2), dtype=torch.int64), torch.empty(0, 2))
    assert none.shape == (0, 64)
    assert picks_so_far(model) == before


# 9. A pick with weight zero is no pick.


@pytest.mark.parametrize("family", ["zaya", "qwen3_moe"])
def test_picks_of_weight_zero_are_not_fetched(family: str, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen(family)
    model = load(family)
    path, experts = experts_modules(specimen.model)[-1]
    hidden, ids, weights = calls_of(specimen.model, specimen.inputs, [path])[path].arguments
    ids, weights = ids.clone(), weights.clone()
    ids[: len(ids) // 2], weights[: len(ids) // 2] = 0, 0.0
    ids[len(ids) // 2 :].clamp_(min=1)
    with torch.no_grad():
        expected = experts(hidden, ids, weights)
        before = picks_so_far(model)
        found = model.get_submodule(path)(hidden, ids, weights)
    assert relative_error(found, expected) <= RELATIVE_TOLERANCE
    assert picks_so_far(model) - before == len(ids[weights != 0].unique())


def test_zaya_skips_experts_without_fetching_them(zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen("zaya")
    needed, skipped = 0, 0
    for call in calls_of(specimen.model, specimen.inputs, experts_paths(specimen.model)).values():
        needed += len(call.ids[call.weights != 0].unique())
        skipped += int((call.weights == 0).sum())
    assert skipped > 0
    model = load("zaya")
    before = picks_so_far(model)
    assert_same_logits(model, specimen)
    assert picks_so_far(model) - before == needed


# 10. Ids that name no expert contribute nothing.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "longcat_flash", "step3p7"])
@pytest.mark.parametrize("route", ["load", "patch"])
def test_ids_of_no_expert_contribute_nothing(family: str, route: str, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen(family)
    path, experts = experts_modules(specimen.model)[-1]
    hidden, ids, weights = calls_of(specimen.model, specimen.inputs, [path])[path].arguments
    past_the_last = getattr(experts, "total_experts", experts.gate_up_proj.shape[0])
    nobody, no_weight = ids.clone(), weights.clone()
    for row, sentinel in enumerate((past_the_last, past_the_last + 5, -1)):
        nobody[row, 0] = sentinel
        no_weight[row, 0] = 0.0
    nobody[3], no_weight[3] = past_the_last, 0.0
    with torch.no_grad():
        expected = experts(hidden, ids, no_weight)
        model = load(family) if route == "load" else moert.patch(zoo.fresh(family), host_memory="25%")
        found = model.get_submodule(path)(hidden, nobody, weights)
    assert relative_error(found, expected) <= RELATIVE_TOLERANCE
    assert not found[3].any()


# 11. What only looks like experts stays dense.


def test_stacked_shared_experts_of_inkling_stay_dense(zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen("inkling")
    shared = {name for name in specimen.model.state_dict() if "shared_experts" in name}
    assert any(specimen.model.state_dict()[name].ndim == 3 for name in shared)
    assert shared <= load("inkling").state_dict().keys()


# 12. Several experts modules in a layer or in a model.


@pytest.mark.parametrize("family", ["ernie4_5_vl_moe", "dots3_note+vl", "qwen3_moe"])
def test_every_experts_module_has_a_cache_named_by_its_path(family: str, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen(family)
    model = load(family)
    assert_same_logits(model, specimen)
    layers = moert.stats(model).as_dict()["layers"]
    assert sorted(layer["name"] for layer in layers) == sorted(experts_paths(specimen.model))
    assert all(picks_of(layer) > 0 for layer in layers)


def test_models_side_by_side_keep_their_experts_apart(zoo: Zoo, load: Loader, tmp_path: Path) -> None:
    other = build("qwen3_moe", seed=3)
    save(other, tmp_path)
    specimen = zoo.specimen("qwen3_moe")
    expected = logits(other, specimen.inputs)
    one, two = load("qwen3_moe"), load(tmp_path)
    assert_same_logits(one, specimen)
    assert relative_error(logits(two, specimen.inputs), expected) <= RELATIVE_TOLERANCE
    assert_same_logits(one, specimen)


# transformers' own ways to run experts have no say over those that are elsewhere.


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_choosing_an_experts_implementation_changes_nothing(implementation: str, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen("qwen3_moe")
    asked = load("qwen3_moe", experts_implementation=implementation)
    assert_same_logits(asked, specimen)
    told = load("qwen3_moe")
    told.set_experts_implementation(implementation)
    assert_same_logits(told, specimen)
    patched = moert.patch(zoo.fresh("qwen3_moe"), host_memory="25%")
    patched.set_experts_implementation(implementation)
    assert_same_logits(patched, specimen)
