"""Packs compute what the checkpoint does, and quantised ones what their decoded weights do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    LAYOUT_FAMILIES,
    Zoo,
    build,
    experts_modules,
    inputs_for,
    logits,
    save,
    tiny_config,
    transpose_fused_experts,
)
from families.checks import (
    assert_dense_weights_loaded,
    assert_offloaded,
    assert_same_results,
    calls_of,
    experts_paths,
    relative_error,
)
from pack_support import IDS, logits_of, make_pack, problems
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import moert
from moert.errors import ConfigError, UnsupportedModelError
from moert.formats import FormatChoice, format_names
from moert.hf.decoded import DecodedCheck
from moert.hf.model import runtime_of
from moert.tiers.safetensors_file import read_header

QUICK = ("dbrx", "ernie4_5_vl_moe", "gpt_oss", "longcat_flash", "mixtral")
QUANTISED = ["int8", "int4", "int4,symmetric=false", "int4,group=128", "int4,group=128,symmetric=false", "fp8", "mxfp4"]

# Weights are compared bit by bit, so this is for the products alone. Those of fp8 take activations as they are. The
# others round them to 8 bits, to within 1/254 of the largest of 32 numbers, for each of two products: half a per cent
# of the typical output each, and these outputs' largest number is 3 to 5 times a typical one.
PRODUCTS = {"fp8": 1e-5}
ROUNDED_PRODUCTS = 0.02


def load(folder: Path, **options: Any) -> Any:
    return moert.load(folder, **{"host_memory": "25%", "dtype": torch.float32, **options})


@pytest.mark.parametrize(
    "family",
    [
        *(family for family in LAYOUT_FAMILIES if family in QUICK),
        "diffusion_gemma",
        *(pytest.param(family, marks=pytest.mark.slow) for family in LAYOUT_FAMILIES if family not in QUICK),
    ],
)
def test_plain_pack_gives_the_bits_of_the_checkpoint(family: str, zoo: Zoo, tmp_path: Path) -> None:
    """Per-expert and stacked checkpoints, transposed ones, biases, tied experts, zero-computation experts."""
    specimen = zoo.specimen(family)
    with load(specimen.path) as model:
        expected = logits(model, specimen.inputs)
        expert_bytes = moert.stats(model).expert_bytes
    made = make_pack(specimen.path, tmp_path / "pack")
    assert made.packed_bytes >= made.expert_bytes == expert_bytes
    assert problems(tmp_path / "pack") == ()
    with load(tmp_path / "pack") as model:
        assert_dense_weights_loaded(model, specimen)
        assert torch.equal(logits(model, specimen.inputs), expected)
        assert_same_results(model, specimen)
        assert_offloaded(model, specimen, share=0.25)
        assert moert.stats(model).expert_bytes == expert_bytes
    dense = sum(entry.nbytes for path in tmp_path.glob("pack/model-*") for entry in read_header(path)[0].values())
    assert dense == made.dense_bytes
    assert dense <= sum(path.stat().st_size for path in specimen.path.glob("*.safetensors")) - expert_bytes


@pytest.mark.parametrize("layout", ["fused", "shards", "transposed on disk"])
def test_plain_pack_of_other_layouts(layout: str, zoo: Zoo, tmp_path: Path) -> None:
    specimen = zoo.specimen("qwen3_vl_moe")
    source = tmp_path / "source"
    save(specimen.model, source, fused=layout == "fused", shard_bytes=100_000 if layout == "shards" else None)
    if layout == "transposed on disk":
        transpose_fused_experts(source)
    make_pack(source, tmp_path / "pack")
    with load(tmp_path / "pack") as model:
        assert_dense_weights_loaded(model, specimen)
        assert_same_results(model, specimen)


def test_pack_in_another_dtype_is_the_cast_of_loading(tiny_olmoe: Path, tmp_path: Path) -> None:
    make_pack(tiny_olmoe, tmp_path / "half", dtype="bfloat16")
    expected = logits_of(tiny_olmoe, IDS, dtype=torch.bfloat16)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits_of(tmp_path / "half", IDS), expected), "the pack's own dtype is the one it was made in"
    make_pack(tiny_olmoe, tmp_path / "full")
    assert torch.equal(logits_of(tmp_path / "full", IDS, dtype=torch.bfloat16), expected), "cast on the way to a slot"


def wide(family: str) -> Any:
    """A model whose rows are multiples of 128."""
    config = tiny_config(family)
    config.hidden_size = 128
    setattr(config, "intermediate_size" if family == "gpt_oss" else "moe_intermediate_size", 128)
    return build(family, config=config)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def model_and_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Of the two layouts: [N, K], and [K, N] with biases."""
    model = wide(request.param)
    folder = tmp_path_factory.mktemp("wide") / request.param
    save(model, folder)
    return model, folder


