"""Ways in which real families and checkpoints break a generic loader, each guarded by a test of its own."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import (
    Zoo,
    all_configs,
    experts_modules,
    logits,
    plain_load,
    save,
)
from families.checks import (
    BF16_TOLERANCE,
    RELATIVE_TOLERANCE,
    assert_same_logits,
    calls_of,
    experts_paths,
    relative_error,
)

import moert
from moert.hf.reference import round_as_moert

Loader = Callable[..., Any]


# 1. Initialising the weights that a checkpoint lacks must not reach for experts that are not there.


def test_init_weights_of_qwen3_omni_meets_no_experts(load: Loader, zoo: Zoo, tmp_path: Path) -> None:
    save(zoo.specimen("qwen3_omni_moe").model, tmp_path)
    forget_tensor(tmp_path, "layers.1.mlp.gate.weight")
    with torch.random.fork_rng():
        model = load(tmp_path)
    assert torch.isfinite(logits(model, zoo.specimen("qwen3_omni_moe").inputs)).all()


def forget_tensor(path: Path, suffix: str) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith(suffix))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def test_init_weights_finds_no_experts_class_to_fill(load: Loader, zoo: Zoo) -> None:
    experts_class = type(experts_modules(zoo.specimen("qwen3_moe").model)[0][1])
    assert not [name for name, m in load("qwen3_moe").named_modules() if isinstance(m, experts_class)]


# 2. Tied experts are one set of experts.


def test_tied_experts_of_diffusion_gemma_are_kept_once(load: Loader, zoo: Zoo) -> None:
    specimen = zoo.specimen("diffusion_gemma")
    model = load("diffusion_gemma", host_memory="100%", preload=False)
    assert_same_logits(model, specimen)
    stats = moert.stats(model).as_dict()
    distinct = 8 * len(experts_modules(specimen.model)) // 2
    assert stats["expert_bytes"] == specimen.expert_bytes
    assert stats["misses"] <= distinct
    assert stats["resident_bytes"] <= specimen.expert_bytes


def test_tied_experts_of_diffusion_gemma_are_kept_once_when_patched(zoo: Zoo) -> None:
    specimen = zoo.specimen("diffusion_gemma")
    model = zoo.fresh("diffusion_gemma")
    with moert.patch(model, host_memory="50%"):
        assert_same_logits(model, specimen)
        assert moert.stats(model).as_dict()["resident_bytes"] <= specimen.expert_bytes // 2


# 3. `config._is_quantized` changes what some classes compute.


@pytest.mark.parametrize("family", ["jamba", "qwen3_moe", "gemma4+vl", "qwen3_omni_moe"])
def test_no_config_says_that_the_model_is_quantized(family: str, load: Loader) -> None:
    model = load(family)
    configs = {id(config): config for config in all_configs(model.config)}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            configs[id(config)] = config
    assert [type(config).__name__ for config in configs.values() if hasattr(config, "_is_quantized")] == []


def test_jamba_in_bf16_computes_what_it_does_unpatched(load: Loader, zoo: Zoo) -> None:
    specimen = zoo.specimen("jamba", torch.bfloat16)
    model = load("jamba", dtype=torch.bfloat16, dense_kernels=False)
    first = experts_paths(specimen.model)[0]
    expected = calls_of(specimen.model, specimen.inputs, [first])[first].hidden
    found = calls_of(model, specimen.inputs, [first])[first].hidden
    assert torch.equal(found, expected), "the layers before the first experts computed something else"
    reference = zoo.fresh("jamba", torch.bfloat16)
    assert round_as_moert(reference, dense_kernels=False) is not None
    assert relative_error(logits(model, specimen.inputs), logits(reference, specimen.inputs)) <= BF16_TOLERANCE


# 4. Checkpoints that are quantized already.


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
        ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
        ("mixtral", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ],
)
def test_quantized_checkpoint_is_refused(family: str, quantization: dict[str, Any], zoo: Zoo, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(zoo.specimen(family).path, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(moert.UnsupportedModelError, match=quantization["quant_method"]):
        moert.load(path, host_memory="25%")


# 5. Expert tensors are neither missing nor unexpected: nothing to alarm the user with.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "ernie4_5_vl_moe", "diffusion_gemma", "longcat_flash"])
def test_loading_reports_no_expert_keys(family: str, zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    specimen = zoo.specimen(family)
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO, logger="transformers"):
            model, report = type(specimen.model).from_pretrained(
                specimen.path,
                quantization_config=moert.OffloadConfig(host_memory="25%"),
                dtype=torch.float32,
                output_loading_info=True,
            )
    finally:
        transformers.logging.disable_propagation()
    try:
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        assert not [r.getMessage() for r in caplog.records if "UNEXPECTED" in r.getMessage()]
        assert not [r.getMessage() for r in caplog.records if "MISSING" in r.getMessage()]
        assert_same_logits(model.eval(), specimen)
    finally:
        moert.close(model)


# 14. and 15. Loads that would go round the experts modules, or cut them up, are refused.


@pytest.mark.parametrize(
    "option",
    [
        {"use_kernels": True},
        {"gguf_file": "model.gguf"},
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"device_mesh": object()},
    ],
    ids=lambda option: next(iter(option)),
)
def test_load_refuses_what_goes_round_the_experts(option: dict[str, Any], zoo: Zoo) -> None:
    (name,) = option
    with pytest.raises(moert.MoertError, match=name):
        moert.load(zoo.specimen("gpt_oss").path, host_memory="25%", **option)


def test_load_refuses_expert_parallelism(zoo: Zoo) -> None:
    from transformers.distributed.configuration_utils import DistributedConfig

    with pytest.raises(moert.MoertError, match=r"expert.parallel|distributed_config"):
        moert.load(
            zoo.specimen("gpt_oss").path,
            host_memory="25%",
            distributed_config=DistributedConfig(enable_expert_parallel=True),
        )


def test_load_refuses_a_second_quantization(zoo: Zoo) -> None:
    with pytest.raises(moert.MoertError, match="quantization_config"):
        moert.load(
            zoo.specimen("qwen3_moe").path,
            host_memory="25%",
            quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        )


# 16. A model whose experts are elsewhere must not be saved without them.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("route", ["load", "patch"])
def test_save_pretrained_never_writes_a_checkpoint_without_experts(
    family: str, route: str, zoo: Zoo, load: Loader, tmp_path: Path
) -> None:
    specimen = zoo.specimen(family)
    model = load(family) if route == "load" else moert.patch(zoo.fresh(family), host_memory="25%")
    try:
        model.save_pretrained(tmp_path)
    except (moert.MoertError, ValueError) as error:
        assert "moert" in str(error) or "expert" in str(error)  # noqa: PT017
        assert not list(tmp_path.glob("*.safetensors"))
    else:
        assert torch.equal(logits(plain_load(family, tmp_path), specimen.inputs), specimen.logits)
    assert_same_logits(model, specimen)


def test_a_state_dict_without_experts_says_so(zoo: Zoo) -> None:
    model = zoo.fresh("olmoe", torch.float32)
    names = list(model.state_dict())
    with (
        moert.patch(model, host_memory="50%"),
        pytest.warns(RuntimeWarning, match=r"state_dict\(\) of this model is without its experts.*unpatch"),
    ):
        found = list(model.state_dict())
    assert found == [name for name in names if ".experts." not in name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(model.state_dict()) == names


def test_unpatched_model_saves_what_it_was(zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen("qwen3_moe")
    model = moert.unpatch(moert.patch(zoo.fresh("qwen3_moe"), host_memory="25%"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(plain_load("qwen3_moe", tmp_path), specimen.inputs), specimen.logits)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
@pytest.mark.parametrize("route", ["load", "patch"])
def test_casting_an_offloaded_model_works_or_says_why_not(
    cast: Callable[[Any], Any], route: str, zoo: Zoo, load: Loader
) -> None:
    specimen = zoo.specimen("qwen3_moe")
    model = load("qwen3_moe") if route == "load" else moert.patch(zoo.fresh("qwen3_moe"), host_memory="25%")
    try:
        cast(model)
        found = logits(model, specimen.inputs)
    except (moert.MoertError, ValueError) as error:
        assert "dtype" in str(error) or "cast" in str(error)  # noqa: PT017
    else:
        expected = logits(cast(zoo.fresh("qwen3_moe")), specimen.inputs)
        assert relative_error(found, expected) <= BF16_TOLERANCE


# Training is not served, and says so.


@pytest.mark.parametrize("route", ["load", "patch"])
def test_backward_through_offloaded_experts_is_refused(route: str, zoo: Zoo, load: Loader) -> None:
    specimen = zoo.specimen("qwen3_moe")
    model = load("qwen3_moe") if route == "load" else moert.patch(zoo.fresh("qwen3_moe"), host_memory="25%")
    scores = model(**specimen.inputs).logits
    assert relative_error(scores.detach(), specimen.logits) <= RELATIVE_TOLERANCE
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    scores = model(**specimen.inputs).logits
    with pytest.raises(RuntimeError, match=r"moert|offloaded|expert"):
        scores.sum().backward()
