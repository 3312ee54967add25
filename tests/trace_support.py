"""Traces for tests: random ones, and real ones that are not part of the project."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence as Items
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moert.trace import NO_EXPERT, LayerInfo, Phase, Sequence, TraceHeader
from moert.trace.importers.base import ImportOptions
from moert.trace.importing import load_importer

ROOT = Path(__file__).resolve().parent.parent

WASTE = "".join(
    json.dumps({"tok": tok, "layers": layers}) + "\n"
    for tok, layers in [(3, [[0, 5], [1, 2]]), (4, [[5, 6], [2, 7]]), (5, [[0, 1], [1, 2]])]
)
"""A trace of three tokens in the format `waste`."""

BIGMOE = """# route_trace v1
# model=/data/tmp/Tiny.gguf arch=tiny n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=50 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.75,0,100
0,0,0,0,1,1,0.25,0,100
0,0,1,0,0,3,0.5,0,0
0,0,1,0,1,2,0.5,0,100
0,0,1,1,0,7,0.9,0,50
0,0,1,1,1,6,0.1,0,50
0,1,2,0,0,5,1,1,0
0,1,2,0,1,4,0,1,0
0,1,2,1,0,0,1,1,0
0,1,2,1,1,1,0,1,0
1,1,0,0,0,5,1,1,0
1,1,0,0,1,4,0,1,0
1,1,0,1,0,0,1,1,0
1,1,0,1,1,1,0,1,0
"""
"""Two turns in the format `bigmoe`; the first token of the prompt did not run the last layer."""


def real_trace(*parts: str) -> Path:
    """A file or folder of real traces, in `MOERT_TRACES` or `shared/traces` beside the repository; else a skip."""
    folder = Path(os.environ.get("MOERT_TRACES") or ROOT.parent / "shared" / "traces")
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"there is no {path}; MOERT_TRACES says where real traces are")
    return path


def make_header(*layers: tuple[int, int], **known: object) -> TraceHeader:
    """A header of layers given as (experts, top-k)."""
    infos = tuple(LayerInfo(f"model.layers.{i}.experts", experts, k) for i, (experts, k) in enumerate(layers))
    return TraceHeader(infos, **known)  # type: ignore[arg-type]


def random_sequence(
    header: TraceHeader,
    num_tokens: int,
    rng: np.random.Generator,
    *,
    optional: Items[str] = (),
    num_prompt: int = 0,
    first_step: int = 0,
    gaps: bool = False,
    name: str = "",
) -> Sequence:
    """A valid sequence: a prompt in one step, then decoded tokens. Floats are exact in 16 bits."""
    layers = header.layers
    experts = np.full((num_tokens, len(layers), header.top_k), NO_EXPERT, dtype=np.int32)
    for token in range(num_tokens):
        for index, layer in enumerate(layers):
            count = int(rng.integers(0, layer.top_k + 1)) if gaps else layer.top_k
            experts[token, index, :count] = rng.permutation(layer.num_experts)[:count]
    widest = max(layer.num_experts for layer in layers)
    scores = np.zeros((num_tokens, len(layers), widest), dtype=np.float32)
    for index, layer in enumerate(layers):
        scores[:, index, : layer.num_experts] = rng.integers(0, 1024, (num_tokens, layer.num_experts)) / 1024
    weights = np.where(experts == NO_EXPERT, 0, rng.integers(1, 1024, experts.shape) / 1024).astype(np.float32)
    place = np.arange(num_tokens)
    return Sequence(
        experts=experts,
        steps=(first_step + np.maximum(place - max(num_prompt - 1, 0), 0)).astype(np.int64),
        phases=np.where(place < num_prompt, Phase.PREFILL, Phase.DECODE).astype(np.uint8),
        weights=weights if "weights" in optional else None,
        scores=scores if "scores" in optional else None,
        token_ids=rng.integers(0, 2**31, num_tokens) if "token_ids" in optional else None,
        name=name,
    )


def assert_same(found: Sequence, expected: Sequence) -> None:
    """Both have the same arrays, dtypes included, and the same name."""
    for field in fields(Sequence):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert isinstance(a, np.ndarray), field.name
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def read_with(importer: str, path: Path, **options: Any) -> tuple[TraceHeader, list[Sequence]]:
    """All that an importer finds in a file."""
    header, sequences = load_importer(importer).read(path, ImportOptions(**options))
    return header, list(sequences)


def random_ids(num_tokens: int, seed: int = 0, layers: int = 3) -> Any:
    """Ids [T, layers, 2] of 8 experts."""
    header = make_header(*[(8, 2)] * layers)
    return random_sequence(header, num_tokens, np.random.default_rng(seed)).experts


def npz_arrays() -> dict[str, Any]:
    """Three sequences in the format `npz`, the second marked as repetition."""
    rng = np.random.default_rng(0)
    header = make_header((8, 2), (8, 2))
    arrays: dict[str, Any] = {}
    for number in range(3):
        sequence = random_sequence(header, 2 + number, rng, optional=["weights"])
        assert sequence.weights is not None
        arrays[f"experts_{number:03}"] = sequence.experts.astype(np.uint8)
        arrays[f"weights_{number:03}"] = sequence.weights.astype(np.float16)
    arrays["meta_json"] = np.array(json.dumps([{"path": f"p{n}", "repetition": n == 1} for n in range(3)]))
    return arrays


def replaced(text: str, line: int, new: str | None) -> str:
    """`text` with another line, counted from 1; None: without it."""
    lines = text.splitlines(keepends=True)
    lines[line - 1 : line] = [] if new is None else [new + "\n"]
    return "".join(lines)
