"""What the offload benchmark must know of a checkpoint, and the copy of it that transformers can offload."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moert.errors import ConfigError

EXPERTS_MODULE = re.compile(r"^(?P<path>.*(?<!shared_)experts)[._]")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Checkpoint:
    """Sizes of a checkpoint, from its headers."""

    folder: Path
    shards: list[Path]
    total_bytes: int
    record_bytes: int
    """Bytes of one expert."""
    vocabulary: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """The sizes of the checkpoint in `folder`.

    Raises:
        ConfigError: no safetensors checkpoint with experts in `folder`.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give a checkpoint's folder (make_checkpoint.py writes one)")
    config = json.loads((folder / "config.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    total_bytes, expert_bytes = 0, 0
    modules = set()
    for shard in shards:
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            total_bytes += last - first
            match = EXPERTS_MODULE.match(name)
            if match:
                expert_bytes += last - first
                modules.add(match["path"])
    experts = next((config[key] for key in EXPERT_COUNTS if key in config), 0)
    if not modules or not experts:
        raise ConfigError(f"{folder} holds no safetensors checkpoint of a mixture-of-experts model")
    return Checkpoint(folder, shards, total_bytes, expert_bytes // (len(modules) * experts), config["vocab_size"])


@contextlib.contextmanager
def prepared_for_hf(checkpoint: Checkpoint, scratch: Path | None) -> Iterator[Path]:
    """A copy of the checkpoint with experts fused as transformers holds them, removed at the end.

    From hub files, transformers would fuse all experts at each load and write them to its offload folder; this is done
    once, in a process of its own, and takes up to twice the checkpoint in `scratch` (None: the temporary folder).

    Raises:
        ConfigError: transformers could not write it.
    """
    with tempfile.TemporaryDirectory(prefix="moert-bench-hf-", dir=scratch) as folder:
        fused, offloaded = Path(folder) / "fused", Path(folder) / "offloaded"
        script = Path(__file__).with_name("systems.py")
        command = [sys.executable, str(script), "prepare-hf", str(checkpoint.folder), str(fused), str(offloaded)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"transformers cannot prepare {checkpoint.folder}: {done.stderr.strip()[-300:]}")
        for path in offloaded.iterdir():
            path.unlink()
        yield fused
