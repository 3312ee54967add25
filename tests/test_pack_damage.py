"""Packs that are damaged, mixed up or not of the model: what loading says, and what `--verify` finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack_support import IDS, contents, logits_of, make_pack, problems

import moert
from moert.errors import ConfigError, CorruptFileError
from moert.hf.model import runtime_of
from moert.runtime import pack_file
from moert.runtime.pack_file import read_pack_file
from moert.tiers.safetensors_file import read_entries
from moert.tiers.shard_file import ShardFile

FIRST = "experts-00000.safetensors"
SECOND = "experts-00001.safetensors"
DENSE = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def sound(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack in int8. Read only."""
    folder = tmp_path_factory.mktemp("damage") / "pack"
    make_pack(tiny_olmoe, folder, "int8")
    return folder


@pytest.fixture
def pack(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "pack"))


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["read in place", "read through staging"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_flipped_bit_is_met_at_the_first_use(where: str, dtype: torch.dtype, sound: Path, tmp_path: Path) -> None:
    plain = tmp_path / "pack"
    make_pack(Path(json.loads((sound / "moert-pack.json").read_text())["source"]["name"]), plain)
    file = read_pack_file(plain / SECOND)
    span = file.span(0, 3)
    flip(plain / SECOND, span.offset if where == "first" else span.end - 1)
    with moert.load(plain, host_memory="25%", dtype=dtype) as model:
        runtime = runtime_of(model)
        runtime.weights(1, 2)
        with pytest.raises(CorruptFileError) as refusal:
            runtime.weights(1, 3)
        for word in (SECOND, "expert 3 of layer 1", "model.layers.1.mlp.experts", "read twice"):
            assert word in str(refusal.value)
        runtime.weights(1, 4)
    (found,) = problems(plain)
    assert f"{SECOND}: expert 3 has the checksum" in found


def test_padding_and_dense_weights_are_checked_by_verify(pack: Path) -> None:
    dense = pack / DENSE
    flip(dense, dense.stat().st_size - 1)
    assert [f"{dense} has the checksum" in problem for problem in problems(pack)] == [True]
    flip(dense, dense.stat().st_size - 1)
    file = read_pack_file(pack / SECOND)
    assert file.layer.record_bytes > file.layer.layout.nbytes
    for expert, offset in ((3, file.span(0, 3).end), (7, (pack / SECOND).stat().st_size - 1)):
        flip(pack / SECOND, offset)
        (found,) = problems(pack)
        assert f"{SECOND}: expert {expert} is followed by other bytes than zeros" in found
        flip(pack / SECOND, offset)
    assert problems(pack) == ()


def test_record_that_is_read_wrong_once_is_read_again(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = ShardFile.read, []

    def read(self: ShardFile, offset: int, nbytes: int, buffer: memoryview) -> int:
        start = right(self, offset, nbytes, buffer)
        if (self.path, offset) not in wrong:
            wrong.append((self.path, offset))
            buffer[start + nbytes - 1] ^= 255
        return start

    expected = logits_of(pack, IDS)
    monkeypatch.setattr(ShardFile, "read", read)
    assert torch.equal(logits_of(pack, IDS), expected)
    assert wrong


def test_each_record_is_checked_once(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, checked = pack_file._checksum_of, []

    def note(reads: Any) -> str:
        checked.append((reads[0].file.path, reads[0].offset))
        return right(reads)

    monkeypatch.setattr(pack_file, "_checksum_of", note)
    with moert.load(pack, host_memory="25%") as model, torch.no_grad():
        for _ in range(3):
            model(IDS)
        assert moert.stats(model).misses > 16, "records were read again"
    assert len(checked) == len(set(checked)) == 16


def test_truncated_file_is_refused_at_load(pack: Path) -> None:
    path = pack / SECOND
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(CorruptFileError, match=rf"{SECOND} is truncated: \d+ bytes, not \d+"):
        moert.load(pack)
    assert any("truncated" in problem for problem in problems(pack))


def rename(a: str, b: str) -> Callable[[Path, Path], object]:
    def change(pack: Path, _: Path) -> None:
        (pack / a).rename(pack / "aside")
        (pack / b).rename(pack / a)
        (pack / "aside").rename(pack / b)

    return change


def edit_manifest(**changes: object) -> Callable[[Path, Path], object]:
    def change(pack: Path, _: Path) -> None:
        path = pack / "moert-pack.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def take(name: str) -> Callable[[Path, Path], object]:
    return lambda pack, other: shutil.copy(other / name, pack / name)


def remove(name: str) -> Callable[[Path, Path], object]:
    return lambda pack, _: (pack / name).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename(FIRST, SECOND), [FIRST, "holds layer 1"]),
        (take(SECOND), [SECOND, "of another pack"]),
        (take(DENSE), [DENSE, "of another pack"]),
        (lambda pack, _: flip(pack / DENSE, (pack / DENSE).read_bytes().index(b"embed")), [DENSE, "its header has"]),
        (lambda pack, _: flip(pack / FIRST, (pack / FIRST).read_bytes().index(b"mlp")), [FIRST, "its header has"]),
        (take("config.json"), ["config.json", "moert-pack.json", "two different packs"]),
        (remove(SECOND), [SECOND, "is missing"]),
        (remove("moert-pack.json"), ["moert-pack.json is missing", "hf download"]),
        (edit_manifest(pack_version=1), ["version 1", "reads 2"]),
        (edit_manifest(source={}), ["moert-pack.json is malformed"]),
        (lambda pack, _: flip(pack / FIRST, 20), [FIRST]),
        (lambda pack, _: (pack / "moert-pack.json").write_text("{"), ["moert-pack.json is not JSON"]),
    ],
    ids=[
        "layers swapped",
        "file of another",
        "dense weights of another",
        "name of a tensor",
        "name of a module",
        "config of another",
        "file",
        "manifest",
        "version",
        "source",
        "head",
        "JSON",
    ],
)
def test_files_that_do_not_belong_together_are_refused_at_load(
    change: Callable[[Path, Path], object], words: list[str], pack: Path, tiny_olmoe: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_olmoe, tmp_path / "source"))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "bos_token_id": 1}))
    make_pack(source, tmp_path / "other", "int8")
    change(pack, tmp_path / "other")
    with pytest.raises(CorruptFileError) as refusal:
        moert.load(pack)
    for word in words:
        assert word in str(refusal.value)
    try:
        found = problems(pack)
    except moert.MoertError as error:
        found = (str(error),)
    assert found


