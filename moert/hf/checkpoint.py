"""From a checkpoint's tensor names to each expert's bytes, by transformers' own table and with no per-model code.

transformers turns checkpoint tensors into model parameters by renamings and by converters (stack the experts, put
gate and up together, transpose, ...). Here the same table is asked, for one expert at a time, which tensors it is made
of and in which order, and the converter's own operations are run on that expert alone where bytes must be rearranged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moert.errors import CorruptFileError, UnsupportedModelError
from moert.hf.adapters import ExpertsAdapter
from moert.runtime.records import Convert, Piece, Source, Span
from moert.tiers.safetensors_file import TensorEntry

# Operations that treat every expert alike, so that running them on one expert gives that expert's part of the result.
_PER_EXPERT_OPERATIONS = (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
)


@dataclass
class _Target:
    """One stacked parameter: the checkpoint tensors that make it, by the converter's source pattern."""

    name: str
    first_name: str
    converter: WeightConverter | None
    keys: dict[str, list[str]]


class CheckpointMap:
    """For each stacked experts parameter of `model`, the checkpoint tensors behind each expert."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Mapping[str, ExpertsAdapter],
        dtypes: Mapping[str, torch.dtype],
        entries: Mapping[str, TensorEntry],
        key_mapping: dict[str, str] | None = None,
    ) -> None:
        """Read the mapping; no I/O.

        Args:
            model: on the meta device, its experts modules already replaced.
            adapters: experts module path -> adapter of the module that was there.
            dtypes: full parameter name -> dtype that the expert shall have in memory.
            entries: every tensor of the checkpoint.
        """
        self._entries = entries
        self._config = model.config
        self._dtypes = dtypes
        self._shapes = {
            f"{path}.{name}": tuple(adapter.stacked(name).shape)
            for path, adapter in adapters.items()
            for name in adapter.names
        }
        self._files = {path: number for number, path in enumerate(sorted({entry.path for entry in entries.values()}))}
        self._targets = self._match(model, key_mapping)

    @property
    def paths(self) -> list[str]:
        """The files that a `Span.file` counts, in order."""
        return list(self._files)

    @property
    def expert_keys(self) -> set[str]:
        """The checkpoint's tensors that nothing but experts is made of."""
        shared = {target.first_name for target in self._targets.values() if not self._makes_experts_only(target)}
        return {
            key
            for target in self._targets.values()
            if target.first_name not in shared
            for keys in target.keys.values()
            for key in keys
        }

    def _makes_experts_only(self, target: _Target) -> bool:
        first, *others = target.converter.target_patterns if target.converter is not None else [target.first_name]
        return all(target.first_name.replace(first, other) in self._shapes for other in (first, *others))

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has tensors for the stacked parameter `name`."""
        return name in self._targets

    def _match(self, model: PreTrainedModel, key_mapping: dict[str, str] | None) -> dict[str, _Target]:
        mapping = get_model_conversion_mapping(model, key_mapping)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted: dict[str, Any] = {**model.state_dict(), **dict.fromkeys(self._shapes, True)}
        prefix = model.base_model_prefix
        first_targets: dict[str, _Target] = {}
        # The loader's own order, by number: it is the order of the experts.
        for key in sorted(self._entries, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], prefix, wanted)
            if name not in self._shapes:
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            target = first_targets.setdefault(name, _Target(name, name, converter, defaultdict(list)))
            target.keys[pattern or key].append(key)
        targets = {}
        for first_name, target in first_targets.items():
            names = [first_name]
            if target.converter is not None:
                # A converter with several targets collects everything under the first one.
                first, *others = target.converter.target_patterns
                names += [first_name.replace(first, other) for other in others]
            for name in names:
                if name in self._shapes:
                    targets[name] = _Target(name, first_name, target.converter, target.keys)
        return targets

    def source(self, name: str, num_experts: int, expert: int, shape: tuple[int, ...]) -> Source:
        """What one expert's part of the stacked parameter `name` is made of.

        Args:
            shape: of the part, as the model wants it.

        Raises:
            CorruptFileError: the checkpoint's tensors cannot be that.
            UnsupportedModelError: they need an operation that cannot be done expert by expert.
        """
        target = self._targets[name]
        picked = self._pick(target, num_experts, expert, shape)
        pieces = tuple(piece for group in picked.values() for piece in group)
        for piece in pieces:
            if not (piece.dtype.is_floating_point and self._dtypes[name].is_floating_point):
                raise CorruptFileError(
                    f"{self.paths[piece.span.file]}: tensor {piece.name!r} is {piece.dtype}, "
                    f"{name} is {self._dtypes[name]}; the checkpoint is packed or of another model"
                )
        convert = self._conversion(target, picked)
        made = self._dry_run(target, pieces, convert)
        if made != shape:
            raise CorruptFileError(
                f"{self.paths[pieces[0].span.file]}: tensor {pieces[0].name!r} of shape {list(pieces[0].shape)} gives "
                f"expert {expert} of {name} the shape {list(made)}, the model wants {list(shape)}"
            )
        return Source(pieces, convert)

    def _pick(
        self, target: _Target, num_experts: int, expert: int, shape: tuple[int, ...]
    ) -> dict[str, tuple[Piece, ...]]:
        """Source pattern -> the pieces of this expert, in the converter's order of patterns."""
        converter, stacked = target.converter, self._shapes[target.name]
        patterns = [p for p in converter.source_patterns if p in target.keys] if converter else list(target.keys)
        if converter is not None and len(patterns) < len(converter.source_patterns):
            absent = next(p for p in converter.source_patterns if p not in target.keys)
            raise CorruptFileError(f"the checkpoint has no tensors {absent!r} for {target.name}; it is incomplete")
        n_targets = len(converter.target_patterns) if converter is not None else 1
        side = self._side(target)
        picked: dict[str, tuple[Piece, ...]] = {}
        for pattern in patterns:
            keys = target.keys[pattern]
            first = self._entries[keys[0]]
            if len(keys) == 1 and n_targets == 1 and len(first.shape) == len(stacked):
                picked[pattern] = (self._row(target, first, expert, shape),)
            elif len(keys) >= n_targets * num_experts and len(keys) % n_targets == 0:
                key = keys[side * (len(keys) // n_targets) + expert]
                picked[pattern] = (self._whole(self._entries[key]),)
            else:
                raise CorruptFileError(
                    f"the checkpoint has {len(keys)} tensors {pattern!r} for the {n_targets * num_experts} experts of "
                    f"{target.name} (the last is {keys[-1]!r}); it is incomplete"
                )
        return picked

    def _side(self, target: _Target) -> int:
        """Which of the converter's targets this parameter is."""
        if target.converter is None:
            return 0
        first, *_ = patterns = target.converter.target_patterns
        return next(i for i, other in enumerate(patterns) if target.first_name.replace(first, other) == target.name)

    def _whole(self, entry: TensorEntry) -> Piece:
        return self._piece(entry, entry.offset, entry.nbytes, entry.shape)

    def _row(self, target: _Target, entry: TensorEntry, expert: int, shape: tuple[int, ...]) -> Piece:
        """One expert's part of a tensor that is stacked on disk."""
        stacked = self._shapes[target.name]
        # Experts either have a dimension of their own, or are blocks of rows (then the model's shapes have equal rank).
        rows, part = (1, entry.shape[1:]) if len(shape) < len(stacked) else (shape[0], (shape[0], *entry.shape[1:]))
        if entry.shape[0] < (expert + 1) * rows:
            raise CorruptFileError(
                f"{entry.path}: tensor {entry.name!r} has shape {list(entry.shape)}, the model wants {list(stacked)} "
                f"for {target.name}"
            )
        row_bytes = rows * (entry.nbytes // entry.shape[0])
        return self._piece(entry, entry.offset + expert * row_bytes, row_bytes, part)

    def _piece(self, entry: TensorEntry, offset: int, nbytes: int, shape: tuple[int, ...]) -> Piece:
        dtype = entry.torch_dtype
        if dtype is None:
            raise UnsupportedModelError(
                f"{entry.path}: tensor {entry.name!r} has dtype {entry.dtype}, unknown to moert"
            )
        return Piece(Span(self._files[entry.path], offset, nbytes), tuple(shape), dtype, entry.name)

    def _conversion(self, target: _Target, picked: Mapping[str, Sequence[Piece]]) -> Convert | None:
        """How the pieces become the tensor; None where they only stand one after the other."""
        converter = target.converter
        if converter is None:
            return None
        for operation in converter.operations:
            if not isinstance(operation, _PER_EXPERT_OPERATIONS):
                raise UnsupportedModelError(
                    f"{target.name}: transformers converts its checkpoint with {operation!r}, which moert cannot do "
                    "expert by expert"
                )
        if all(_only_stacks(operation) for operation in converter.operations):
            return None
        return partial(
            _run_operations, converter, target.first_name, self._side(target), self._config, self._shapes, tuple(picked)
        )

    def _dry_run(self, target: _Target, pieces: Sequence[Piece], convert: Convert | None) -> tuple[int, ...]:
        """The shape that the pieces give, found on the meta device."""
        tensors = [torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in pieces]
        try:
            return tuple(Source(tuple(pieces), convert).tensor(tensors).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptFileError(
                f"{target.name}: tensors {pieces[0].name!r} of shapes {[list(p.shape) for p in pieces]} do not fit "
                f"together: {error}"
            ) from error


def _only_stacks(operation: object) -> bool:
    """Whether the operation only puts one expert's tensors one after the other along their first dimension."""
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    if isinstance(operation, Concatenate):
        return operation.dim == 1
    if isinstance(operation, ErnieFuseAndSplitTextVisionExperts):
        return operation.stack_dim == 0 and operation.concat_dim == 1
    return False


class _OneExpert:
    """What an operation may ask of "the model": the shape that a parameter would have with a single expert."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self._shapes[name][1:]), device="meta")


def _run_operations(
    converter: WeightConverter,
    first_name: str,
    side: int,
    config: object,
    shapes: Mapping[str, tuple[int, ...]],
    patterns: tuple[str, ...],
    tensors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Run a converter on the tensors of a single expert, one for each pattern."""
    merges = any(isinstance(operation, MergeModulelist) for operation in converter.operations)
    collected: dict[str, Any] = {
        pattern: [tensor if merges else tensor.unsqueeze(0)] for pattern, tensor in zip(patterns, tensors, strict=True)
    }
    for operation in converter.operations:
        collected = operation.convert(
            collected,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=first_name,
            model=_OneExpert(shapes),
            config=config,
            missing_keys=None,
        )
    result = collected[converter.target_patterns[side]]
    return (result[0] if isinstance(result, list) else result)[0]
