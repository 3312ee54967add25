"""The benchmark's checkpoints: transformers loads each architecture, bytes are reproducible, a kill leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module as bench
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("bench_on_path")

BENCH = Path(__file__).parents[1] / "bench"
SMALL: dict[str, Any] = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
NARROW: dict[str, dict[str, Any]] = {
    "olmoe-bench": SMALL,
    "olmoe-1b-7b": SMALL,
    "qwen3-30b-a3b": {**SMALL, "head_dim": 16, "intermediate_size": 64},
    "mixtral-8x7b": SMALL,
    "deepseek-v2-lite": {
        **SMALL,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt-oss-20b": {**SMALL, "head_dim": 16},
}
PUBLISHED_PARAMETERS = {
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
}


def small_config(arch: str, **sizes: int) -> dict[str, Any]:
    sizes = {"layers": 2, "experts": 8, "hidden": 64, "expert_width": 32, **sizes}
    config: dict[str, Any] = bench("architectures").configuration(arch, **sizes, overrides=NARROW[arch])
    return config


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes by name, read by the format's own words: u64 length, JSON, data."""
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        data_start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:data_start])
        header.pop("__metadata__")
        assert len(raw) == data_start + max(entry["data_offsets"][1] for entry in header.values())
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = raw[data_start + first : data_start + last]
    return tensors


