"""A token's whole pass over a device as one graph: the host starts it, and nothing of the model's Python runs."""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.utils.generic import ModelOutput

from moert.device.base import CaptureError, Graph, OutOfDeviceMemoryError
from moert.hf.spared_forward import SparedForward, has_hooks, is_unseen
from moert.hf.unchanged import Unchanged
from moert.runtime.device_tier import DeviceTier
from moert.runtime.runtime import OffloadRuntime

WARM_UPS = 2
"""Passes before a graph is captured: what is compiled or allocated at first must have been."""

RETRY_PASSES = 256
"""Passes after which another attempt is made where there was no memory for a graph."""


class GraphedForward(SparedForward):
    """Stands in the `forward` of a whole model whose experts come to one device as they are needed.

    Passes of one token over a cache of fixed size, between which only tensors' contents change, are captured once and
    then replayed, while the device runs its passes by itself (`moert.runtime.device_planned`). Anything else is
    computed by the class's own code. Results are new memory at each call.

    A pass that turns out to have needed an expert on disk is run again, by the class's code and as the host decides,
    over the cache as it was: where that cannot be, because somebody looks at what happens within it, the device runs
    none.

    For `generate(cache_implementation="static")`, or any `StaticCache`. Threads take turns, pass by pass.
    """

    def __init__(self, module: nn.Module, runtime: OffloadRuntime) -> None:
        super().__init__(module, runtime)
        self._forward = type(module).forward
        self._turn = threading.RLock()
        self._signature: tuple[Any, ...] | None = None
        self._seen = 0
        self._pass: _Pass | None = None
        self.is_on = True
        """Whether passes are made graphs; else the model's code starts each kernel, with the same result."""
        self.captured = 0
        """Graphs so far."""
        self.replayed = 0
        """Passes so far that were replays."""
        self.why_not: str | None = None
        """Why the latest attempt to capture one failed."""
        self._is_short_said = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's forward."""
        # Between its beginning and the question whether it was void a pass must be the only one.
        with self._turn:
            return super().__call__(*args, **kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = type(module).forward
        if args or own is not self._forward or not self._is_usual(module, kwargs):
            return own(module, *args, **kwargs)
        cache = kwargs["past_key_values"]
        if not self._runtime.begin_planned(lambda: self._is_unseen(module)):
            return own(module, **kwargs)
        signature = (self._runtime.may_miss, *_signature(kwargs))
        if signature != self._signature or not (self._pass is None or self._pass.takes(cache)):
            # One at a time: the memory of its pass is the graph's own.
            self.drop_graphs()
            self._signature = signature
        if self._pass is None and self.is_on and self._seen >= WARM_UPS and self.why_not is None:
            self._capture(module, kwargs)
        # All of a cache that is not written anew at the same places.
        lengths = [layer.cumulative_length for layer in cache.layers]
        before = torch.stack(lengths) if self._runtime.may_miss else None
        output = None
        if self._pass is not None and self.is_on and self._pass.holds:
            output = self._pass.run(kwargs)
            self.replayed += output is not None
        if output is None:
            output = own(module, **kwargs)
            self._seen += self._runtime.is_planning
        if self._runtime.is_void():
            assert before is not None
            for length, was in zip(lengths, before, strict=True):
                length.copy_(was)
            output = own(module, **kwargs)
        return output

    def drop_graphs(self) -> None:
        with self._turn:
            self._signature, self._seen, self._pass, self.why_not = None, 0, None, None

    def _is_unseen(self, module: nn.Module) -> bool:
        """Whether nobody would notice that a pass is run twice."""
        return (self._pass is not None and self._pass.holds) or is_unseen(module)

    def _is_usual(self, module: nn.Module, arguments: dict[str, Any]) -> bool:
        if module.training or torch.is_grad_enabled():
            return False
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        return (
            isinstance(ids, torch.Tensor)
            and ids.shape == (1, 1)
            and isinstance(cache, Cache)
            and len(cache.layers) > 0
            and all(map(_is_fixed, cache.layers))
        )

    def _capture(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        try:
            self._pass = _Pass(self._runtime, module, self._forward, arguments)
            self.captured += 1
        except (CaptureError, OutOfDeviceMemoryError) as error:
            if isinstance(error, OutOfDeviceMemoryError):
                # Who has the memory may leave.
                self._seen = WARM_UPS - RETRY_PASSES
                if self._is_short_said:
                    return
                self._is_short_said = True
            else:
                self.why_not = str(error)
            warnings.warn(
                f"a token's pass cannot be made a graph, so each of its kernels is started one by one: {error}",
                RuntimeWarning,
                stacklevel=4,
            )


class _Pass:
    """A graph, the tensors that it reads its inputs from, and what it gives."""

    def __init__(self, runtime: OffloadRuntime, module: nn.Module, forward: Any, arguments: dict[str, Any]) -> None:
        """
        Raises:
            CaptureError: the pass waits for the device, or somebody looks at what happens within it.
            OutOfDeviceMemoryError: there is no memory for it.
        """
        cache = arguments["past_key_values"]
        self._runtime = runtime
        self._cache = weakref.ref(cache)
        self._states = [_states(layer) for layer in cache.layers]
        # Written to at each replay, in whatever mode that is.
        with torch.inference_mode(False):
            inputs = _mapped(arguments, torch.Tensor.clone)
        self._unchanged = _unchanged(module)
        found: list[Any] = []
        self._graph: Graph = runtime.capture(lambda: found.append(forward(module, **inputs)))
        if not isinstance(found[0], (ModelOutput, tuple)):
            raise CaptureError(f"a pass gives {type(found[0]).__name__}, which is no output of transformers")
        self._kind = type(found[0])
        # The cache itself is its user's, and nobody else's.
        output = dict(found[0]) if isinstance(found[0], ModelOutput) else dict(enumerate(found[0]))
        self._output = {name: None if item is cache else item for name, item in output.items()}
        self._gives_cache = [name for name, item in output.items() if item is cache]
        self._inputs = {name: item for name, item in inputs.items() if item is not cache}

    @property
    def holds(self) -> bool:
        """Whether the model is what it was and nobody wants to see what happens in it."""
        return self._unchanged.holds

    def takes(self, cache: Cache) -> bool:
        """Whether the pass can go on in `cache`: the one it was captured with, or, when that is gone, another of its
        shape, whose tensors are then the graph's."""
        before = self._cache()
        if before is not None:
            return before is cache
        states = [_states(layer) for layer in cache.layers]
        if [_shapes(state) for state in states] != [_shapes(state) for state in self._states]:
            return False
        for layer, mine, given in zip(cache.layers, self._states, states, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(given[name])
                setattr(layer, name, tensor)
        self._cache = weakref.ref(cache)
        return True

    def run(self, arguments: dict[str, Any]) -> Any:
        """Do the pass; the output is new memory. None: the device does not run it by itself any more."""
        _copy(self._inputs, arguments)
        if not self._runtime.replay(self._graph):
            return None
        output = _mapped(self._output, torch.Tensor.clone)
        output.update(dict.fromkeys(self._gives_cache, arguments["past_key_values"]))
        return self._kind(**output) if issubclass(self._kind, ModelOutput) else self._kind(output.values())


def _states(layer: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in state.items()}


def _is_fixed(layer: Any) -> bool:
    """Whether a layer of a cache is tensors that are written to in place, and no other state."""
    is_static = type(layer) is StaticLayer and layer.is_initialized
    return is_static and isinstance(layer.cumulative_length, torch.Tensor)


def _signature(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal in two passes for the one's graph to be the other's."""
    found: list[Any] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif isinstance(value, Cache):
            found.append((name, type(value)))
        else:
            # Whatever is no number or text had better be the same object.
            is_plain = value is None or isinstance(value, (bool, int, float, str))
            found.append((name, value if is_plain else id(value)))

    for name, value in arguments.items():
        add(name, value)
    return tuple(found)


def _mapped(value: Any, change: Any) -> Any:
    """A copy of nested dicts and tuples with their tensors changed; caches stay what they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _copy(into: dict[str, Any], values: dict[str, Any]) -> None:
    for name, item in into.items():
        if isinstance(item, torch.Tensor):
            item.copy_(values[name])
        elif isinstance(item, dict):
            _copy(item, values[name])


def _unchanged(module: nn.Module) -> Unchanged:
    """All that a graph takes for granted of a model.

    Raises:
        CaptureError: hooks look at what happens within it, which a replay would not show them.
    """
    parts = Unchanged()
    for path, child in module.named_modules():
        parts.add_ways(child)
        parts.add_tensors(child)
        parts.add_hooks(child)
        if has_hooks(child):
            raise CaptureError(f"{path} has hooks, which a graph would not call")
    return parts


def spare_and_graph(model: nn.Module, runtime: OffloadRuntime) -> None:
    """Have experts give memory back where `model` runs out of it, and passes of one token be graphs where that can be:
    over one device, unless somebody has given it a forward of its own, as accelerate does. Undone as every `OwnForward`
    is."""
    can_graph = isinstance(runtime.device, DeviceTier) and "forward" not in vars(model)
    model.forward = (GraphedForward if can_graph else SparedForward)(model, runtime)
