"""Single tokens through a whole attention in one call, where trying shows that it is one that moert knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moert.hf.attention import AttentionForward
from moert.hf.growing_cache import GrowingLayer
from moert.hf.norms import NormForward
from moert.hf.own_forward import OwnForward, is_differentiated, is_recorded
from moert.hf.rebinding import names_in
from moert.hf.rotary import NAME as EMBEDDING
from moert.hf.rotary import Embedding
from moert.hf.stand_ins import Normal, same, with_children
from moert.hf.unchanged import Unchanged
from moert.kernels.self_attention import Projections, SelfAttention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_GIVEN = frozenset(("hidden_states", "position_embeddings", "attention_mask", "past_key_values"))
_UNUSED = frozenset(("position_ids", "cache_position", "use_cache"))
"""Arguments of attentions that change nothing in what they compute."""

_MAGNITUDES = (0.5, 30.0)
_PAST = 3


class Token(NamedTuple):
    """One token as `SelfAttention.run` takes it, and whose cache it goes into."""

    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]
    layer: GrowingLayer


class TokenAttention:
    """What a module's class computes for one token of one sequence, in one call."""

    def __init__(self, parts: Unchanged, attention: SelfAttention, embedding: Embedding) -> None:
        self.parts, self.attention, self._embedding = parts, attention, embedding

    def take(self, module: Any, x: Any, arguments: dict[str, Any]) -> Token | None:
        """The token `x` [1, 1, D]; None if the module's own code has to run.

        Args:
            arguments: what the module is called with beside `x`, by name.
        """
        angles = angles_of(x, arguments)
        if (
            angles is None
            or module.training
            or module.config._attn_implementation != "sdpa"
            or not self._embedding.turns(angles[0].shape[-1], self.attention.width)
            or not self.parts.holds
        ):
            return None
        return token_of(x, angles, arguments["past_key_values"], module.layer_idx)

    def note(self, module: Any, parts: Unchanged) -> None:
        """What `take` asks of `module`, but for its config."""
        parts.join(self.parts)
        parts.add_entry(vars(module), "training")
        self._embedding.note(parts)


def token_of(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], cache: Any, index: int) -> Token | None:
    """The token for the layer at `index`, if the cache has room for it there."""
    layer = _layer_of(cache, index)
    place = None if layer is None else layer.room_for_token()
    return None if layer is None or place is None else Token((x, *angles, *place), layer)


