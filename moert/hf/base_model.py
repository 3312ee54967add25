"""Models that embed a token, take it through layers that follow one another, and norm it: all of that for one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.layer_chain import LayerChain
from moert.hf.norms import NormForward
from moert.hf.own_forward import OwnForward, is_recorded
from moert.hf.stand_ins import Normal, StandIn, same, with_children
from moert.hf.unchanged import Unchanged

_MAGNITUDES = (1.0, 1e3)
_PAST = 3
_GIVEN = frozenset(("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"))
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings by which a token does not attend to all that came before."""


class BaseModelForward(OwnForward):
    """Stands in the `forward` of a model without a head.

    Its class's code runs between the layers, for each of them, and on a processor whose caches a token's weights have
    emptied that takes as long as a tenth of a small model's token. A single token that attends to all before it goes
    through the layers' kernels without.
    """

    def __init__(self, module: Any, names: _Names, output: type[ModelOutput]) -> None:
        super().__init__(module)
        self._forward = type(module).forward
        self._names, self._output = names, output
        layers = module._modules[names.layers]
        self._chain: LayerChain | None = vars(layers[0])["forward"].chain
        self._count = len(layers)
        self._parts = Unchanged()
        for name in (names.embedding, names.rotary, names.norm):
            self._parts.add(module, name)
        self._parts.add_entry(module._modules, names.layers)
        self._parts.add_entry(vars(layers), "_modules")
        for layer in layers:
            self._parts.add_unseen(layer)
        self._parts.add_count(layers._modules)
        self._parts.add_entry(vars(module), "config")
        for name in (*_WINDOWS, "layer_types", "num_hidden_layers"):
            self._parts.add_entry(vars(module.config), name)
        self._config = module.config
        self._asked_for = [name for name in dir(module.config) if name.startswith("output_")]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        module: Any = self.module()
        if (
            not args
            and self._chain is not None
            and type(module).forward is self._forward
            and not module.training
            and not is_recorded()
        ):
            output = self._run(module, kwargs)
            if output is not None:
                return output
        return type(module).forward(module, *args, **kwargs)

    def _run(self, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """As for the whole model; None, and nothing has happened, if the class's own code has to run."""
        assert self._chain is not None
        ids, places, cache = (arguments.get(name) for name in ("input_ids", "position_ids", "past_key_values"))
        if (
            not _is_one(ids)
            or not (places is None or _is_one(places))
            or not isinstance(cache, Cache)
            or not self._is_usual(arguments)
            or not self._attends_to_all(arguments.get("attention_mask"), cache)
            or not self._parts.holds
        ):
            if self._parts.is_gone:
                self._chain = None
            return None
        if places is None:
            places = torch.tensor([[cache.get_seq_length()]])
        # None of them has hooks.
        children: Any = module._modules
        assert ids is not None
        x = torch.embedding(children[self._names.embedding].weight, ids)
        given = {
            "position_embeddings": children[self._names.rotary].forward(x, places),
            "attention_mask": None,
            "past_key_values": cache,
            "position_ids": places,
            "use_cache": True,
        }
        hidden = self._chain.run_all(x, given, self._count)
        if hidden is None:
            return None
        return self._output(last_hidden_state=children[self._names.norm].forward(hidden), past_key_values=cache)

    def _is_usual(self, arguments: dict[str, Any]) -> bool:
        """Whether nothing is asked for but the usual output, by arguments or by the config."""
        config = self._config
        use_cache, as_dict = arguments.get("use_cache"), arguments.get("return_dict")
        return (
            (getattr(config, "use_cache", None) if use_cache is None else use_cache) is True
            and (getattr(config, "return_dict", True) if as_dict is None else as_dict) is True
            and not any(getattr(config, name, False) for name in self._asked_for)
            and all(value is None or value is False for name, value in arguments.items() if name not in _GIVEN)
        )

    def _attends_to_all(self, mask: Any, cache: Cache) -> bool:
        if mask is None:
            return True
        return (
            type(mask) is torch.Tensor
            and mask.shape == (1, cache.get_seq_length() + 1)
            and mask.is_cpu
            and not mask.is_floating_point()
            and bool(mask.all())
        )


class _Names:
    """What the children are called."""

    def __init__(self, module: nn.Module) -> None:
        """
        Raises:
            LookupError, TypeError: it has others.
        """
        found: dict[str, str] = {}
        for name, child in module._modules.items():
            if child is None:
                continue
            role = _role_of(child)
            if role in found:
                raise LookupError(f"{found[role]} and {name} are both its {role}")
            found[role] = name
        self.embedding, self.layers, self.norm, self.rotary = (
            found.pop(role) for role in ("embedding", "layers", "norm", "rotary")
        )


def _role_of(child: nn.Module) -> str:
    if type(child) is nn.Embedding:
        if child.max_norm is not None:
            raise ValueError("it changes its weights as they are used")
        return "embedding"
    if isinstance(child, nn.ModuleList):
        return "layers"
    forward = vars(child).get("forward")
    if isinstance(forward, NormForward):
        return "norm"
    if forward is not None or any(True for _ in child.parameters()) or any(True for _ in child.children()):
        raise TypeError(f"{type(child).__name__} may be anything")
    return "rotary"


def base_model_forward(module: Any) -> BaseModelForward | None:
    """A forward for `module`, if all its layers can be run together and its class's code does with its children what
    `BaseModelForward` does.

    The code is called with stand-ins for the children, which note what they are given. The module is left as it is.
    """
    if not isinstance(module, PreTrainedModel) or "forward" in vars(module) or not _has_no_windows(module.config):
        return None
    try:
        names = _Names(module)
        layers = module._modules[names.layers]
        assert isinstance(layers, nn.ModuleList)
        forwards = [vars(layer).get("forward") for layer in layers]
        if any(not isinstance(forward, DecoderLayerForward) or forward.chain is None for forward in forwards):
            return None
        with torch.no_grad():
            outputs = {_output_of(module, names, size, told) for size in _MAGNITUDES for told in (False, True)}
    except Exception:  # the class's own code may fail in any way
        return None
    output = outputs.pop()
    return None if output is None or outputs else BaseModelForward(module, names, output)


def _output_of(module: Any, names: _Names, magnitude: float, is_told: bool) -> type[ModelOutput] | None:
    """What kind of output it gives, if what its children are given is what it should be.

    Args:
        is_told: whether it is given a mask and the token's place, or is to know.
    """
    embedding = module._modules[names.embedding].weight
    normal = Normal(embedding.dtype)

    def hidden() -> torch.Tensor:
        return normal(1, 1, embedding.shape[1], magnitude=magnitude)

    count = len(module._modules[names.layers])
    embedded, normed = hidden(), hidden()
    angles = (normal(1, 1, 8), normal(1, 1, 8))
    passed_on = [hidden() for _ in range(count)]
    kept = [tensor.clone() for tensor in (embedded, *passed_on)]
    stand_ins = [StandIn(output) for output in passed_on]
    children: dict[str, Any] = {
        names.embedding: StandIn(embedded),
        names.layers: nn.ModuleList(stand_ins),
        names.norm: StandIn(normed),
        names.rotary: StandIn(angles),
    }
    cache = DynamicCache()
    for layer in range(count):
        cache.update(torch.zeros(1, 1, _PAST, 1), torch.zeros(1, 1, _PAST, 1), layer)
    ids, places = torch.tensor([[1]]), torch.tensor([[_PAST]])
    output = type(module).forward(
        with_children(module, children),
        input_ids=ids,
        attention_mask=torch.ones(1, _PAST + 1, dtype=torch.int64) if is_told else None,
        position_ids=places if is_told else None,
        past_key_values=cache,
        use_cache=True,
    )
    if any(len(one.given) != 1 for one in (*stand_ins, *(children[name] for name in children if name != names.layers))):
        return None
    rotary = children[names.rotary].values
    if (
        not same(children[names.embedding].values[0], ids)
        or len(children[names.embedding].values) != 1
        or len(rotary) != 2
        or rotary[0] is not embedded
        or not same(rotary[1], places)
        or len(children[names.norm].values) != 1
        or children[names.norm].values[0] is not passed_on[-1]
    ):
        return None
    for before, stand_in in zip((embedded, *passed_on), stand_ins, strict=False):
        args, kwargs = stand_in.given[0]
        if len(args) != 1 or args[0] is not before or not _is_what_layers_get(kwargs, angles, cache, places):
            return None
    if not all(same(tensor, number) for tensor, number in zip((embedded, *passed_on), kept, strict=True)):
        return None
    is_it = (
        isinstance(output, ModelOutput)
        and set(output.keys()) == {"last_hidden_state", "past_key_values"}
        and output["last_hidden_state"] is normed
        and output["past_key_values"] is cache
    )
    return type(output) if is_it else None


def _is_what_layers_get(kwargs: dict[str, Any], angles: Any, cache: Cache, places: torch.Tensor) -> bool:
    """Whether a layer is called as `LayerChain` takes it."""
    rest = dict(kwargs)
    return (
        rest.pop("position_embeddings", None) is angles
        and rest.pop("past_key_values", None) is cache
        and rest.pop("use_cache", True) is True
        and same(rest.pop("position_ids", places), places)
        and all(value is None or value is False for value in rest.values())
    )


def _has_no_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    return all(getattr(config, name, None) is None for name in _WINDOWS) and set(kinds) <= {"full_attention"}


def _is_one(numbers: Any) -> bool:
    return type(numbers) is torch.Tensor and numbers.shape == (1, 1) and numbers.dtype is torch.int64 and numbers.is_cpu