@pytest.mark.parametrize("stored_as", QUANTISED)
def test_quantised_pack_is_the_model_with_decoded_weights(
    stored_as: str, model_and_folder: tuple[Any, Path], tmp_path: Path
) -> None:
    model, source = model_and_folder
    family = model.config.model_type
    make_pack(source, tmp_path / "pack", stored_as)
    form = FormatChoice.parse(stored_as).make()
    reference = wide(family)
    with torch.no_grad():
        for _, experts in experts_modules(reference):
            for weight in (experts.gate_up_proj, experts.down_proj):
                for one in weight:
                    rows = one.T if family == "gpt_oss" else one
                    back = form.decode(form.encode({"w": rows.contiguous()}))["w"]
                    one.copy_(back.T if family == "gpt_oss" else back)
    inputs = inputs_for(family, reference)
    calls = calls_of(reference, inputs, experts_paths(reference))
    assert len(calls) > 1
    tolerance = PRODUCTS.get(stored_as, ROUNDED_PRODUCTS)
    packed = load(tmp_path / "pack")
    for path, call in calls.items():
        with torch.no_grad():
            found = packed.get_submodule(path)(*call.arguments)
        assert relative_error(found, call.output) <= tolerance
    stats = moert.stats(packed)
    layers = runtime_of(packed).layers
    assert stats.expert_bytes == sum(spec.nbytes for layer in layers for spec in layer.spec.stored) * 8
    assert stats.expert_bytes < 0.3 * sum(p.nbytes for _, e in experts_modules(model) for p in e.parameters())
    assert stats.slot_bytes < 0.3 * stats.expert_bytes + 2 * len(layers) * 4096
    found_logits = logits(packed, inputs)
    moert.unpatch(packed)
    expected = reference.state_dict()
    assert [name for name, weight in packed.state_dict().items() if not torch.equal(weight, expected[name])] == []
    with load(tmp_path / "pack", host_memory="100%") as packed:
        assert moert.stats(packed).misses == 0
        assert torch.equal(logits(packed, inputs), found_logits), "the same bits at every budget"
        with DecodedCheck(packed) as check:
            logits(packed, inputs)
        assert check.compared == len(calls)
        assert 0 < check.largest_error <= tolerance