def angles_of(x: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin, if kernels may compute a token with these arguments."""
    angles = arguments.get("position_embeddings")
    if type(angles) is not tuple or len(angles) != 2 or not isinstance(arguments.get("past_key_values"), Cache):
        return None
    cos, sin = angles
    if (
        type(x) is not torch.Tensor
        or x.shape[:-1] != (1, 1)
        or type(cos) is not torch.Tensor
        or type(sin) is not torch.Tensor
        or is_recorded()
        or torch.is_autocast_enabled("cpu")
        or is_differentiated(x)
        or not _say_nothing(arguments)
        or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    ):
        return None
    return cos, sin


class SelfAttentionForward(AttentionForward):
    """As `AttentionForward`, and single tokens in one call."""

    def __init__(self, forward: AttentionForward, token: TokenAttention) -> None:
        vars(self).update(vars(forward))
        self.token: TokenAttention | None = token
        """None once the module is of other parts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        if not args:
            module = self.module()
            token = self.take(module, kwargs.get("hidden_states"), kwargs)
            if token is not None:
                assert self.token is not None
                found = self.token.attention.run(*token.arguments)
                if found is not None:
                    token.layer.token_written()
                    return found[0], None
        return super().__call__(*args, **kwargs)

    def take(self, module: nn.Module, x: Any, arguments: dict[str, Any]) -> Token | None:
        """See `TokenAttention.take`."""
        known = self.token
        if known is None or type(module).forward is not self._forward:
            return None
        token = known.take(module, x, arguments)
        if token is None and known.parts.is_gone:
            self.token = None
        return token

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        mine = super().__deepcopy__(memo)
        if mine is not self:
            mine.token = None  # it reads the weights of this one's module
        return mine


def self_attention_forward(module: Any) -> SelfAttentionForward | None:
    """A forward for `module`, an attention with an `AttentionForward` whose layers have been taken over, if single
    tokens through its class's code give the bits that `SelfAttention` gives.

    The code is called on tokens of several magnitudes. The module is left as it is. Takes as long as some tokens
    through it.
    """
    forward = vars(module).get("forward")
    if type(forward) is not AttentionForward:
        return None
    try:
        embedding = forward.instead.get(EMBEDDING)
        if embedding is None or not _tells_by_values(module):
            return None
        token = _token_attention(module, embedding)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            is_it = token is not None and all(_agree(module, forward, token, size) for size in _MAGNITUDES)
    except Exception:  # the class's own code may fail in any way
        return None
    return SelfAttentionForward(forward, token) if token is not None and is_it else None


def _tells_by_values(module: Any) -> bool:
    """Whether some tokens can show what the class's code does: nothing in it depends on where in the text a token is,
    or on numbers above a limit."""
    code = type(module).forward.__code__
    named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    if not set(named) <= _GIVEN or not _UNUSED.isdisjoint(code.co_consts):
        return False
    limits = [name for name in names_in(type(module).forward) if "clip" in name or "clamp" in name]
    settings = [getattr(module.config, name) for name in limits if hasattr(module.config, name)]
    return not limits or (bool(settings) and all(value is None for value in settings))


def _token_attention(module: Any, embedding: Embedding) -> TokenAttention | None:
    """What the module would be if its children are what their names say.

    Raises:
        AttributeError, KeyError, ValueError: they cannot be.
    """
    children = module._modules
    names = [*_PROJECTIONS, *(name for name in _NORMS if children.get(name) is not None)]
    forwards = {name: vars(children[name]).get("forward") for name in names}
    if not all(isinstance(forward, OwnForward) for forward in forwards.values()):
        return None
    norms = []
    for name in _NORMS:
        forward = forwards.get(name)
        norms.append(forward.norm() if isinstance(forward, NormForward) else None)
        if forward is not None and norms[-1] is None:
            return None
    parts = Unchanged()
    parts.add_ways(module)
    for name in names:
        parts.add(module, name)
    projections = Projections(*((children[name].weight, children[name].bias) for name in _PROJECTIONS))
    return TokenAttention(parts, SelfAttention(projections, module.head_dim, module.scaling, *norms), embedding)


class _OneLayer:
    """As much of a cache as attentions need."""

    def __init__(self, layer: GrowingLayer) -> None:
        self._layer = layer

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._layer.update(keys, values)


def _agree(module: Any, forward: AttentionForward, token: TokenAttention, magnitude: float) -> bool:
    attention = token.attention
    heads, width = attention.kv_heads, attention.width
    normal = Normal(attention.dtype, int(magnitude))
    x = normal(1, 1, attention.hidden, magnitude=magnitude)
    angles = (normal(1, 1, width), normal(1, 1, width))
    past = (normal(1, heads, _PAST, width, magnitude=magnitude), normal(1, heads, _PAST, width))
    layers = GrowingLayer(), GrowingLayer()
    for layer in layers:
        # The first ones are kept as they are, the next make room.
        layer.update(past[0][:, :, :-1], past[1][:, :, :-1])
        layer.update(past[0][:, :, -1:], past[1][:, :, -1:])
    output = forward.function(
        with_children(module, module._modules),
        hidden_states=x.clone(),
        position_embeddings=angles,
        attention_mask=None,
        past_key_values=_OneLayer(layers[0]),
    )
    place = layers[1].room_for_token()
    found = None if place is None else attention.run(x, angles[0], angles[1], *place)
    if found is None or not (isinstance(output, tuple) and len(output) == 2 and output[1] is None):
        return False
    layers[1].token_written()
    return (
        same(output[0], found[0]) and same(layers[0].keys, layers[1].keys) and same(layers[0].values, layers[1].values)
    )


def _layer_of(cache: Any, index: Any) -> GrowingLayer | None:
    """Where the cache keeps the layer's tokens, if it is no more than that."""
    if type(cache).update is not Cache.update or cache.offloading or not isinstance(index, int):
        return None
    layers = cache.layers
    layer = layers[index] if 0 <= index < len(layers) else None
    return layer if type(layer) is GrowingLayer else None


def _say_nothing(arguments: dict[str, Any]) -> bool:
    """Whether no argument asks for what the kernel does not do, a mask for example."""
    for name, value in arguments.items():
        if value is None or value is False or name in _UNUSED:
            continue
        if name == "attention_mask" or name not in _GIVEN:
            return False
    return True
