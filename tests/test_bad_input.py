"""Broken checkpoints, impossible options, failing disks: typed errors with names and numbers, nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own_threads import check_no_disk_threads, disk_threads
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoeForCausalLM

import moert
from moert.tiers.disk import FileCalls, ShardFile

IDS = torch.arange(3, 15)[None]


def open_files() -> set[str]:
    """What this process has open under the temporary folder."""
    paths = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if ".safetensors" in path or "moert" in path:
            paths.add(path)
    return paths


@pytest.fixture
def checkpoint(tiny_olmoe: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_olmoe, tmp_path / "olmoe"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No thread and no open file outlives a test."""
    gc.collect()
    threads, files = set(threading.enumerate()), open_files()
    yield
    gc.collect()
    left = [t for t in threading.enumerate() if t not in threads and t.name.startswith("moert")]
    assert not left, f"threads left: {left}"
    assert open_files() <= files, f"files left open: {open_files() - files}"


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def shard_with(checkpoint: Path, name: str) -> Path:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return checkpoint / index["weight_map"][name]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def run_until_error(model: Any) -> None:
    """Enough forwards that every expert is read again."""
    for start in range(0, 110, 10):
        with torch.no_grad():
            model(torch.arange(start, start + 12)[None])


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def missing_shard(checkpoint: Path) -> str:
    shards(checkpoint)[1].unlink()
    return f"1 are missing, the first '{shards(checkpoint)[0].name[:5]}"


def truncated_shard(checkpoint: Path) -> str:
    path = shards(checkpoint)[0]
    os.truncate(path, path.stat().st_size - 1000)
    return rf"{path.name}: tensor .* the file has \d+ bytes: it is truncated, 1000 bytes are missing"


def truncated_in_header(checkpoint: Path) -> str:
    path = shards(checkpoint)[0]
    os.truncate(path, 100)
    return rf"{path.name}: its header should be \d+ bytes long, but the file ends after 100 bytes"


def empty_shard(checkpoint: Path) -> str:
    path = shards(checkpoint)[0]
    os.truncate(path, 3)
    return f"{path.name}: 3 bytes are too few"


def header_longer_than_file(checkpoint: Path) -> str:
    path = shards(checkpoint)[0]
    with path.open("r+b") as file:
        file.write((2**40).to_bytes(8, "little"))
    return f"{path.name}: its header should be {2**40} bytes long"


def header_is_no_json(checkpoint: Path) -> str:
    path = shards(checkpoint)[0]
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"<html>")
    return f"{path.name}: the header is not JSON"


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def offsets_out_of_range(checkpoint: Path) -> str:
    path = shard_with(checkpoint, EXPERT)

    def change(header: dict[str, Any]) -> None:
        last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
        begin, end = header[last]["data_offsets"]
        header[last]["data_offsets"] = [begin + 10**6, end + 10**6]

    rewrite_header(path, change)
    return rf"{path.name}: tensor .* at byte \d+ leaves a gap after .*, which ends at byte \d+"


def offsets_overlap(checkpoint: Path) -> str:
    path = shard_with(checkpoint, EXPERT)

    def change(header: dict[str, Any]) -> None:
        begin, end = header[EXPERT]["data_offsets"]
        header[EXPERT]["data_offsets"] = [begin - 64, end - 64] if begin else [begin + 64, end + 64]

    rewrite_header(path, change)
    return f"{path.name}: tensor '.*' at byte .* (overlaps|leaves a gap)"


def offsets_of_another_shape(checkpoint: Path) -> str:
    path = shard_with(checkpoint, EXPERT)
    rewrite_header(path, lambda header: header[EXPERT].update(shape=[7, 64]))
    return rf"{path.name}: tensor '{EXPERT}' of dtype F32 and shape \[7, 64\] cannot be the bytes"


def malformed_entry(checkpoint: Path) -> str:
    path = shard_with(checkpoint, EXPERT)
    rewrite_header(path, lambda header: header[EXPERT].pop("data_offsets"))
    return f"{path.name}: tensor '{EXPERT}' has a malformed header entry"


