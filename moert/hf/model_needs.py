"""What a checkpoint's model asks of memory, from its configuration and file headers alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from moert.hf.cache_needs import cache_layers, longest_context
from moert.hf.inspection import Planner, inspection_of, plan_checkpoint
from moert.planning.model import CacheLayer, ModelNeeds


def read_needs(folder: Path, *, dtype: str = "auto") -> ModelNeeds:
    """The needs of the checkpoint in `folder`; reads headers, no weights.

    Args:
        dtype: as for `from_pretrained`.

    Raises:
        ConfigError, UnsupportedModelError, CorruptFileError, TransferError: loading would raise the same.
    """
    plan = plan_checkpoint(folder, Planner(), dtype=dtype)
    found = inspection_of(plan)
    cache: tuple[CacheLayer, ...] | None = None
    problem = ""
    try:
        cache = cache_layers(plan.model)
    except Exception as error:  # any model's own code runs here
        problem = f"its attention cannot be run without weights ({type(error).__name__}: {error})"
    return ModelNeeds(
        name=found.architecture,
        layers=found.needs,
        dense_bytes=found.dense_bytes,
        dense_read_bytes=found.dense_bytes - _unread_bytes(plan.model),
        cache=cache,
        cache_problem=problem,
        longest_context=longest_context(plan.model),
        weight_bits=_weight_bits(found.stored_as, plan.dtype),
    )


def _weight_bits(stored_as: tuple[str, ...], dtype: torch.dtype) -> float:
    """Of a weight as it is stored, without its share of scales."""
    if not stored_as:
        return float(torch.finfo(dtype).bits)
    return min(4.0 if "4" in name.partition(",")[0] else 8.0 for name in stored_as)


def _unread_bytes(model: PreTrainedModel) -> int:
    """Of the table of input embeddings, of which a token reads one row, unless it is the output's too."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    is_tied = head is weight or getattr(model.config, "tie_word_embeddings", False)
    return 0 if weight is None or is_tied else int(weight.nbytes)
