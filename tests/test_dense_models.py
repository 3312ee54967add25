"""Dense layers of whole models computed by moert's kernels: by option, at every budget, and all of it undone."""

from __future__ import annotations

import copy
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_support import HALVES, ROUNDING, Calls, exact, numbers
from families import Zoo, logits
from families.checks import assert_same_objects
from torch import nn

import moert
from moert.hf.dense_compute import DenseForward, count
from moert.hf.own_forward import OwnForward
from moert.hf.reference import Products, round_as_moert
from moert.hf.routers import RouterForward

FAMILY = "qwen3_moe"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("dtype", HALVES)
def test_model_is_what_transformers_computes_and_undone(dtype: torch.dtype, zoo: Zoo, calls: Calls) -> None:
    specimen = zoo.specimen(FAMILY, dtype)
    model = zoo.fresh(FAMILY, dtype)
    modules = dict(model.named_modules())
    linears = {path: module for path, module in modules.items() if type(module) is nn.Linear}
    attributes = {path: set(vars(module)) for path, module in linears.items()}
    before = logits(model, specimen.inputs)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: inputs.update({path: args[0]}))
        for path, module in linears.items()
    ]
    moert.patch(model, host_memory="25%")
    assert count(model) == len(linears) > 8
    routers = count(model, RouterForward)
    assert routers == model.config.num_hidden_layers
    assert calls.during(lambda: logits(model, specimen.inputs)) == len(linears) + routers
    for path, module in linears.items():
        with torch.no_grad():
            found, expected = module(inputs[path]).double(), exact(module, inputs[path])
        scale = expected.abs() + 2**-16 * (inputs[path].double().abs() @ module.weight.double().abs().T)
        assert ((found - expected).abs() <= ROUNDING[dtype] * scale).all(), path
    for hook in hooks:
        hook.remove()
    moert.unpatch(model)
    assert_same_objects(dict(model.named_modules()), modules)
    assert {path: set(vars(module)) for path, module in linears.items()} == attributes
    assert torch.equal(logits(model, specimen.inputs), before)