def change_tensor(checkpoint: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    path = shard_with(checkpoint, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def wrong_dtype(checkpoint: Path) -> str:
    path = change_tensor(checkpoint, EXPERT, lambda tensor: tensor.to(torch.int8))
    return f"{path.name}: tensor '{EXPERT}' is torch.int8, .* is torch.float32"


def wrong_shape(checkpoint: Path) -> str:
    path = change_tensor(checkpoint, EXPERT, lambda tensor: tensor[:30])
    return rf"{path.name}: tensor .* gives expert 3 of .* the shape \[62, 64\], the model wants \[64, 64\]"


def wrong_dense_shape(checkpoint: Path) -> str:
    change_tensor(checkpoint, "model.norm.weight", lambda tensor: tensor[:50])
    return "do not have the shapes that its config.json asks for"


def missing_expert(checkpoint: Path) -> str:
    path = shard_with(checkpoint, EXPERT)
    tensors = load_file(path)
    del tensors[EXPERT]
    save_file(tensors, path, metadata={"format": "pt"})
    return "the checkpoint has 7 tensors .* for the 8 experts of model.layers.1.mlp.experts.gate_up_proj"


def missing_layer(checkpoint: Path) -> str:
    for path in shards(checkpoint):
        tensors = {name: t for name, t in load_file(path).items() if ".1.mlp.experts" not in name}
        save_file(tensors, path, metadata={"format": "pt"})
    return "no tensors for 'model.layers.1.mlp.experts.gate_up_proj'"


def malformed_index(checkpoint: Path) -> str:
    (checkpoint / "model.safetensors.index.json").write_text("[]")
    return "model.safetensors.index.json: not a checkpoint index"


BROKEN = [
    missing_shard,
    truncated_shard,
    truncated_in_header,
    empty_shard,
    header_longer_than_file,
    header_is_no_json,
    offsets_out_of_range,
    offsets_overlap,
    offsets_of_another_shape,
    malformed_entry,
    wrong_dtype,
    wrong_shape,
    wrong_dense_shape,
    missing_expert,
    missing_layer,
    malformed_index,
]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_broken_checkpoint_is_refused(damage: Callable[[Path], str], checkpoint: Path) -> None:
    message = damage(checkpoint)
    with pytest.raises(moert.CorruptFileError, match=message):
        moert.load(checkpoint, host_memory="25%")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"host_memory": "lots"}, moert.ConfigError, "host_memory='lots' is not a size"),
        ({"host_memory": -1}, moert.ConfigError, "host_memory=-1 must be a positive"),
        (
            {"host_memory": "10%"},
            moert.CapacityError,
            r"keeps 0 of 8 experts .* one token needs 2; give at least \"25%\"",
        ),
        ({"host_memory": "90KB"}, moert.CapacityError, r"host_memory is 87.9 KiB .* 2 experts in each of 2 layers"),
        ({"policy": "clock"}, moert.ConfigError, "no policy named 'clock'; there are"),
        ({"io_depth": 0}, moert.ConfigError, "io_depth=0"),
        ({"device_memory": "1GiB"}, moert.ConfigError, "needs a CUDA device, and there is none here"),
        ({"device_memory": "x"}, moert.ConfigError, "device_memory='x' is not a size"),
    ],
)
def test_option_that_cannot_be_honoured(
    options: dict[str, Any], error: type[Exception], message: str, tiny_olmoe: Path
) -> None:
    with pytest.raises(error, match=message):
        moert.load(tiny_olmoe, **options)
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    before = logits(model)
    with pytest.raises(error, match=message):
        moert.patch(model, **options)
    assert torch.equal(logits(model), before)


