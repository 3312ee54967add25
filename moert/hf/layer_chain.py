"""Layers that follow one another: a token through all of them in one call, as soon as the first one is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moert import _C
from moert.hf.known_layers import KnownLayers
from moert.hf.self_attention import Token
from moert.kernels.token_layer import LayersOneByOne, LayersOutput, run_layers

if TYPE_CHECKING:
    from moert.hf.decoder_layer import DecoderLayerForward, Whole


class LayerChain:
    """The layers of a list, in its order.

    What the later ones give is worked out together with the first, and handed out when they are called with just what
    was expected. Only then does it count, and are its keys and values in the cache; else it is forgotten. Nothing runs
    between two layers but Python code of the model, and that takes several times as long where a layer's weights have
    driven it out of the processor's caches.
    """

    def __init__(self, layers: nn.ModuleList, forwards: Sequence[DecoderLayerForward | None]) -> None:
        """`forwards` are those of all the list's modules, in order; None: not to be run with others."""
        self._children: dict[str, Any] = layers._modules
        self._names = list(layers._modules)
        self._forwards = forwards
        self._known: dict[int, KnownLayers] = {}
        """By the first one's place."""
        self._ahead: _Ahead | None = None

    def run(self, place: int, x: Any, arguments: dict[str, Any]) -> torch.Tensor | None:
        """What the layer at `place` gives; None, and nothing has happened, if it has to be called on its own.

        Args:
            x, arguments: what the layer is called with, the others by name.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or not ahead.expects(place, x, arguments):
            ahead = self._begin(place, x, arguments)
        if ahead is None:
            return None
        output = ahead.take()
        if ahead.is_more:
            self._ahead = ahead
        return output

    def run_all(self, x: Any, arguments: dict[str, Any], count: int) -> torch.Tensor | None:
        """What the last one gives for the token `x`; None, and nothing has happened, unless all of them, `count`, can
        be run without their modules being called.

        Args:
            arguments: as a layer takes them that has to be called after all.
        """
        wholes, tokens = self._tokens(0, x, arguments)
        if len(tokens) < count:
            return None
        if self._may_run(0, count):
            ahead = self._together(0, x, wholes, tokens, arguments, count)
            if ahead is not None:
                self._ahead = None
                return ahead.take_all()
        if not wholes[0].layer.attention.takes(x):
            return None
        self._ahead = None
        return self._one_by_one(x, wholes, tokens, arguments)

    def _one_by_one(
        self, x: torch.Tensor, wholes: Sequence[Whole], tokens: Sequence[Token], arguments: dict[str, Any]
    ) -> torch.Tensor:
        """What the last one gives, where experts are missing: nobody knows before a layer has run which of the next."""
        kernel = LayersOneByOne([whole.layer for whole in wholes], x)
        for name, forward, whole, token in zip(self._names, self._forwards, wholes, tokens, strict=True):
            module = self._children[name]
            if forward is not None and forward.look is not None:
                forward.look(module, (x,), arguments)
            output = whole.run(Token((x, *token.arguments[1:]), token.layer), kernel)
            x = module(x, **arguments) if output is None else output
        return x

    def _begin(self, place: int, x: Any, arguments: dict[str, Any]) -> _Ahead | None:
        """Those layers that can be run together, two or more; None if none has run."""
        if not self._may_run(place, 2):
            return None
        wholes, tokens = self._tokens(place, x, arguments)
        return None if len(tokens) < 2 else self._together(place, x, wholes, tokens, arguments)

    def _tokens(self, place: int, x: Any, arguments: dict[str, Any]) -> tuple[Sequence[Whole], list[Token]]:
        """As many of the layers from `place` on as take the token `x`, and as what."""
        known = self._known.get(place)
        tokens = None if known is None else known.tokens(x, arguments)
        if known is not None and tokens is not None:
            return known.wholes, tokens
        return self._take(place, x, arguments)

    def _together(
        self,
        place: int,
        x: torch.Tensor,
        wholes: Sequence[Whole],
        tokens: list[Token],
        arguments: dict[str, Any],
        fewest: int = 1,
    ) -> _Ahead | None:
        """As many of these layers as can be run in one call, two or more; None if fewer than `fewest` have."""
        cos, sin = tokens[0].arguments[1:3]
        layers, places = [whole.layer for whole in wholes], [token.arguments[3:] for token in tokens]
        runtime = wholes[0].runtime
        output = runtime.run_ahead(
            [whole.index for whole in wholes[: len(tokens)]],
            lambda tables: run_layers(layers[: len(tables)], x, cos, sin, places[: len(tables)], tables),
            max(fewest, 2),
        )
        if output is None or len(output.experts_s) < fewest:
            return None
        return _Ahead(place, wholes, tokens, output, arguments)

    def _may_run(self, place: int, count: int) -> bool:
        """Whether so many layers from `place` on may be run together, as far as can be told without asking each whether
        anything about it has changed. All that follow are asked that, and this comes again at each layer."""
        forwards = self._forwards[place : place + count]
        wholes = [forward.whole for forward in forwards if forward is not None and forward.whole is not None]
        return len(wholes) == count and wholes[0].runtime.may_run_ahead([whole.index for whole in wholes])

    def _take(self, place: int, x: Any, arguments: dict[str, Any]) -> tuple[list[Whole], list[Token]]:
        """As many of the layers from `place` on as take the token `x`, and as what."""
        wholes: list[Whole] = []
        tokens: list[Token] = []
        for at in range(place, len(self._names)):
            forward = self._forwards[at]
            module = self._children.get(self._names[at])
            if forward is None or module is None or (at > place and _is_hooked(module)):
                break
            if vars(module).get("forward") != forward:
                break
            found = forward.take(module, x, arguments)
            if found is None or (wholes and found[0].runtime is not wholes[0].runtime):
                break
            wholes.append(found[0])
            tokens.append(found[1])
        if len(wholes) > 1:
            names = self._names[place : place + len(wholes)]
            forwards = [forward for forward in self._forwards[place : place + len(wholes)] if forward is not None]
            turned = tokens[0].arguments[1].shape[-1]
            self._known[place] = KnownLayers(self._children, names, forwards, wholes, turned)
        return wholes, tokens


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody may change what a layer is given or gives, or do anything at all in between."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return not all(getattr(hook, "only_looks", False) for hook in hooks)


class _Ahead:
    """What layers give that are still to be called."""

    def __init__(
        self, first: int, wholes: Sequence[Whole], tokens: list[Token], output: LayersOutput, arguments: dict[str, Any]
    ) -> None:
        self._first, self._wholes, self._tokens, self._output = first, wholes, tokens, output
        self._angles, self._cache = arguments["position_embeddings"], arguments["past_key_values"]
        self._names = arguments.keys()
        self._picks = output.ids[:, 0].tolist()
        self._taken = 0

    @property
    def is_more(self) -> bool:
        return self._taken < len(self._output.experts_s)

    def expects(self, place: int, x: Any, arguments: dict[str, Any]) -> bool:
        """Whether the layer at `place` is the next, and called with what was expected."""
        if (
            place != self._first + self._taken
            or arguments.get("position_embeddings") is not self._angles
            or arguments.get("past_key_values") is not self._cache
            or arguments.get("attention_mask") is not None
            or arguments.keys() != self._names
            or type(x) is not torch.Tensor
        ):
            return False
        outputs = self._output.outputs
        return (
            x.shape == outputs.shape[1:]
            and x.dtype is outputs.dtype
            and x.is_cpu
            and x.is_contiguous()
            and not x.requires_grad
            and _C.same_bytes(
                x.data_ptr(),
                outputs.data_ptr() + (self._taken - 1) * x.numel() * x.element_size(),
                x.numel() * x.element_size(),
            )
        )

    def take(self) -> torch.Tensor:
        """What the next one gives."""
        at = self._taken
        self._taken += 1
        whole = self._wholes[at]
        whole.runtime.note_ahead([(whole.index, self._picks[at], self._output.experts_s[at])])
        self._finish(at)
        return self._output.handed[at]

    def take_all(self) -> torch.Tensor:
        """What the last one gives; none has been taken."""
        runs = zip(self._wholes, self._picks, self._output.experts_s, strict=False)
        self._wholes[0].runtime.note_ahead([(whole.index, picks, took) for whole, picks, took in runs])
        self._taken = len(self._output.experts_s)
        for at in range(self._taken):
            self._finish(at)
        return self._output.handed[self._taken - 1]

    def _finish(self, at: int) -> None:
        self._tokens[at].layer.token_written()
        whole = self._wholes[at]
        if whole.is_watched:
            output = self._output
            whole.tell(output.normed[at], output.ids[at], output.weights[at], output.logits[at])
