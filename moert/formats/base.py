"""The interface of a weight format, and the layout of a record."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an expert: its name within the experts module, its shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class RecordLayout:
    """Where each tensor of an expert starts in its record."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def packed(cls, specs: Sequence[TensorSpec]) -> RecordLayout:
        """The tensors one after the other, each at a multiple of 64 bytes."""
        offsets, end = [], 0
        for spec in specs:
            begin = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            offsets.append(begin)
            end = begin + spec.nbytes
        return cls(tuple(specs), tuple(offsets), end)

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> tensor, as views into `record`, a 1-D uint8 tensor of at least `nbytes` bytes."""
        return {
            spec.name: record[begin : begin + spec.nbytes].view(spec.dtype).view(spec.shape)
            for spec, begin in zip(self.specs, self.offsets, strict=True)
        }


class Format(ABC):
    """How an expert's tensors become the tensors that are stored, moved and read by a kernel."""

    @abstractmethod
    def stored(self, specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The tensors that stand for an expert whose own tensors are `specs`."""

    @abstractmethod
    def encode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An expert's own tensors -> the stored ones. New memory is the caller's; tensors may be passed through."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stored tensors -> the expert's own: what the stored ones mean."""