def test_budget_beyond_the_machine_is_refused(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = SimpleNamespace(available_bytes=1000, binding="a test's limit")
    monkeypatch.setattr("moert.tiers.arena.memory_report", lambda: scarce)
    with pytest.raises(moert.CapacityError, match="lower host_memory"):
        moert.load(tiny_olmoe, host_memory="50%")


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(moert.ConfigError, match="is not a folder"):
        moert.load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(moert.ConfigError, match="is not a folder"):
        moert.load(tmp_path / "file")
    with pytest.raises(moert.ConfigError, match=r"has no config\.json"):
        moert.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(moert.CorruptFileError, match="no weights"):
        moert.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(moert.UnsupportedModelError, match=r"pytorch_model\.bin and no safetensors"):
        moert.load(tmp_path)


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(
        moert.UnsupportedModelError, match=r"LlamaForCausalLM has no experts modules: it is a dense model"
    ):
        moert.patch(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(moert.UnsupportedModelError, match="it is a dense model"):
        moert.load(tmp_path)


def test_experts_of_an_unknown_flag_are_refused(tiny_olmoe: Path) -> None:
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    model.model.layers[1].mlp.experts.has_sparse_up = True
    with pytest.raises(moert.UnsupportedModelError, match=r"OlmoeExperts at .* flag 'has_sparse_up'"):
        moert.patch(model)


@pytest.mark.parametrize("kind", ["read-only", "file"])
def test_cache_folder_that_cannot_be_written(kind: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    if kind == "file":
        folder.write_text("x")
    else:
        folder = Path("/proc/moert-cache")
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    before = logits(model)
    with pytest.raises(moert.TransferError, match="set cache_dir to a writable folder"):
        moert.patch(model, host_memory="25%", cache_dir=str(folder))
    assert torch.equal(logits(model), before)


def test_full_disk_under_the_cache_folder(tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    before = logits(model)
    with pytest.raises(moert.TransferError, match=r"No space left .* free some space or set cache_dir"):
        moert.patch(model, host_memory="25%", cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model), before)


def test_patch_without_memory_for_its_slots_changes_nothing(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise moert.CapacityError("no memory today")

    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr("moert.runtime.building.HostTier", refuse)
        with pytest.raises(moert.CapacityError, match="no memory today"):
            moert.patch(model, host_memory="25%")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)


def test_patching_twice_is_refused(tiny_olmoe: Path) -> None:
    model = OlmoeForCausalLM.from_pretrained(tiny_olmoe)
    with pytest.raises(moert.MoertError, match="nothing to unpatch"):
        moert.unpatch(model)
    with pytest.raises(moert.MoertError, match=r"use moert\.load or moert\.patch first"):
        moert.stats(model)
    with moert.patch(model), pytest.raises(moert.MoertError, match="offloaded already"):
        moert.patch(model)
    with pytest.raises(moert.ConfigError, match="unknown option 'hostmemory'"):
        moert.patch(model, hostmemory="1GiB")


def test_shard_truncated_while_running(checkpoint: Path) -> None:
    with moert.load(checkpoint, host_memory="25%") as model:
        want = logits(model)
        path = shard_with(checkpoint, EXPERT)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        assert model.lm_head.weight.isfinite().all()  # dense weights are not views of a mapped file
        with pytest.raises(moert.CorruptFileError, match=rf"{path.name} .*size {size} -> {size // 2}"):
            run_until_error(model)
    assert want.isfinite().all()


def test_shard_overwritten_while_running(checkpoint: Path) -> None:
    with moert.load(checkpoint, host_memory="25%") as model:
        logits(model)
        path = shard_with(checkpoint, EXPERT)
        time.sleep(0.02)  # file times have a granularity
        with path.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        with pytest.raises(moert.CorruptFileError, match=f"{path.name} was changed while it was in use: modified"):
            run_until_error(model)


def test_shard_replaced_while_running_goes_on_with_the_old_one(checkpoint: Path) -> None:
    with moert.load(checkpoint, host_memory="25%") as model:
        want = logits(model)
        for path in shards(checkpoint):
            new = path.with_suffix(".new")
            new.write_bytes(os.urandom(1000))
            new.rename(path)
        for _ in range(3):
            assert torch.equal(logits(model), want)


@pytest.mark.parametrize("times", [1, 2])
def test_read_error_while_running(times: int, tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One EIO is tried again; a second one is raised, and the model works when the disk does."""
    failing = 0
    lock = threading.Lock()

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        nonlocal failing
        with lock:
            if failing > 0:
                failing -= 1
                raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(
        "moert.hf.source.ShardFile", lambda path, direct: ShardFile(path, direct=direct, calls=FileCalls(preadv=preadv))
    )
    with moert.load(tiny_olmoe, host_memory="25%", io_depth=1) as model:
        want = logits(model)
        failing = times
        if times == 2:
            with pytest.raises(moert.TransferError, match=r"Input/output error.*\.safetensors") as caught:
                logits(model)
            assert caught.value.errno == 5
        for _ in range(2):
            assert torch.equal(logits(model), want)


def test_closed_model_says_so(tiny_olmoe: Path) -> None:
    model = moert.load(tiny_olmoe, host_memory="25%")
    moert.close(model)
    moert.close(model)
    with pytest.raises(moert.MoertError, match="closed; load or patch the model again"):
        logits(model)
    with pytest.raises(moert.MoertError, match="closed"):
        moert.unpatch(model)


def test_forgotten_model_leaves_nothing(tiny_olmoe: Path) -> None:
    model = moert.load(tiny_olmoe, host_memory="25%")
    logits(model)
    assert disk_threads() > 0
    del model  # the fixture checks Python's threads and files
    gc.collect()
    check_no_disk_threads()


def test_failed_preload_leaves_nothing(tiny_olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(
        "moert.hf.source.ShardFile", lambda path, direct: ShardFile(path, direct=direct, calls=FileCalls(preadv=preadv))
    )
    with pytest.raises(moert.TransferError):
        moert.load(tiny_olmoe, host_memory="100%")


def test_the_hf_way_raises_the_same(checkpoint: Path) -> None:
    config = moert.OffloadConfig(host_memory="10%")
    with pytest.raises(moert.CapacityError, match="one token needs 2"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    message = wrong_shape(checkpoint)
    with pytest.raises(moert.CorruptFileError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=moert.OffloadConfig())


INTERRUPTED = """
    import os, signal, sys, tempfile, threading, torch, moert
    tempfile.tempdir = sys.argv[2]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have been started without it
    when, caught = sys.argv[3], threading.Event()
    if when == "load":
        from moert.tiers import reader
        submit = reader.DiskReader.submit_planned
        def interrupting(self, *args, **kwargs):
            interrupting.calls += 1
            if interrupting.calls == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return submit(self, *args, **kwargs)
        interrupting.calls = 0
        reader.DiskReader.submit_planned = interrupting
    try:
        model = moert.load(sys.argv[1], host_memory="100%" if when == "load" else "25%")
        ids = torch.arange(3, 15)[None]
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
        def interrupt():
            pause_s = 0.3
            while not caught.wait(pause_s):
                os.kill(os.getpid(), signal.SIGINT)
                pause_s = 20  # Python drops one that comes within a finalizer
        threading.Thread(target=interrupt, daemon=True).start()
        while True:
            model.generate(ids, max_new_tokens=200, do_sample=False)
    except KeyboardInterrupt:
        caught.set()
        if when == "generate":
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)
            moert.close(model)
            del model
        left = [t.name for t in threading.enumerate() if t.name.startswith("moert")]
        assert not left, left
        assert not os.listdir(sys.argv[2]), os.listdir(sys.argv[2])
        print("clean")
"""


@pytest.mark.parametrize("when", ["load", "generate"])
def test_interrupt_is_clean(when: str, tiny_olmoe: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tiny_olmoe), str(tmp_path), when],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout.strip().endswith("clean"), process.stderr[-2000:]
    assert process.returncode == 0
    assert signal.SIGINT not in (-process.returncode,)
