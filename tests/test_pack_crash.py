"""Packing that is killed, runs into a full disk, or meets another process: nothing half-made, and it can be resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack_support import contents, make_pack, problems

import moert
from moert.errors import ConfigError, MoertError
from moert.tiers.build_folder import building

KILLED = signal.SIGKILL


class Launcher:
    """Runs `moert pack` in processes of its own; see pack_launcher.py."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("pack_launcher.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *arguments: object, **how: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": ["pack", *map(str, arguments)], **how}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def whole(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory, launch: Launcher) -> tuple[Path, int]:
    """An uninterrupted pack in int8, and the steps that it took."""
    folder = tmp_path_factory.mktemp("whole") / "pack"
    ran = launch(tiny_olmoe, folder, "--format", "int8")
    assert ran["status"] == 0, ran["err"]
    assert ran["steps"] > 40
    return folder, ran["steps"]


def kill_and_resume(launch: Launcher, source: Path, whole: tuple[Path, int], folder: Path, kills: list[int]) -> None:
    """Kill a run at each of these steps, one after the other, each going on where the last one was; then finish."""
    out = folder / "pack"
    for step in kills:
        ran = launch(source, out, "--format", "int8", kill_at=step)
        if ran["status"] == 0:
            break  # so little was left to do
        assert ran["status"] == KILLED, ran["err"]
        if out.exists():
            assert problems(out) == (), f"killed at step {step}"
            assert contents(out) == contents(whole[0])
            shutil.rmtree(out)
    if not out.exists():
        ran = launch(source, out, "--format", "int8")
        assert ran["status"] == 0, f"after {kills}: {ran['err']}"
    assert contents(out) == contents(whole[0])
    assert [path.name for path in folder.iterdir()] == ["pack"], "nothing else is left"
    shutil.rmtree(out)


