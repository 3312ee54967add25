"""Layers that have taken a token take the next one together, until anything about them is other than it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from decoder_support import PROMPT
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moert
from moert.hf.known_layers import KnownLayers
from moert.hf.layer_chain import LayerChain

if TYPE_CHECKING:
    from families import Zoo


class Decoding:
    """A model in the middle of a text, and what its first layer was last called with."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.calls: list[tuple[int, Any, dict[str, Any]]] = []
        self._chains: list[LayerChain] = []
        begin = LayerChain._begin

        def note(chain: LayerChain, place: int, x: Any, arguments: dict[str, Any], *fewest: int) -> Any:
            self.calls.append((place, x, arguments))
            self._chains.append(chain)
            return begin(chain, place, x, arguments, *fewest)

        monkeypatch.setattr(LayerChain, "_begin", note)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
            for _ in range(3):
                model(PROMPT[:, :1], past_key_values=cache)
        self.place, self.x, self.arguments = self.calls[-1]
        self.layers = model.model.layers
        self.block = self.layers[1].mlp
        self.attention = self.layers[1].self_attn

    @property
    def known(self) -> KnownLayers:
        return self._chains[-1]._known[0]

    def taken(self, **changed: Any) -> int | None:
        """How many layers take the next token."""
        with torch.no_grad():
            tokens = self.known.tokens(self.x, {**self.arguments, **changed})
        return None if tokens is None else len(tokens)

    def taken_one_by_one(self) -> int:
        with torch.no_grad():
            return len(self._chains[-1]._take(0, self.x, self.arguments)[0])


@pytest.fixture
def decoding(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoding]:
    model = moert.patch(zoo.fresh("qwen3_moe", torch.bfloat16), host_memory="100%")
    yield Decoding(model, monkeypatch)
    moert.close(model)


@contextmanager
def _set(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    yield
    setattr(holder, name, before)


@contextmanager
def _item(holder: Any, key: Any, value: Any) -> Iterator[None]:
    before = holder[key]
    holder[key] = value
    yield
    holder[key] = before


@contextmanager
def _until(handle: Any) -> Iterator[None]:
    yield
    handle.remove()


@contextmanager
def _without(holder: dict[str, Any], key: str) -> Iterator[None]:
    before = holder.pop(key)
    yield
    holder[key] = before


def _look(*args: Any) -> None:
    pass


def _only_looks() -> Any:
    def hook(*args: Any) -> None:
        pass

    hook.only_looks = True  # type: ignore[attr-defined]
    return hook


WAYS: dict[str, Callable[[Decoding], AbstractContextManager[None]]] = {
    "attention in training": lambda d: _set(d.attention, "training", True),
    "router in training": lambda d: _set(d.block.gate, "training", True),
    "scores are wanted": lambda d: _set(d.block.experts, "scores", lambda ids, weights: None),
    "another runtime": lambda d: _set(d.block.experts, "runtime", None),
    "another attention is asked for": lambda d: _set(d.attention.config, "_attn_implementation", "eager"),
    "another config": lambda d: _set(d.attention, "config", type(d.attention.config)()),
    "another sdpa": lambda d: _item(ALL_ATTENTION_FUNCTIONS, "sdpa", _look),
    "another rotary embedding": lambda d: _item(
        type(d.attention).forward.__globals__, "apply_rotary_pos_emb", lambda *args: None
    ),
    "a hook on a projection": lambda d: _until(d.attention.q_proj.register_forward_hook(_look)),
    "a hook before a norm": lambda d: _until(d.layers[1].input_layernorm.register_forward_pre_hook(_look)),
    "a hook on a later layer": lambda d: _until(d.layers[1].register_forward_hook(_look)),
    "a hook before a later layer": lambda d: _until(d.layers[1].register_forward_pre_hook(_look)),
    "a hook on a router": lambda d: _until(d.block.gate.register_forward_hook(_look)),
    "a hook before experts": lambda d: _until(d.block.experts.register_forward_pre_hook(_look)),
    "a hook on every module": lambda d: _until(register_module_forward_hook(_look)),
    "a layer's own forward is gone": lambda d: _without(vars(d.layers[1]), "forward"),
    "an attention's own forward is gone": lambda d: _without(vars(d.attention), "forward"),
    "a layer's class": lambda d: _set(type(d.layers[1]), "forward", _look),
    "an attention's class": lambda d: _set(type(d.attention), "forward", _look),
    "a norm's class": lambda d: _set(type(d.layers[1].input_layernorm), "forward", _look),
    "a block's class": lambda d: _set(type(d.block), "forward", _look),
    "another layer": lambda d: _item(d.layers, 1, d.layers[0]),
    "another projection": lambda d: _set(d.attention, "q_proj", nn.Linear(4, 4)),
    "another weight": lambda d: _set(d.attention.q_proj, "weight", nn.Parameter(d.attention.q_proj.weight.clone())),
    "other data": lambda d: _set(d.attention.q_proj.weight, "data", d.attention.q_proj.weight.data.clone()),
    "another eps": lambda d: _set(d.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "another scale": lambda d: _set(d.attention, "scaling", 2.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_any_change_is_seen(way: str, decoding: Decoding) -> None:
    whole = len(decoding.layers)
    assert decoding.taken() == decoding.taken_one_by_one() == whole > 1
    with WAYS[way](decoding):
        assert decoding.taken() is None
        known = decoding.known
        assert decoding.taken_one_by_one() < whole
    decoding._chains[-1]._known[0] = known
    # What the layers forgot when they were asked one by one is theirs.
    assert decoding.taken() == whole


def test_those_who_only_look_are_told(decoding: Decoding) -> None:
    """Layers into which somebody looks are others than before, and known again with the next token."""
    with _until(decoding.block.gate.register_forward_hook(_only_looks())):
        assert decoding.taken() is None
        assert decoding.taken_one_by_one() == len(decoding.layers) == decoding.taken()
    assert decoding.taken() is None


def test_tokens_that_are_others(decoding: Decoding) -> None:
    cos, sin = decoding.arguments["position_embeddings"]
    for changed in (
        {"attention_mask": torch.ones(1, 1, 1, 8)},
        {"past_key_values": None},
        {"position_embeddings": (cos[..., :2], sin[..., :2])},
        {"position_embeddings": [cos, sin]},
        {"output_attentions": True},
    ):
        assert decoding.taken(**changed) is None
    with torch.autocast("cpu"):
        assert decoding.taken() is None
    for x in (decoding.x.expand(2, 1, -1), decoding.x.expand(1, 2, -1), None):
        decoding.x, before = x, decoding.x
        assert decoding.taken() is None
        decoding.x = before
    assert decoding.taken() == len(decoding.layers)


def test_a_cache_without_room_takes_as_far_as_it_has_some(decoding: Decoding) -> None:
    layers = decoding.arguments["past_key_values"].layers
    for place in range(len(layers)):
        with _item(layers, place, DynamicLayer()):
            assert decoding.taken() == place
    with _set(decoding.arguments["past_key_values"], "offloading", True):
        assert decoding.taken() == 0
