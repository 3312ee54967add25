"""The tiny models that the family tests rest on: deterministic, complete, and with experts that matter."""

from __future__ import annotations

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
    Zoo,
    build,
    experts_modules,
    inputs_for,
    logits,
    stacked_parameters,
    support_table,
)
from families.checks import (
    calls_of,
    experts_paths,
    relative_error,
)


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
    paths = experts_paths(specimen.model)
    assert set(calls_of(specimen.model, specimen.inputs, paths)) == set(paths), "some experts never ran"
    assert specimen.tokens.shape[0] == specimen.logits.shape[0]


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
    for path, call in calls_of(specimen.model, specimen.inputs, experts).items():
        routed = experts[path].num_routed_experts
        assert (call.ids >= routed).any()
        assert (call.ids < routed).any()


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


@pytest.mark.parametrize("family", ADAPTER_FAMILIES)
def test_family_outside_the_hook_has_its_experts_found(family: str, zoo: Zoo) -> None:
    experts = experts_modules(zoo.specimen(family).model)
    assert {type(module).__name__ for _, module in experts} == {OUTSIDE_EXPERTS_CLASSES[family]}
    assert all(stacked_parameters(module) for _, module in experts)