def test_killed_and_resumed(launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    choose = random.Random(0)
    for _ in range(4):
        kills = [choose.randint(1, whole[1]), choose.randint(1, whole[1] // 2)]
        kill_and_resume(launch, tiny_olmoe, whole, tmp_path, kills)


@pytest.mark.slow
def test_killed_at_every_step(launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    for step in range(1, whole[1] + 1):
        kill_and_resume(launch, tiny_olmoe, whole, tmp_path, [step])


@pytest.mark.slow
def test_killed_again_and_again_by_the_clock(
    launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    choose = random.Random(1)
    out, partial = tmp_path / "pack", tmp_path / "pack.partial"
    began = time.monotonic()
    assert launch(tiny_olmoe, out, "--format", "int8")["status"] == 0
    early_s, late_s = 0.0, time.monotonic() - began
    shutil.rmtree(out)
    at_work = 0
    for _ in range(600):
        after_s = choose.uniform(early_s, late_s)
        ran = launch(tiny_olmoe, out, "--format", "int8", kill_after_s=after_s)
        assert ran["status"] in (0, KILLED), ran["err"]
        at_work += ran["status"] == KILLED and partial.exists()
        # However fast the machine is by now, most are to be killed between the beginning and the end.
        if out.exists():
            late_s -= (late_s - after_s) / 4
        elif not partial.exists():
            early_s += (after_s - early_s) / 4
        early_s, late_s = 0.98 * early_s, 1.02 * late_s
        if out.exists():
            assert problems(out) == ()
            assert contents(out) == contents(whole[0])
            shutil.rmtree(out)
        elif choose.random() < 0.3:
            shutil.rmtree(partial, ignore_errors=True)
        if at_work == 50:
            break
    assert at_work == 50
    assert launch(tiny_olmoe, out, "--format", "int8")["status"] == 0
    assert contents(out) == contents(whole[0])
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def overwrite_killed(launch: Launcher, source: Path, whole: tuple[Path, int], folder: Path, steps: list[int]) -> int:
    """Kill a run that overwrites another pack at each of these steps; returns how many had swapped the two by then."""
    out = folder / "pack"
    make_pack(source, folder / "old" / "pack")
    old, new = contents(folder / "old" / "pack"), contents(whole[0])
    swapped = 0
    for step in steps:
        shutil.copytree(folder / "old" / "pack", out)
        launch(source, out, "--format", "int8", "--overwrite", kill_at=step)
        found = contents(out)
        assert found in (old, new), f"killed at step {step}"
        swapped += found == new
        ran = launch(source, out, "--format", "int8", "--overwrite", *(["--restart"] if found == new else []))
        assert ran["status"] == 0, ran["err"]
        assert contents(out) == new
        assert sorted(path.name for path in folder.iterdir()) == ["old", "pack"], f"after step {step}"
        shutil.rmtree(out)
    return swapped


def test_overwriting_killed(launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    # The last steps are the swap and removing what was replaced.
    assert overwrite_killed(launch, tiny_olmoe, whole, tmp_path, [whole[1] // 2, whole[1], whole[1] + 5]) > 0


@pytest.mark.slow
def test_overwriting_killed_at_many_steps(
    launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    steps = [*range(1, whole[1] - 10, 5), *range(whole[1] - 10, whole[1] + 15)]
    assert 5 < overwrite_killed(launch, tiny_olmoe, whole, tmp_path, steps) < len(steps) - 5


def test_finished_files_are_kept(launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "pack"
    ran = launch(tiny_olmoe, out, "--format", "int8", kill_after="experts-00000.safetensors")
    assert ran["status"] == KILLED
    before = (tmp_path / "pack.partial" / "experts-00000.safetensors").stat()
    ran = launch(tiny_olmoe, out, "--format", "int8", "--json")
    assert json.loads(ran["out"])["files_kept"] == 2
    after = (out / "experts-00000.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert contents(out) == contents(whole[0])


def begun(launch: Launcher, source: Path, whole: tuple[Path, int], folder: Path) -> Path:
    """Where a run was stopped half-way."""
    ran = launch(source, folder / "pack", "--format", "int8", kill_at=whole[1] // 2)
    assert ran["status"] == KILLED
    assert (folder / "pack.partial" / "moert-pack.json").exists()
    return folder / "pack"


def test_begun_otherwise_is_not_gone_on_with(
    launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_olmoe, tmp_path / "source"))
    out = begun(launch, source, whole, tmp_path)
    with pytest.raises(ConfigError, match=r"pack\.partial was begun.*different: .*format.*--restart"):
        make_pack(source, out, "int4")
    shard = min(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())  # another revision of the same shape has another time at least
    with pytest.raises(ConfigError, match=r"different: source\); .*--restart"):
        make_pack(source, out, "int8")
    make_pack(source, out, "int8", restart=True)
    assert problems(out) == ()
    assert not (tmp_path / "pack.partial").exists()


def test_one_at_a_time(launch: Launcher, tiny_olmoe: Path, tmp_path: Path) -> None:
    with building(tmp_path / "pack", "moert-pack.json"):
        ran = launch(tiny_olmoe, tmp_path / "pack")
        assert os.waitstatus_to_exitcode(ran["status"]) == 2
        assert "another process is writing" in ran["err"]
        with pytest.raises(MoertError, match="another process"):
            make_pack(tiny_olmoe, tmp_path / "pack", restart=True)
    assert list(tmp_path.iterdir()) == []
    make_pack(tiny_olmoe, tmp_path / "pack")


@pytest.mark.parametrize("when", ["at the start", "half-way", "large file"])
def test_full_disk(when: str, launch: Launcher, tiny_olmoe: Path, whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "pack"
    make_pack(tiny_olmoe, out)
    old = contents(out)
    how = {
        "at the start": {"full_at": 1},
        "half-way": {"full_after": "experts-00000.safetensors"},
        "large file": {"file_bytes": 20_000},
    }[when]
    ran = launch(tiny_olmoe, out, "--format", "int8", "--overwrite", **how)
    assert os.waitstatus_to_exitcode(ran["status"]) == 2
    assert ran["err"].count("\n") == 1
    assert ("File too large" if when == "large file" else "No space left") in ran["err"]
    assert "KiB" in ran["err"]
    assert contents(out) == old
    assert len(list(tmp_path.glob("pack.partial/*.safetensors"))) == (2 if when == "half-way" else 0)
    assert not list(tmp_path.glob("pack.partial/*.safetensors.unfinished")), "its room is given back"
    assert launch(tiny_olmoe, out, "--format", "int8", "--overwrite")["status"] == 0
    assert contents(out) == contents(whole[0])


def test_what_has_its_name_outlasts_a_power_failure(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is synced before it gets its name, and the folder that has the name after that."""
    synced: set[int] = set()
    named: list[str] = []
    unsynced: set[int] = set()
    fsync, pwrite, rename = os.fsync, os.pwrite, os.rename

    def write(fd: int, data: memoryview, offset: int) -> int:
        synced.discard(os.fstat(fd).st_ino)
        return pwrite(fd, data, offset)

    def sync(fd: int) -> None:
        fsync(fd)
        synced.add(os.fstat(fd).st_ino)
        unsynced.discard(os.fstat(fd).st_ino)

    def name(old: Path, new: Path) -> None:
        assert os.stat(old).st_ino in synced, old
        assert not unsynced, f"{new} has its name before the last one's is safe"
        rename(old, new)
        named.append(new.name)
        unsynced.add(os.stat(new.parent).st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "rename", name)
    make_pack(tiny_olmoe, tmp_path / "pack")
    assert not unsynced
    assert named[-1] == "pack"
    assert sorted(named[:-1]) == sorted(path.name for path in (tmp_path / "pack").iterdir())


def test_source_that_changes_meanwhile(tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(tiny_olmoe, tmp_path / "source"))

    def touch(done: int, total: int) -> None:
        for shard in source.glob("*.safetensors"):
            os.utime(shard, (1, 1))

    with pytest.raises(moert.CorruptFileError, match="was changed while it was in use"):
        make_pack(source, tmp_path / "pack", progress=touch)
    assert not (tmp_path / "pack").exists()
