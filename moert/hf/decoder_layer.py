"""Layers that add an attention and then experts to what goes through them: single tokens in one call of moert's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moert.hf.block_forward import BlockForward, KnownBlock
from moert.hf.layer_chain import LayerChain
from moert.hf.norms import NormForward
from moert.hf.own_forward import OwnForward
from moert.hf.self_attention import SelfAttentionForward, Token
from moert.hf.stand_ins import Normal, StandIn, same, with_children
from moert.hf.unchanged import Unchanged
from moert.kernels.self_attention import SelfAttention
from moert.kernels.token_layer import LayersOneByOne, TokenLayer

_MAGNITUDES = (1.0, 1e3)
_PASSED_ON = ("attention_mask", "position_embeddings", "past_key_values", "position_ids", "use_cache")


Look = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Called as a hook before a forward."""


class DecoderLayerForward(OwnForward):
    """Stands in a layer's own `forward`: h = x + attention(norm(x)), and then h + rest(norm(h))."""

    def __init__(self, module: Any, before: str, attention: str, after: str, rest: str) -> None:
        super().__init__(module)
        self._forward = type(module).forward
        self._attention, self._rest = attention, rest
        self._around: Unchanged | None = Unchanged()
        self._around.add_ways(module)
        for name in (before, attention, after):
            self._around.add(module, name)
        norms = [vars(module._modules[name])["forward"].norm() for name in (before, after)]
        inner: SelfAttentionForward = vars(module._modules[attention])["forward"]
        assert inner.token is not None
        self._between: SelfAttention | None = inner.token.attention.between(*norms)
        self._whole = Whole.of(module, rest, self._between)
        self.chain: LayerChain | None = None
        """The layers that it is one of, if they follow one another, and at which place."""
        self.place = 0
        self.look: Look | None = None
        """Is to see what the layer is called with, unless nobody needs to know."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        module = self.module()
        is_ours = len(args) == 1 and type(module).forward is self._forward
        if is_ours and self.chain is not None:
            output = self.chain.run(self.place, args[0], kwargs)
            if output is not None:
                return output  # of layers that need nothing but their kernels, and no look ahead
        if self.look is not None:
            self.look(module, args, kwargs)
        if is_ours:
            output = self._run(module, args[0], kwargs)
            if output is not None:
                return output
        return type(module).forward(module, *args, **kwargs)

    def _run(self, module: nn.Module, x: Any, arguments: dict[str, Any]) -> torch.Tensor | None:
        """As for the whole layer; None, and nothing has happened, if it is not a single token's."""
        token = self._take(module, x, arguments)
        if token is None:
            return None
        whole = self._whole
        if whole is not None and whole.is_free():
            return whole.run(token)
        assert self._between is not None
        found = self._between.run(*token.arguments)
        if found is None:
            return None
        token.layer.token_written()
        hidden, normed = found
        rest: Any = module._modules[self._rest]
        added: torch.Tensor = hidden + rest(normed)
        return added

    def take(self, module: nn.Module, x: Any, arguments: dict[str, Any]) -> tuple[Whole, Token] | None:
        """The token `x` for the layer as a whole, see `TokenAttention.take`; None if it cannot be run so."""
        whole = self._whole
        if whole is None or not whole.is_free() or type(module).forward is not self._forward:
            return None
        token = self._take(module, x, arguments)
        return None if token is None else (whole, token)

    @property
    def whole(self) -> Whole | None:
        """The layer with its experts, if it can be run so."""
        return self._whole

    def note(self, module: nn.Module, parts: Unchanged) -> None:
        """What `take` asks of `module`, but for the config of its attention."""
        attention = module._modules[self._attention]
        assert self._around is not None and self._whole is not None and attention is not None
        parts.join(self._around)
        parts.add_entry(vars(module), "forward")
        self._whole.note(parts)
        known = vars(attention)["forward"].token
        known.note(attention, parts)

    def attention_of(self, module: nn.Module) -> Any:
        """The attention of `module`."""
        return module._modules[self._attention]

    def _take(self, module: nn.Module, x: Any, arguments: dict[str, Any]) -> Token | None:
        around = self._around
        if around is None or not around.holds:
            if around is not None and around.is_gone:
                self._forget()
            return None
        attention: Any = module._modules[self._attention]
        token: Token | None = vars(attention)["forward"].take(attention, x, arguments)
        return token

    def _forget(self) -> None:
        self._around = self._between = self._whole = self.chain = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        mine = super().__deepcopy__(memo)
        if mine is not self:
            mine._forget()  # they read the weights of this one's module
        return mine


