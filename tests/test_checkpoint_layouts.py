"""The ways in which one family's checkpoints differ on disk: fused or not, in shards, transposed, many experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    LAYOUT_FAMILIES,
    Specimen,
    Zoo,
    build,
    experts_modules,
    inputs_for,
    logits,
    plain_load,
    save,
    tiny_config,
    transpose_fused_experts,
)
from families.checks import (
    BF16_TOLERANCE,
    RELATIVE_TOLERANCE,
    assert_dense_weights_loaded,
    assert_offloaded,
    calls_of,
    experts_paths,
    relative_error,
)

import moert


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


@pytest.mark.parametrize("shard_bytes", [None, 100_000])
def test_load_reads_fused_experts_stored_transposed(shard_bytes: int | None, zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen("qwen3_vl_moe")
    save(specimen.model, tmp_path, shard_bytes=shard_bytes)
    transpose_fused_experts(tmp_path)
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


@pytest.mark.parametrize("family", LAYOUT_FAMILIES)
@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]
)
def test_load_casts_experts_to_the_dtype_asked_for(family: str, stored: str, asked: str, zoo: Zoo) -> None:
    path = zoo.specimen(family, getattr(torch, stored)).path
    reference = plain_load(family, path, getattr(torch, asked))
    inputs = inputs_for(family, reference)
    model = moert.load(path, host_memory="25%", dtype=asked)
    try:
        tolerance = RELATIVE_TOLERANCE if asked == "float32" else BF16_TOLERANCE
        for name, call in calls_of(reference, inputs, experts_paths(reference)).items():
            with torch.no_grad():
                found = model.get_submodule(name)(*call.arguments)
            assert found.dtype == call.output.dtype
            assert relative_error(found.float(), call.output.float()) <= tolerance
    finally:
        moert.close(model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}], ids=["no dtype", "auto"])
def test_load_keeps_the_dtype_of_the_checkpoint(stored: torch.dtype, options: dict[str, Any], zoo: Zoo) -> None:
    specimen = zoo.specimen("qwen3_moe", stored)
    model = moert.load(specimen.path, host_memory="25%", **options)
    try:
        assert model.dtype == stored
        assert_dense_weights_loaded(model, specimen)
        assert moert.stats(model).as_dict()["expert_bytes"] == specimen.expert_bytes
        assert logits(model, specimen.inputs).isfinite().all()
    finally:
        moert.close(model)
