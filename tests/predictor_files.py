"""Small files of trained predictors, for any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moert.predictors._routing_path import PathShape, RoutingPath
from moert.predictors._trained import About, Array, save_trained
from moert.predictors.base import Model

WIDTH = 16
"""Of the hidden states that `pre_attention` expects."""

VOCABULARY = 64
"""Ids below it are known."""

SIZES = {"width": 8, "inner": 16, "heads": 2, "head_size": 4, "depth": 1, "window": 8, "prompt": 8}
"""Of the network of `expertflow`."""


def make_file(name: str, model: Model, folder: Path) -> Path:
    """The path of a file for the predictor `name` of `model`, made by chance; KeyError for one that has no files."""
    tensors, options = _MAKERS[name](model)
    path = folder / f"{name}.safetensors"
    about = About(name, model.num_experts, model.top_k, model.name, model.config_hash, options=dict(options))
    save_trained(path, about, tensors)
    return path


def _token_table(model: Model) -> tuple[dict[str, Array], dict[str, int]]:
    rng = np.random.default_rng(0)
    layers, most = model.num_layers, max(model.num_experts)
    kept = min(*model.num_experts, 6)
    experts = np.stack([[rng.permutation(n)[:kept] for n in model.num_experts] for _ in range(VOCABULARY)])
    prior = rng.random((layers, most)) * (np.arange(most)[None] < np.array(model.num_experts)[:, None])
    return {
        "token_ids": np.arange(VOCABULARY),
        "prior": (prior / 2).astype(np.float32),
        "seen": np.full((VOCABULARY, layers), 9, dtype=np.uint16),
        "experts": experts.astype(np.uint16),
        "counts": rng.integers(0, 9, experts.shape).astype(np.uint16),
        "prior_weight": np.ones(1, dtype=np.float32),
    }, {}


def _expertflow(model: Model) -> tuple[dict[str, Array], dict[str, int]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RoutingPath(PathShape(VOCABULARY, sum(model.num_experts), **SIZES))
    weights = {name: weight.numpy() for name, weight in network.state_dict().items()}
    return {"token_ids": np.arange(VOCABULARY), **weights}, SIZES


def _expertflow_routing(model: Model) -> tuple[dict[str, Array], dict[str, int]]:
    options = {name: size for name, size in SIZES.items() if name != "prompt"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = PathShape(0, sum(model.num_experts), prompt=0, picks=sum(model.top_k), **options)
        network = RoutingPath(shape)
    return {name: weight.numpy() for name, weight in network.state_dict().items()}, options


def _pre_attention(model: Model) -> tuple[dict[str, Array], dict[str, int]]:
    rng = np.random.default_rng(0)
    shape = (model.num_layers, max(model.num_experts))
    weight = rng.standard_normal((*shape, WIDTH)).astype(np.float16)
    return {"weight": weight, "bias": rng.standard_normal(shape).astype(np.float32)}, {}


_MAKERS: dict[str, Callable[[Model], tuple[dict[str, Array], dict[str, int]]]] = {
    "expertflow": _expertflow,
    "expertflow_routing": _expertflow_routing,
    "pre_attention": _pre_attention,
    "token_table": _token_table,
}