class Whole:
    """A layer whose rest is a block that is known."""

    def __init__(self, parts: Unchanged, known: KnownBlock, layer: TokenLayer) -> None:
        self._parts, self._known, self.layer = parts, known, layer
        self.index, self.runtime = known.index, known.runtime

    @classmethod
    def of(cls, module: nn.Module, rest: str, attention: SelfAttention) -> Whole | None:
        """What `module` is, if its child `rest` is such a block."""
        inner = module._modules[rest]
        forward = None if inner is None else vars(inner).get("forward")
        known = forward.known if isinstance(forward, BlockForward) else None
        if known is None or known.block.others is not None:
            return None
        parts = Unchanged()
        parts.add(module, rest)
        try:
            return cls(parts, known, TokenLayer(attention, known.kernel))
        except ValueError:
            return None

    def is_free(self) -> bool:
        """Whether it is still so, and nobody has to be asked in between."""
        return self._parts.holds and self._known.is_free()

    def note(self, parts: Unchanged) -> None:
        """All that `is_free` asks."""
        parts.join(self._parts)
        self._known.note(parts)

    @property
    def is_watched(self) -> bool:
        """Whether there is anybody to tell."""
        return self._known.block.is_watched

    def tell(self, normed: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> None:
        """The router has made that of [1, 1, D]: [1, K] twice and [1, E]. Tell who looks at it."""
        self._known.block.tell(normed[0], ids, weights, logits)

    def run(self, token: Token, kernel: TokenLayer | LayersOneByOne | None = None) -> torch.Tensor | None:
        """The layer's output for it; None, and nothing has happened, where the kernel is not for it.

        Args:
            kernel: what runs `layer`; None: that itself.
        """
        compute = self._known.block.experts.adapter.compute
        found = self.runtime.run_token(self.index, kernel or self.layer, token.arguments, compute)
        if found is None:
            return None
        token.layer.token_written()
        if self.is_watched:
            self.tell(found.normed, found.ids, found.weights, found.logits)
        return found.output


def decoder_layer_forward(module: Any) -> DecoderLayerForward | None:
    """A forward for `module`, if its class's code does with its children what `DecoderLayerForward` does.

    The code is called with stand-ins for the children, which note what they are given. The module is left as it is.
    """
    if "forward" in vars(module):
        return None
    children = {name: child for name, child in module._modules.items() if child is not None}
    own = {name: vars(child).get("forward") for name, child in children.items()}
    norms = [name for name, forward in own.items() if isinstance(forward, NormForward)]
    attentions = [name for name, forward in own.items() if isinstance(forward, SelfAttentionForward)]
    if len(norms) != 2 or len(attentions) != 1:
        return None
    token = own[attentions[0]].token
    try:
        with torch.no_grad():
            orders = [_order(module, attentions[0], token.attention, size) for size in _MAGNITUDES]
    except Exception:  # the class's own code may fail in any way
        return None
    order = orders[0]
    if order is None or any(other != order for other in orders) or {order[0], order[2]} != set(norms):
        return None
    return DecoderLayerForward(module, *order)


def _order(
    module: nn.Module, attention: str, kernel: SelfAttention, magnitude: float
) -> tuple[str, str, str, str] | None:
    """The children in the order in which they are called, if what they are given is what it should be."""
    normal = Normal(kernel.dtype)

    def hidden() -> torch.Tensor:
        return normal(1, 1, kernel.hidden, magnitude=magnitude)

    x, names = hidden(), list(module._modules)
    outputs = {name: hidden() for name in names}
    kept = {name: output.clone() for name, output in outputs.items()}
    stand_ins = {name: StandIn((outputs[name], None) if name == attention else outputs[name]) for name in names}
    passed: dict[str, Any] = {name: object() for name in _PASSED_ON}
    mine = x.clone()
    output = type(module).forward(with_children(module, stand_ins), mine, **passed)
    called = [name for name in names if stand_ins[name].given]
    if len(called) != 4 or any(len(stand_ins[name].given) != 1 for name in called):
        return None
    inputs: dict[str, Any] = {}
    for name in called:
        args, kwargs = stand_ins[name].given[0]
        if name == attention:
            inputs[name] = kwargs.pop("hidden_states", None)
            if args or kwargs.keys() != passed.keys() or any(kwargs[key] is not passed[key] for key in passed):
                return None
        elif len(args) != 1 or kwargs:
            return None
        else:
            inputs[name] = args[0]
    before = next((name for name in called if inputs[attention] is outputs[name]), None)
    rest = next(
        (name for name in called if any(inputs[name] is outputs[other] for other in called) and name != attention), None
    )
    after = None if rest is None else next(name for name in called if inputs[rest] is outputs[name])
    if before is None or rest is None or after is None or len({before, attention, after, rest}) != 4:
        return None
    sums = x + kept[attention]
    is_it = (
        same(inputs[before], x)
        and same(inputs[after], sums)
        and same(output, sums + kept[rest])
        and same(mine, x)
        and all(same(outputs[name], kept[name]) for name in called)
    )
    return (before, attention, after, rest) if is_it else None


def chain_layers(layers: nn.Module) -> None:
    """Have layers of a list that follow one another run in one call, those of which all is known to their
    `DecoderLayerForward`, if they are alike."""
    if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
        return
    forwards = [vars(module).get("forward") for module in layers]
    known = [forward if isinstance(forward, DecoderLayerForward) else None for forward in forwards]
    wholes = [forward._whole for forward in known if forward is not None and forward._whole is not None]
    if len(wholes) < 2 or len({whole.layer.shape for whole in wholes}) != 1:
        return
    chain = LayerChain(layers, known)
    for place, forward in enumerate(known):
        if forward is not None and forward._whole is not None:
            forward.chain, forward.place = chain, place
