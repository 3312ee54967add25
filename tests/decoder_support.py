"""Single tokens through a patched model, in one call of the kernels and by the layers' own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import moert
from moert.hf import dense_compute, layer_chain
from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.dense_compute import count
from moert.hf.self_attention import SelfAttentionForward
from moert.kernels.self_attention import SelfAttention
from moert.kernels.token_layer import LayerOutput, LayersOneByOne, TokenLayer

PROMPT = torch.tensor([[5, 3, 9, 11, 2, 8, 1]])
STEPS = 5


class Counted:
    """How often attentions and whole layers ran as one call, and how often with the experts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attentions = self.layers = self.complete = self.ahead = 0
        attend, runs = SelfAttention.run, {kind: kind.run for kind in (TokenLayer, LayersOneByOne)}

        def attention(kernel: SelfAttention, *args: Any) -> Any:
            found = attend(kernel, *args)
            self.attentions += found is not None
            return found

        def layer(kernel: TokenLayer | LayersOneByOne, *args: Any) -> LayerOutput | None:
            found = runs[type(kernel)](kernel, *args)
            self.layers += found is not None
            self.complete += found is not None and found.output is not None
            return found

        def layers(*args: Any) -> Any:
            found = run_layers(*args)
            if found is not None:
                self.layers += len(found.experts_s)
                self.complete += len(found.experts_s)
                self.ahead += len(found.experts_s) - 1
            return found

        run_layers = layer_chain.run_layers
        monkeypatch.setattr(SelfAttention, "run", attention)
        for kind in runs:
            monkeypatch.setattr(kind, "run", layer)
        monkeypatch.setattr(layer_chain, "run_layers", layers)

    def take(self) -> tuple[int, int, int]:
        """Since the last time."""
        counts = self.attentions, self.layers, self.complete
        self.attentions = self.layers = self.complete = self.ahead = 0
        return counts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@contextmanager
def layers_own_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that are patched within it run the code of their classes, with moert's kernels for its parts."""
    with monkeypatch.context() as patch:
        for name in ("self_attention_forward", "block_forward", "decoder_layer_forward"):
            patch.setattr(dense_compute, name, lambda module: None)
        yield


def decode(
    model: Any, ids: torch.Tensor = PROMPT, cache: Any = None, steps: int = STEPS, grad: bool = False, **given: Any
) -> torch.Tensor:
    """The logits [B, steps, vocabulary] of tokens that follow the prompt one by one."""
    mask = given.pop("attention_mask", None)
    with torch.set_grad_enabled(grad):
        cache = DynamicCache(config=model.config) if cache is None else cache
        found = []
        model(ids, attention_mask=mask, past_key_values=cache, **given)
        for step in range(steps):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(torch.full((len(ids), 1), 7 + step), attention_mask=mask, past_key_values=cache, **given)
            found.append(out.logits[:, -1].detach())
    return torch.stack(found, 1)


def both_ways(
    model: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[[Any], Any] = decode, budget: str = "100%"
) -> tuple[Any, Any]:
    """What `run` gives with the layers' own code, and in one call a token."""
    with layers_own_code(monkeypatch), moert.patch(model, host_memory=budget):
        assert count(model, DecoderLayerForward) == count(model, SelfAttentionForward) == 0
        wanted = run(model)
    with moert.patch(model, host_memory=budget):
        return wanted, run(model)


def training(model: Any) -> torch.Tensor:
    """Decoded while the model is being trained."""
    model.train()
    try:
        return decode(model)
    finally:
        model.eval()


def autocast(model: Any) -> torch.Tensor:
    """Decoded within autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return decode(model)
