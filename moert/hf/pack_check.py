"""`moert pack --verify`: whether a pack is complete and as it was written, and from which model it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moert.errors import ConfigError, MoertError
from moert.hf.fingerprint import fingerprint
from moert.hf.inspection import local_folder, shard_files
from moert.hf.loading import is_pack_config
from moert.hf.packed import Pack, open_pack
from moert.hf.text import read_settings
from moert.runtime.pack_file import MANIFEST
from moert.runtime.pack_verify import bad_data, bad_records

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class PackCheck:
    """What was found."""

    stored_as: str
    files: int
    """Files of weights."""
    records: int
    bytes_read: int
    source: str
    """The model that the pack was made from, or that it was held against."""
    source_is_the_same: bool | None
    """None: that model is not on this machine."""
    problems: tuple[str, ...]


def check_pack(
    folder: Path, source: str | None = None, revision: str | None = None, progress: Progress | None = None
) -> PackCheck:
    """Read every byte of the pack in `folder` and check it. Blocks.

    Args:
        source: the model to hold it against; None is the one it was made from, if that is still there.
        revision: of `source`, on the hub.

    Raises:
        ConfigError: the folder is no pack, or `source` is no model on this machine.
        CorruptFileError: its manifest is damaged.
    """
    pack = open_pack(folder)
    if pack is None:
        raise ConfigError(f"{folder} has no {MANIFEST}: it is no pack")
    total = sum(pack.manifest["files"].values())
    done = 0

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    problems = _check_folder(pack)
    records = 0
    for name in pack.manifest["files"]:
        path = folder / name
        if not path.is_file():
            continue  # said already
        try:
            if str(path) in pack.expert_files:
                file = pack.open_file(str(path))
                records += file.layer.num_experts
                problems += bad_records(file, report)
            else:
                problems += bad_data(str(path), pack.source, report)
        except MoertError as error:
            problems.append(str(error))
    name = source or pack.manifest["source"]["name"]
    same = _is_same(pack, name, revision, asked=source is not None)
    if source is not None and not same:
        problems.append(f"it was made from {pack.manifest['source']['name']} or another revision, not from {source}")
    return PackCheck(
        pack.manifest["format"], len(pack.manifest["files"]), records, done, name, same, tuple(dict.fromkeys(problems))
    )


def _check_folder(pack: Pack) -> list[str]:
    """What is wrong with the files as such."""
    problems = []
    try:
        pack.check_files()
    except MoertError as error:
        problems.append(str(error))
    strange = [path for path in sorted(pack.folder.glob("*.safetensors")) if path.name not in pack.manifest["files"]]
    problems += [f"{path} is not in {MANIFEST}" for path in strange]
    settings = read_settings(str(pack.folder))
    if not is_pack_config(settings) or settings["quantization_config"].get("source") != pack.source:
        problems.append(f"{pack.folder / 'config.json'} is not that of this pack")
    try:
        indexed = {Path(path).name for path in shard_files(pack.folder)}
    except MoertError as error:
        return [*problems, str(error)]
    dense = {name for name in pack.manifest["files"] if not name.startswith("experts-")}
    if indexed != dense:
        problems.append(f"{pack.folder}: the index names {sorted(indexed ^ dense)[0]}, which is not in {MANIFEST}")
    return problems


def _is_same(pack: Pack, name: str, revision: str | None, *, asked: bool) -> bool | None:
    try:
        folder = local_folder(name, revision or pack.manifest["source"]["commit"])
        if folder is None:
            raise ConfigError(f"{name!r} is not on this machine")
        found = fingerprint(folder, shard_files(folder))
    except Exception:  # the hub's client may refuse a name in many ways
        if asked:
            raise
        return None
    return bool(found["fingerprint"] == pack.source)
