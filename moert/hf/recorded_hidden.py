"""What a model's blocks are given while it runs: the hidden states that `pre_attention` is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moert.errors import MoertError, UnsupportedModelError
from moert.hf.recorded_model import experts_of
from moert.hf.router_weights import block_of
from moert.predictors.pre_attention import scale


class HiddenRecording:
    """The hooks of one `record_hidden`, and the states since the last `take`."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._states: dict[int, list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        try:
            for path, experts in experts_of(model).items():
                block = block_of(model, path)
                if block is None or experts.layer in self._states:
                    reason = "several modules share its experts" if block is not None else "it is in no list of blocks"
                    raise UnsupportedModelError(
                        f"{self._name}: what comes before the attention of {path} is not known: {reason}"
                    )
                self._states[experts.layer] = []
                self._handles.append(
                    block.register_forward_pre_hook(_Note(self._states[experts.layer]), with_kwargs=True)
                )
        except BaseException:
            self.remove()
            raise

    def take(self) -> npt.NDArray[np.float16]:
        """[T, L, D] of the tokens since the last time, in their order, each scaled to a mean square of 1. The caller's.

        One sequence must have run in the meantime, alone. Blocks until the device is done.

        Raises:
            MoertError: the layers' blocks were given different tokens, or none.
        """
        states = [torch.cat(self._states[layer]) if self._states[layer] else None for layer in sorted(self._states)]
        for noted in self._states.values():
            noted.clear()
        shapes = {None if one is None else tuple(one.shape) for one in states}
        if len(shapes) != 1 or None in shapes:
            raise MoertError(f"{self._name}: its blocks were given different hidden states: {sorted(map(str, shapes))}")
        return torch.stack([one for one in states if one is not None], dim=1).numpy()

    def remove(self) -> None:
        """Take the hooks out. Idempotent."""
        while self._handles:
            self._handles.pop().remove()


class _Note:
    """Keeps what a block is given."""

    def __init__(self, states: list[torch.Tensor]) -> None:
        self._states = states

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and hidden.is_floating_point() and hidden.dim() > 1:
            # Scaled, no number is above the root of D, which 16 bits hold.
            self._states.append(scale(hidden.detach().reshape(-1, hidden.shape[-1])).to(torch.float16).cpu())


@contextmanager
def record_hidden(model: nn.Module) -> Iterator[HiddenRecording]:
    """Note what the blocks of `model`, patched or not, are given within the `with` statement.

    Raises:
        UnsupportedModelError: a layer's block is not known.
    """
    recording = HiddenRecording(model)
    try:
        yield recording
    finally:
        recording.remove()