def test_pack_of_another_architecture_is_refused(pack: Path) -> None:
    path = pack / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 4}))
    with pytest.raises(CorruptFileError, match=r"has 8 experts.*wants 4"):
        moert.load(pack)
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 8, "num_hidden_layers": 1}))
    with pytest.raises(CorruptFileError, match="of 2 layers, this model has 1"):
        moert.load(pack)


def test_verify_looks_at_the_model_it_was_made_from(pack: Path, tiny_olmoe: Path, tmp_path: Path) -> None:
    assert problems(pack, source=str(tiny_olmoe)) == ()
    copy = Path(shutil.copytree(tiny_olmoe, tmp_path / "copy"))
    assert problems(pack, source=str(copy)) == (), "a copy is the same model"
    shard = min(copy.glob("*.safetensors"))
    entry = next(iter(read_entries(shard).values()))
    flip(shard, entry.offset + entry.nbytes // 2)
    (found,) = problems(pack, source=str(copy))
    assert f"not from {copy}" in found
    (copy / "config.json").unlink()
    with pytest.raises(moert.TransferError, match=r"config\.json"):
        problems(pack, source=str(copy))
    with pytest.raises(ConfigError, match="is no pack"):
        problems(tiny_olmoe)


def test_verify_finds_what_does_not_belong_there(pack: Path) -> None:
    shutil.copy(pack / DENSE, pack / "more.safetensors")
    (found,) = problems(pack)
    assert found == f"{pack / 'more.safetensors'} is not in moert-pack.json"
    index = pack / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "more.safetensors"
    index.write_text(json.dumps(content))
    assert f"{pack}: the index names more.safetensors, which is not in moert-pack.json" in problems(pack)


def test_striped_over_disks_by_links(pack: Path, tmp_path: Path) -> None:
    expected = logits_of(pack, IDS)
    (tmp_path / "disk").mkdir()
    (pack / FIRST).rename(tmp_path / "disk" / FIRST)
    (pack / FIRST).symlink_to(tmp_path / "disk" / FIRST)
    assert torch.equal(logits_of(pack, IDS), expected)
    assert problems(pack) == ()


def test_same_model_gives_the_same_bytes(sound: Path, tiny_olmoe: Path, tmp_path: Path) -> None:
    make_pack(tiny_olmoe, tmp_path / "again", "int8")
    assert contents(tmp_path / "again") == contents(sound)