@pytest.mark.parametrize("dtype", HALVES)
def test_same_bits_at_every_repeat_and_budget(dtype: torch.dtype, zoo: Zoo) -> None:
    specimen = zoo.specimen(FAMILY, dtype)
    prompts = [specimen.inputs, {"input_ids": specimen.inputs["input_ids"][:1, :1]}]
    found = []
    for budget in ("25%", "100%"):
        with moert.load(specimen.path, host_memory=budget, dtype=dtype) as model:
            assert count(model) > 8
            found += [[logits(model, prompt) for prompt in prompts] for _ in range(3)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("route", ["load", "patch"])
@pytest.mark.parametrize("wanted", [None, True, False])
def test_option(route: str, wanted: bool | None, zoo: Zoo, calls: Calls) -> None:
    specimen = zoo.specimen(FAMILY, torch.bfloat16)
    options: dict[str, Any] = {"host_memory": "25%", "dense_kernels": wanted}
    if route == "load":
        model = moert.load(specimen.path, dtype=torch.bfloat16, **options)
    else:
        model = moert.patch(zoo.fresh(FAMILY, torch.bfloat16), **options)
    try:
        asked = calls.during(lambda: logits(model, specimen.inputs))
        assert (asked > 0) == (count(model) > 0) == (wanted is not False)
        moert.unpatch(model)
        assert count(model, OwnForward) == 0
        assert calls.during(lambda: logits(model, specimen.inputs)) == 0
    finally:
        if count(model):
            moert.close(model)


def test_option_of_another_kind_is_refused() -> None:
    with pytest.raises(moert.ConfigError, match="dense_kernels"):
        moert.OffloadConfig(dense_kernels="auto")


def test_fp32_models_are_left_alone(zoo: Zoo) -> None:
    with moert.patch(zoo.fresh(FAMILY), host_memory="50%") as model:
        assert count(model, OwnForward) == 0


def move_by_one_byte(path: Path) -> None:
    """Have the numbers of a safetensors file begin at an odd place, as the format allows."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 + len(header) % 2)
    assert len(header) % 2 == 1
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def test_weights_at_odd_addresses_are_left_to_torch(zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen(FAMILY, torch.bfloat16)
    shutil.copytree(specimen.path, tmp_path / "odd")
    for path in (tmp_path / "odd").glob("*.safetensors"):
        move_by_one_byte(path)
    prompts = [specimen.inputs, {"input_ids": specimen.inputs["input_ids"][:1, :1]}]
    model = type(specimen.model).from_pretrained(tmp_path / "odd", dtype=torch.bfloat16).eval()
    assert model.lm_head.weight.data_ptr() % 2 == 1, "the reader of safetensors copies by now"
    before = [logits(model, prompt) for prompt in prompts]
    with pytest.warns(RuntimeWarning, match=r"linear layers stay torch's.* begin at odd addresses"):
        moert.patch(model)
    assert count(model, OwnForward) == 0
    for prompt, expected in zip(prompts, before, strict=True):
        assert (logits(model, prompt) - expected).norm() < 0.05 * expected.norm()
    moert.unpatch(model)
    with moert.load(tmp_path / "odd", dtype=torch.bfloat16) as loaded:
        assert count(loaded) > 8
        found = [logits(loaded, prompt) for prompt in prompts]
    with moert.load(specimen.path, dtype=torch.bfloat16) as even:
        assert all(torch.equal(logits(even, prompt), y) for prompt, y in zip(prompts, found, strict=True))


def test_patch_that_fails_takes_nothing(zoo: Zoo) -> None:
    model = zoo.fresh(FAMILY, torch.bfloat16)
    with pytest.raises(moert.CapacityError):
        moert.patch(model, host_memory="1KiB")
    assert count(model) == 0


def test_tied_head_and_embedding_stay_tied(calls: Calls) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).bfloat16().eval()
    inputs = {"input_ids": torch.tensor([[3, 5, 8]])}
    moert.patch(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(vars(model.lm_head)["forward"], DenseForward)
    first = logits(model, inputs)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert not torch.equal(logits(model, inputs), first)
    assert not logits(model, inputs).any()
    moert.unpatch(model)


def test_saved_after_unpatch_it_is_the_checkpoint(zoo: Zoo, tmp_path: Any) -> None:
    specimen = zoo.specimen(FAMILY, torch.bfloat16)
    model = moert.unpatch(moert.patch(zoo.fresh(FAMILY, torch.bfloat16), host_memory="50%"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    expected = specimen.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_offloaded_model_refuses_copies_and_its_layers_do_not(zoo: Zoo) -> None:
    with moert.patch(zoo.fresh(FAMILY, torch.bfloat16), host_memory="50%") as model:
        with pytest.raises(moert.MoertError, match="copied"):
            copy.deepcopy(model)
        attention = model.model.layers[0].self_attn
        x = numbers(2, attention.q_proj.in_features)
        with torch.no_grad():
            copied = copy.deepcopy(attention)
            assert torch.equal(copied.q_proj(x), attention.q_proj(x))


def test_reference_of_verify_uses_the_same_products(zoo: Zoo, calls: Calls) -> None:
    specimen = zoo.specimen(FAMILY, torch.bfloat16)
    plain = zoo.fresh(FAMILY, torch.bfloat16)
    products = round_as_moert(plain)
    assert isinstance(products, Products)
    with moert.load(specimen.path, host_memory="25%", dtype=torch.bfloat16) as model:
        assert count(plain) == count(model) > 8
        layers = {path: module for path, module in plain.named_modules() if isinstance(module, nn.Linear)}
        for rows in (1, 5, 24):
            for path, layer in layers.items():
                before, x = products.compared, numbers(rows, layer.in_features)
                with torch.no_grad():
                    assert torch.equal(layer(x), model.get_submodule(path)(x))
                assert products.compared == before + 1
    assert products.largest_error_ulps <= 1
    other = zoo.fresh(FAMILY, torch.bfloat16)
    round_as_moert(other, dense_kernels=False)
    assert count(other) == 0
