"""What the tests ask of an offloaded model, against the specimen it came from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

import moert

from .checkpoints import Specimen
from .models import expert_parameter_names, experts_modules, greedy_tokens, logits

RELATIVE_TOLERANCE = 1e-5
"""Sums of an expert's products may be ordered otherwise than in eager mode; everything else is the same arithmetic."""

BF16_TOLERANCE = 2**-6
"""One rounding of bf16 is 2**-8 of a value; sums in another order may differ by a few."""


class Call(NamedTuple):
    """One call of an experts module."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.ids, self.weights


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def experts_paths(model: nn.Module) -> list[str]:
    """Where the experts modules of a plain model are."""
    return [path for path, _ in experts_modules(model)]


def calls_of(model: Any, inputs: dict[str, Any], paths: Iterable[str]) -> dict[str, Call]:
    """The last call of each module of `paths` in one forward of the model; one that never ran is not in it."""
    calls: dict[str, Call] = {}

    def record(path: str) -> Any:
        def note(_module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            hidden, ids, weights = arguments
            calls[path] = Call(hidden, ids, weights, output)

        return note

    hooks = [model.get_submodule(path).register_forward_hook(record(path)) for path in paths]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return calls


def assert_same_logits(model: Any, specimen: Specimen) -> None:
    """One forward gives the specimen's logits."""
    error = relative_error(logits(model, specimen.inputs), specimen.logits)
    assert error <= RELATIVE_TOLERANCE, f"logits differ by {error:.2e} of the largest"


def assert_same_results(model: Any, specimen: Specimen) -> None:
    """One forward gives the specimen's logits, and generation its tokens."""
    assert_same_logits(model, specimen)
    found = greedy_tokens(model, specimen.inputs)
    assert torch.equal(found, specimen.tokens), f"greedy tokens are {found}, not {specimen.tokens}"


def assert_offloaded(model: Any, specimen: Specimen, share: float) -> None:
    """Experts have run, at most `share` of their bytes are resident, and the model has no expert parameters."""
    stats = moert.stats(model).as_dict()
    assert stats["hits"] + stats["misses"] > 0, "no expert was asked for"
    assert 0 < stats["resident_bytes"] <= share * specimen.expert_bytes, (
        f"{stats['resident_bytes']} of {specimen.expert_bytes} bytes are resident"
    )
    left = expert_parameter_names(specimen.model) & set(model.state_dict())
    assert not left, f"expert weights are in the state dict: {sorted(left)}"


def assert_dense_weights_loaded(model: nn.Module, specimen: Specimen) -> None:
    """Every weight but the experts' is there, bit for bit, and nothing else."""
    expected = specimen.model.state_dict()
    for name in expert_parameter_names(specimen.model):
        del expected[name]
    found = model.state_dict()
    assert found.keys() == expected.keys(), f"lost or gained: {sorted(found.keys() ^ expected.keys())}"
    changed = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not changed, f"changed: {changed}"
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not empty, f"on the meta device: {empty}"


def assert_same_objects(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same names in the same order, and under each the very same object."""
    assert list(found) == list(expected), f"lost or gained: {sorted(found.keys() ^ expected.keys())}"
    others = [name for name, value in expected.items() if found[name] is not value]
    assert not others, f"other objects: {others}"
