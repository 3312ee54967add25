"""Where packs are put: on other file systems, on top of others, beside other processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from pack_support import IDS, logits_of, make_pack, mounted, problems

from moert.errors import ConfigError, MoertError, TransferError
from moert.tiers import build_folder
from moert.tiers.build_folder import building

MANIFEST = "moert-pack.json"


def test_what_is_there_is_not_touched(tiny_olmoe: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    make_pack(tiny_olmoe, out, "int8")
    with pytest.raises(ConfigError, match=r"there already.*--overwrite"):
        make_pack(tiny_olmoe, out, "int4")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is no pack"):
        make_pack(tiny_olmoe, tmp_path / "mine", overwrite=True)
    (tmp_path / "mine").rename(tmp_path / "other.partial")
    for restart in (False, True):
        with pytest.raises(ConfigError, match=r"'thesis\.txt'.*moert did not make it"):
            make_pack(tiny_olmoe, tmp_path / "other", restart=restart)
    assert (tmp_path / "other.partial" / "thesis.txt").read_text() == "x"
    with pytest.raises(ConfigError, match="is a file"):
        make_pack(tiny_olmoe, tmp_path / "other.partial" / "thesis.txt")
    (tmp_path / "link").symlink_to(out)
    make_pack(tiny_olmoe, tmp_path / "link", "int4", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert "int4" in json.loads((out / "moert-pack.json").read_text())["format"]
    (tmp_path / "empty").mkdir()
    make_pack(tiny_olmoe, tmp_path / "empty")
    assert problems(tmp_path / "empty") == ()


def test_a_model_is_not_packed_over_itself(tiny_olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_olmoe)
    for out in (tiny_olmoe, tmp_path / "link"):
        with pytest.raises(ConfigError, match="is the model itself; give another folder"):
            make_pack(tiny_olmoe, out, overwrite=True)


def test_only_what_a_model_needs_is_copied(tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_olmoe.iterdir():
        (source / path.name).symlink_to(path)
    for name, nbytes in ((".cache", 1), ("pytorch_model.bin", 1), ("movie.mp4", 5000), ("merges.txt", 5)):
        (source / name).write_bytes(b"x" * nbytes)
    monkeypatch.setattr("moert.hf.packing._SMALL_BYTES", 4999)
    make_pack(source, tmp_path / "pack")
    found = {path.name for path in (tmp_path / "pack").iterdir()}
    assert "merges.txt" in found
    assert not found & {".cache", "pytorch_model.bin", "movie.mp4"}


def test_who_begins_when_another_has_finished_keeps_his_folder(tmp_path: Path) -> None:
    with building(tmp_path / "pack", "moert-pack.json") as build:
        build.begin({})
        build.finish()
        with building(tmp_path / "pack", "moert-pack.json", overwrite=True) as other:
            assert other.path.is_dir()
            left = building(tmp_path / "pack", "moert-pack.json", overwrite=True)
            with pytest.raises(MoertError, match="another process"):
                left.__enter__()
        assert not other.path.exists(), "nothing was put into it"
        other.path.mkdir()
    assert other.path.is_dir(), "it is another's by now"


def test_a_folder_that_gets_its_name_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, right = tmp_path / "pack", build_folder._lock

    def late(fd: int, path: Path) -> None:
        if not out.exists():  # the other process ends
            (path / MANIFEST).write_text("{}")
            path.rename(out)
        right(fd, path)

    monkeypatch.setattr(build_folder, "_lock", late)
    with pytest.raises(ConfigError, match="there already; give another name"), building(out, MANIFEST):
        pass
    (out / MANIFEST).unlink()
    out.rmdir()
    with building(out, MANIFEST, overwrite=True) as build:
        assert build.path.is_dir(), "it has a folder of its own"
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_one_of_two_packs_is_there_all_the_time(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, right = tmp_path / "pack", os.rename
    make_pack(tiny_olmoe, out)

    def rename(old: Path, new: Path) -> None:
        right(old, new)
        assert (out / MANIFEST).is_file()

    monkeypatch.setattr(os, "rename", rename)
    make_pack(tiny_olmoe, out, "int8", overwrite=True)
    assert "int8" in json.loads((out / MANIFEST).read_text())["format"]


def test_where_two_folders_cannot_be_exchanged_at_once(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pack(tiny_olmoe, tmp_path / "pack")
    monkeypatch.setattr(build_folder, "_RENAME_EXCHANGE", 1 << 20)
    make_pack(tiny_olmoe, tmp_path / "pack", "int8", overwrite=True)
    assert "int8" in json.loads((tmp_path / "pack" / MANIFEST).read_text())["format"]
    assert problems(tmp_path / "pack") == ()
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_torch_has_its_threads_again(tiny_olmoe: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        make_pack(tiny_olmoe, tmp_path / "pack")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_disk_that_is_really_full(tiny_olmoe: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=400k"):
        with pytest.raises(TransferError, match=r"No space left.*cannot write \d+\.\d KiB.*KiB are free: make room"):
            make_pack(tiny_olmoe, tmp_path / "disk" / "pack")
        assert not (tmp_path / "disk" / "pack").exists()
        made = make_pack(tiny_olmoe, tmp_path / "disk" / "pack", "int4", restart=True)  # no O_DIRECT here, and it fits
        assert made.files == 3
        assert problems(tmp_path / "disk" / "pack") == ()


def test_place_where_a_file_system_is_mounted(tiny_olmoe: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8m"):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=rf"is mounted.*folder in it, as {tmp_path}/disk/pack"):
                make_pack(tiny_olmoe, tmp_path / "disk", overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["disk"], "nothing has been written beside it"
        make_pack(tiny_olmoe, tmp_path / "disk" / "pack")
        assert problems(tmp_path / "disk" / "pack") == ()


def test_overlay(tiny_olmoe: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / "layers" / name for name in ("lowerdir", "upperdir", "workdir")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    with mounted(tmp_path / "disk", ",".join(f"{name}={folder}" for name, folder in folders.items()), "overlay"):
        out = tmp_path / "disk" / "pack"
        make_pack(tiny_olmoe, out, "int8")
        assert torch.equal(logits_of(out, IDS), logits_of(tiny_olmoe, IDS)) is False
        make_pack(tiny_olmoe, out, overwrite=True)
        assert [path.name for path in out.parent.iterdir()] == ["pack"]
        assert problems(out, source=str(tiny_olmoe)) == ()
        assert torch.equal(logits_of(out, IDS), logits_of(tiny_olmoe, IDS))


def test_place_that_cannot_be_written(tiny_olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (Path("/proc/self/pack"), tmp_path / "file" / "pack"):
        with pytest.raises(TransferError, match=r"cannot write.*give another place"):
            make_pack(tiny_olmoe, out)
    with mounted(tmp_path / "disk", "ro"), pytest.raises(TransferError, match="Read-only file system: cannot write"):
        make_pack(tiny_olmoe, tmp_path / "disk" / "pack")
