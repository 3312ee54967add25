"""What a trace holds: a header about the model, and sequences of tokens with the experts that each layer chose."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

NO_EXPERT = -1
"""Fills an id's place where a token had no expert there: a layer that did not run, or one with fewer picks."""


class Phase(IntEnum):
    """What a token was to the model when it ran."""

    PREFILL = 0
    """Of the prompt."""
    DECODE = 1
    """Generated before, and fed back."""
    PADDING = 2
    """Filling up a batch. It is routed like the others, and its experts are fetched."""


@dataclass(frozen=True)
class LayerInfo:
    """One layer of experts (one experts module), in the order in which they run."""

    name: str
    num_experts: int
    top_k: int
    """Most experts that a token has here in this trace."""
    native_top_k: int | None = None
    """What the model was trained with; None: unknown. A trace with fewer is one of reduced top-k."""
    expert_bytes: int = 0
    """Of one expert; 0: unknown."""


@dataclass(frozen=True)
class TraceHeader:
    """What is true of a whole trace."""

    layers: tuple[LayerInfo, ...]
    model: str = ""
    """The model's id, or the last part of its path; empty: unknown."""
    config_hash: str = ""
    """Of the model's configuration (`moert.hf.fingerprint`); empty: unknown."""
    sampled: bool | None = None
    """Whether the model chose the tokens itself; False: teacher-forced, the text was given; None: unknown."""
    source: str = "moert"
    """What the trace was made from: "moert" if recorded, else the importer's name."""

    @property
    def top_k(self) -> int:
        """The most of any layer: K of a sequence's arrays."""
        return max(layer.top_k for layer in self.layers)


@dataclass(frozen=True)
class Sequence:
    """One sequence of T tokens through L layers, in order. The arrays are the caller's and are not written to."""

    experts: npt.NDArray[np.int32]
    """[T, L, K] ids in the router's order, `NO_EXPERT` where there is none."""
    steps: npt.NDArray[np.int64]
    """[T], ascending but not strictly: the number of the forward pass in which the token ran, counted over the whole
    trace. Tokens of one number ran together, those of a batch in several sequences: each layer's experts for all of
    them are one event."""
    phases: npt.NDArray[np.uint8]
    """[T] of `Phase`."""
    weights: npt.NDArray[np.float32] | None = None
    """[T, L, K]: the router weights of the picks, as the experts' outputs were weighted; 0 where there is no expert."""
    scores: npt.NDArray[np.float32] | None = None
    """[T, L, E]: the router's probabilities for every expert; 0 beyond a layer's own number."""
    token_ids: npt.NDArray[np.int64] | None = None
    """[T]"""
    name: str = ""