@pytest.mark.parametrize("arch", NARROW)
def test_plain_transformers_loads_it_whole(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    bench("make_checkpoint").write_checkpoint(small_config(arch), folder, shard_bytes=200_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: len(value) for key, value in report.items()} == dict.fromkeys(report, 0)
    assert model.dtype == torch.bfloat16

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Offload, naïvely."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens.shape[1] == len(text.encode())
    assert tokenizer.decode(tokens[0]) == text
    with torch.no_grad():
        logits = model(tokens).logits.float()
    assert logits.isfinite().all()
    assert 0.3 < logits.std().item() < 5
    assert logits.argmax(-1).unique().numel() > 3
    assert all(tokenizer.convert_ids_to_tokens(place) for place in range(model.config.vocab_size))


@pytest.mark.parametrize("arch", PUBLISHED_PARAMETERS)
def test_the_full_shape_has_the_published_size(arch: str) -> None:
    config = bench("architectures").configuration(arch)
    tensors = bench("make_checkpoint").tensors_of(config, "bf16")
    assert sum(spec.nbytes for spec in tensors) == 2 * PUBLISHED_PARAMETERS[arch]


@pytest.mark.parametrize(
    ("arch", "name", "inputs"),
    [
        ("gpt-oss-20b", "model.layers.1.mlp.experts.gate_up_proj", 64),
        ("gpt-oss-20b", "model.layers.1.mlp.experts.down_proj", 32),
        ("mixtral-8x7b", "model.layers.1.block_sparse_moe.experts.7.w1.weight", 64),
        ("mixtral-8x7b", "model.layers.1.block_sparse_moe.experts.7.w2.weight", 32),
    ],
)
def test_a_matrix_keeps_the_size_of_what_it_is_fed(arch: str, name: str, inputs: int, tmp_path: Path) -> None:
    bench("make_checkpoint").write_checkpoint(small_config(arch), tmp_path / "model")
    raw = bytearray(all_bytes(tmp_path / "model")[name])
    assert torch.frombuffer(raw, dtype=torch.bfloat16).double().std() == pytest.approx(inputs**-0.5, rel=0.05)


def test_safetensors_reads_every_tensor_and_an_expert_is_contiguous(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = tmp_path / "model"
    bench("make_checkpoint").write_checkpoint(small_config("qwen3-30b-a3b"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert set(names) == set(index["weight_map"])
        total = sum(file.get_tensor(name).nbytes for name in names)
    assert total == index["metadata"]["total_size"]
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    parts = [f"model.layers.1.mlp.experts.5.{part}_proj.weight" for part in ("down", "gate", "up")]
    offsets = [header[part]["data_offsets"] for part in parts]
    assert offsets[0][1] == offsets[1][0]
    assert offsets[1][1] == offsets[2][0]


def test_weights_depend_on_name_and_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shards = bench("make_checkpoint"), bench("shards")
    config = small_config("olmoe-bench")
    make.write_checkpoint(config, tmp_path / "one", seed=1)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    make.write_checkpoint(config, tmp_path / "cut", seed=1, shard_bytes=100_000)
    make.write_checkpoint(config, tmp_path / "other", seed=2)
    one, cut, other = (all_bytes(tmp_path / name) for name in ("one", "cut", "other"))
    assert one == cut
    drawn = [name for name in one if "norm" not in name]
    assert not any(one[name] == other[name] for name in drawn)
    assert len({one[name] for name in drawn}) == len(drawn)


def test_values_are_normal(tmp_path: Path) -> None:
    import numpy as np

    weights = bench("random_weights")
    recipe = weights.recipe_for("layers.0.experts.0.up_proj.weight", (1024, 1024), 1024)
    bits = np.empty(1 << 20, np.uint16)
    weights.filler("x", (1024, 1024), "BF16", recipe, seed=0)(bits, 0)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).double() * 32
    assert values.mean().abs() < 0.005
    assert values.var() == pytest.approx(1, abs=0.01)
    assert (values**4).mean() == pytest.approx(3, abs=0.05)
    rows = values.view(1024, 1024)
    assert torch.corrcoef(rows[:64]).fill_diagonal_(0).abs().max() < 0.2
    lags = torch.stack([(values[lag:] * values[:-lag]).mean() for lag in range(1, 9)])
    assert lags.abs().max() < 0.006


def test_routing_is_spread_but_not_uniform() -> None:
    import numpy as np

    weights = bench("random_weights")
    name, shape = "model.layers.3.mlp.gate.weight", (64, 256)
    bits = np.empty(64 * 256, np.uint32)
    weights.filler(name, shape, "F32", weights.recipe_for(name, shape, 256), seed=0)(bits, 0)
    router = torch.from_numpy(bits.view(np.float32)).view(shape)
    tokens = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    share = torch.bincount((tokens @ router.T).topk(8).indices.flatten(), minlength=64) / (4000 * 8)
    shared_picks = 8 * (share**2).sum().item()
    assert (share > 0).all()
    assert 0.15 < shared_picks < 0.4, "two unrelated tokens share this part of their picks; uniform routing gives 0.125"


@pytest.mark.parametrize("errno_of_disk", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errno_of_disk: int
) -> None:
    from moert.errors import CapacityError

    allocated: list[int] = []
    real = os.posix_fallocate

    def second_fails(descriptor: int, offset: int, size: int) -> None:
        allocated.append(size)
        if len(allocated) > 1:
            raise OSError(errno_of_disk, os.strerror(errno_of_disk))
        real(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", second_fails)
    with pytest.raises(CapacityError, match=r"needs .*iB in .*free space"):
        bench("make_checkpoint").write_checkpoint(small_config("olmoe-bench"), tmp_path / "model", shard_bytes=200_000)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_target_is_left_alone(tmp_path: Path) -> None:
    from moert.errors import ConfigError

    target = tmp_path / "model"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="exists"):
        bench("make_checkpoint").write_checkpoint(small_config("olmoe-bench"), target)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["kept"]


def command(target: Path, *options: str) -> list[str]:
    return [sys.executable, str(BENCH / "make_checkpoint.py"), "olmoe-bench", str(target), *options]


def test_killed_half_way_then_written_again(tmp_path: Path) -> None:
    target = tmp_path / "model"
    writer = subprocess.Popen(command(target, "--layers", "2"), stdout=subprocess.DEVNULL)
    partial = tmp_path / ".model.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.safetensors")) and writer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL, "the writer was done before it could be killed"
    assert not target.exists()

    small = ["--layers", "1", "--experts", "8", "--hidden", "64", "--expert-width", "32", "--set", "vocab_size=320"]
    program = typer.Typer()
    program.command()(bench("make_checkpoint").main)
    done = CliRunner().invoke(program, ["olmoe-bench", str(target), *small])
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(all_bytes(target)) == 3 + (4 + 4 + 1 + 8 * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int3"], "must be one of bf16"),
        (["--shard-bytes", "lots"], "not a size"),
        (["--set", "vocab_size"], "KEY=JSON"),
        (["--set", "vocab_size=100"], "must be at least"),
    ],
)
def test_bad_options_say_why(tmp_path: Path, options: list[str], message: str) -> None:
    result = subprocess.run(command(tmp_path / "model", *options), capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
