"""Where a model's tensors were before they were moved to a device, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moert.device.base import DeviceLostError

Homes = Mapping[str, torch.device]
"""Name of a parameter or buffer -> where it was."""


def dense_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of `model` by its name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def note_homes(model: nn.Module) -> Homes:
    """Where everything is now."""
    return {name: tensor.device for name, tensor in dense_tensors(model).items()}


def move_back(model: nn.Module, homes: Homes) -> None:
    """Bring every tensor back to where it was; parameters stay the same objects. Blocks.

    Raises:
        DeviceLostError: some are on a device that has been lost, and lost with it.
    """
    try:
        for name, tensor in dense_tensors(model).items():
            home = homes.get(name, tensor.device)
            if tensor.device == home:
                continue
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if leaf in module._parameters:
                tensor.data = tensor.data.to(home)
            else:
                module._buffers[leaf] = tensor.to(home)
    except RuntimeError as error:
        if "CUDA" not in str(error):
            raise
        raise DeviceLostError(
            f"the weights around the experts were on a device that has been lost ({error}); load the model again"
        ) from error