def test_decoded_check_notices_wrong_experts(
    model_and_folder: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = model_and_folder
    make_pack(source, tmp_path / "pack", "int8")
    with load(tmp_path / "pack") as packed:
        runtime = runtime_of(packed)
        right = type(runtime).weights
        monkeypatch.setattr(
            type(runtime), "weights", lambda *args: {name: w * 1.06 for name, w in right(*args).items()}
        )
        with DecodedCheck(packed) as check:
            logits(packed, inputs_for(model.config.model_type, packed))
        assert check.largest_error > 0.05


def test_huggingface_opens_a_pack_by_itself(tiny_olmoe: Path, tmp_path: Path) -> None:
    make_pack(tiny_olmoe, tmp_path / "pack", "int8")
    expected = logits_of(tmp_path / "pack", IDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pack")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert moert.stats(model).misses == 0
    assert not hasattr(model.config, "quantization_config")
    moert.close(model)
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "pack", quantization_config=moert.OffloadConfig(host_memory="25%")
        )
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert moert.stats(model).misses > 0, "the caller's budget is the one that counts"
    moert.unpatch(model)
    model.save_pretrained(tmp_path / "decoded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("stored_as", ["plain", "int4"])
def test_files_are_what_they_say(stored_as: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    (tiny_olmoe / "tokenizer.json").write_text("{}")
    try:
        make_pack(tiny_olmoe, tmp_path / "pack", stored_as)
    finally:
        (tiny_olmoe / "tokenizer.json").unlink()
    names = {path.name for path in (tmp_path / "pack").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "moert-pack.json"}
    assert names >= {"experts-00000.safetensors", "experts-00001.safetensors", "model.safetensors.index.json"}
    for path in (tmp_path / "pack").glob("experts-*.safetensors"):
        raw = path.read_bytes()
        assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            records = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        assert len(records) == 8
        assert all(record.dtype == torch.uint8 and record.numel() % 4096 == 0 for record in records.values())
        assert metadata["moert_pack"] == "2"
        assert metadata["layer"] in path.name
        assert FormatChoice.parse(metadata["weight_format"]) == FormatChoice.parse(stored_as)
        layout = json.loads(metadata["record"])
        assert all(tensor["offset"] % 64 == 0 for tensor in layout["tensors"])
        padding = [record[layout["bytes"] :] for record in records.values()]
        assert not any(part.any() for part in padding)
    settings = json.loads((tmp_path / "pack" / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == "moert"
    source = json.loads((tiny_olmoe / "config.json").read_text())
    assert {key: value for key, value in settings.items() if key != "quantization_config"} == source


def test_dense_weights_are_shared_out_over_files(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moert.runtime.dense_shard.SHARD_BYTES", 40_000)
    monkeypatch.setattr("moert.runtime.dense_shard.CHUNK_BYTES", 5_000)
    make_pack(tiny_olmoe, tmp_path / "pack")
    assert len(list(tmp_path.glob("pack/model-*-of-*.safetensors"))) > 2
    assert problems(tmp_path / "pack") == ()
    assert torch.equal(logits_of(tmp_path / "pack", IDS), logits_of(tiny_olmoe, IDS))


@pytest.mark.parametrize("name", format_names())
def test_every_format_there_is_can_be_packed(name: str, model_and_folder: tuple[Any, Path], tmp_path: Path) -> None:
    model, source = model_and_folder
    make_pack(source, tmp_path / "pack", name)
    with load(tmp_path / "pack") as packed:
        assert logits(packed, inputs_for(model.config.model_type, packed)).isfinite().all()


def test_format_of_ones_own_is_packed_and_decoded_where_no_kernel_reads_it(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_format.py").write_text(
        "import torch\n"
        "from moert.formats import Format, TensorSpec\n"
        "class Halves(Format):\n"
        "    def __init__(self, factor: float = 1.0): self.factor = factor\n"
        "    def stored(self, specs): return tuple(TensorSpec(s.name, s.shape, torch.float16) for s in specs)\n"
        "    def encode(self, tensors): return {n: (t * self.factor).half() for n, t in tensors.items()}\n"
        "    def decode(self, tensors): return {n: t.float() / self.factor for n, t in tensors.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    make_pack(tiny_olmoe, tmp_path / "pack", "my_format:Halves,factor=4")
    with pytest.warns(RuntimeWarning, match="decoded each time"):
        found = logits_of(tmp_path / "pack", IDS)
    reference = AutoModelForCausalLM.from_pretrained(tiny_olmoe, experts_implementation="eager")
    with torch.no_grad():
        for _, experts in experts_modules(reference):
            for weight in experts.parameters():
                weight.copy_((weight * 4).half().float() / 4)
        torch.testing.assert_close(found, reference(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", ["int5", "int4", "plain"]),
        ("int4,grup=32", ["grup=32", "group=32, symmetric=true"]),
        ("int4,group", ["'group'"]),
        ("int4,group=64", ["32 or 128", "64"]),
        ("int4,group=many", ["group='many'", "whole number"]),
        ("int4,symmetric=no", ["symmetric='no'", "true or false"]),
        ("int8,group=32", ["its parameters are: none"]),
        ("", ["''"]),
    ],
)
def test_formats_that_are_none(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        FormatChoice.parse(text)
    for word in words:
        assert word in str(refusal.value)


def test_formats_are_equal_however_they_are_spelled() -> None:
    assert FormatChoice.parse("int4") == FormatChoice.parse("int4, symmetric=TRUE ,group=32")
    assert str(FormatChoice.parse("int4")) == "int4,group=32,symmetric=true"
    assert FormatChoice.parse(str(FormatChoice.parse("int4,group=128"))) == FormatChoice.parse("int4,group=128")


@pytest.mark.parametrize(
    ("family", "stored_as", "words"),
    [
        ("qwen3_moe", "int8", ["model.layers.0.mlp.experts", "multiple of 32", "down_proj"]),
        ("ernie4_5_vl_moe", "int4,group=128", ["multiple of 128", "gate_up_proj"]),
        ("dbrx", "int8", ["DbrxExperts", "--format plain"]),
        ("jetmoe", "plain", ["JetMoeParallelExperts"]),
    ],
)
def test_models_that_cannot_be_packed_are_refused_before_anything_is_written(
    family: str, stored_as: str, words: list[str], zoo: Zoo, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save(build(family), source)
    with pytest.raises(UnsupportedModelError) as refusal:
        make_pack(source, tmp_path / "out" / "pack", stored_as)
    for word in words:
        assert word in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_broken_weights_are_not_quantised(tmp_path: Path) -> None:
    model = wide("qwen3_moe")
    with torch.no_grad():
        experts_modules(model)[1][1].down_proj[5, 3, 7] = float("nan")
    save(model, tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"expert 5 of model\.layers\.1\.mlp\.experts.*NaN"):
        make_pack(tmp_path / "source", tmp_path / "pack", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pack_is_not_packed_again(tiny_olmoe: Path, tmp_path: Path) -> None:
    make_pack(tiny_olmoe, tmp_path / "pack", "int8")
    with pytest.raises(UnsupportedModelError, match="is a pack already"):
        make_pack(tmp_path / "pack", tmp_path / "again")
    with pytest.raises(ConfigError, match="is the model itself"):
        make_pack(tiny_olmoe, tiny_olmoe, overwrite=True)
