"""The experts of a HuggingFace checkpoint, read from its own files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moert.errors import CorruptFileError, UnsupportedModelError
from moert.hf.checkpoint import CheckpointMap
from moert.runtime.layer import LayerSpec
from moert.runtime.records import Record, Source, make_record
from moert.tiers.disk import ShardFile
from moert.tiers.safetensors_file import TensorEntry, read_entries


def read_checkpoint(files: Sequence[str] | None) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint's files, by name; headers only.

    Raises:
        UnsupportedModelError: the checkpoint is not in safetensors.
        CorruptFileError, TransferError: as `read_entries` raises them.
    """
    other = [file for file in files or () if not str(file).endswith(".safetensors")]
    if not files or other:
        raise UnsupportedModelError(
            f"moert reads experts from safetensors files, this checkpoint is {other[:1] or 'not on disk'}; convert it "
            "with save_pretrained, or load it with transformers and use moert.patch"
        )
    entries: dict[str, TensorEntry] = {}
    for file in files:
        entries.update(read_entries(file))
    return entries


class CheckpointSource:
    """The records of all experts, in the checkpoint's own files. Opens the files; owns them until `close`."""

    def __init__(self, paths: Sequence[str], records: Sequence[Sequence[Record]], *, direct: bool) -> None:
        """Open `paths` for reading, past the page cache if `direct`; `records[layer][expert]` count files by them.

        Raises:
            TransferError: a file cannot be opened.
        """
        self._records = records
        self.files: list[ShardFile] = []
        try:
            for path in paths:
                self.files.append(ShardFile(path, direct=direct))
        except BaseException:
            self.close()
            raise

    def record(self, layer: int, expert: int) -> Record:
        return self._records[layer][expert]

    def close(self) -> None:
        for file in self.files:
            file.close()


def checkpoint_records(
    mapping: CheckpointMap, specs: Iterable[LayerSpec], paths_of: Mapping[int, Sequence[str]]
) -> list[list[Record]]:
    """The record of every expert of every layer; no I/O.

    Args:
        paths_of: layer index -> paths of the modules that have the layer's experts; the checkpoint names one of them.

    Raises:
        CorruptFileError: the checkpoint lacks a layer's tensors, or as `CheckpointMap.source` raises it.
        UnsupportedModelError: as `CheckpointMap.source` raises it.
    """
    records = []
    for spec in specs:
        path = _path_in_checkpoint(mapping, spec, paths_of[spec.index])
        layer = []
        for expert in range(spec.num_experts):
            sources: list[Source] = [
                mapping.source(f"{path}.{tensor.name}", spec.num_experts, expert, tensor.shape)
                for tensor in spec.tensors
            ]
            layer.append(make_record(spec.tensors, sources))
        records.append(layer)
    return records


def _path_in_checkpoint(mapping: CheckpointMap, spec: LayerSpec, paths: Sequence[str]) -> str:
    for path in paths:
        if all(f"{path}.{tensor.name}" in mapping for tensor in spec.tensors):
            return path
    lost = next(name for tensor in spec.tensors if (name := f"{spec.name}.{tensor.name}") not in mapping)
    raise CorruptFileError(
        f"the checkpoint has no tensors for {lost!r}; it is incomplete, or of another architecture than its config.json"
    )
