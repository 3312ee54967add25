"""Layers that a token went through in one call: whether the next one can is asked of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from moert.hf.self_attention import Token, angles_of, token_of
from moert.hf.unchanged import Unchanged

if TYPE_CHECKING:
    from moert.hf.decoder_layer import DecoderLayerForward, Whole


class KnownLayers:
    """Layers that follow one another, all of which took a token. Each is asked for itself once, and then together:
    after a token's weights nothing of them is in the processor's caches, and one look at all takes a fraction of the
    time."""

    def __init__(
        self,
        children: dict[str, nn.Module | None],
        names: Sequence[str],
        forwards: Sequence[DecoderLayerForward],
        wholes: Sequence[Whole],
        turned: int,
    ) -> None:
        """`forwards` and `wholes` are those of the `children` of a list under `names`, of which each has just taken a
        token with `turned` angles."""
        self.wholes, self._turned = wholes, turned
        modules = [children[name] for name in names]
        self._parts = Unchanged()
        configs: dict[int, Any] = {}
        self._indices: list[int] = []
        for name, module, forward in zip(names, modules, forwards, strict=True):
            assert module is not None
            self._parts.add_entry(children, name)
            forward.note(module, self._parts)
            attention = forward.attention_of(module)
            configs[id(attention.config)] = attention.config
            self._parts.add_entry(vars(attention), "config")
            self._indices.append(attention.layer_idx)
        for module in modules[1:]:
            assert module is not None
            self._parts.add_hooks(module)
        self._configs = list(configs.values())

    def tokens(self, x: Any, arguments: dict[str, Any]) -> list[Token] | None:
        """The token `x` for as many of the layers as have room for it, as each of them would take it; None if they are
        not what they were."""
        angles = angles_of(x, arguments)
        if angles is None or angles[0].shape[-1] != self._turned or not self._parts.holds:
            return None
        if any(config._attn_implementation != "sdpa" for config in self._configs):
            return None
        tokens: list[Token] = []
        for index in self._indices:
            token = token_of(x, angles, arguments["past_key_values"], index)
            if token is None:
                break
            tokens.append(token)
        return tokens
