"""The functions that `import moert` offers; HuggingFace is imported when one of them is first used."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

import moert.hf  # noqa: F401  # registers the quantizer plug-in, so that OffloadConfig works with from_pretrained
from moert.config import OffloadConfig, parse_budget
from moert.errors import ConfigError
from moert.hf import following, loading, patching, recording
from moert.hf import model as _model
from moert.runtime import device_opening
from moert.runtime.host_tier import Resized
from moert.runtime.stats import Stats

if TYPE_CHECKING:
    from moert.hf.placement import DeviceMap
    from moert.trace.trace import Trace, TraceLike

__all__ = [
    "OffloadConfig",
    "Progress",
    "close",
    "follow",
    "hint",
    "load",
    "patch",
    "record",
    "reset_stats",
    "resize",
    "stats",
    "unpatch",
]

Model = TypeVar("Model", bound="nn.Module")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as experts are read."""


def load(path_or_id: str | os.PathLike[str], *, progress: Progress | None = None, **options: Any) -> Any:
    """Load a HuggingFace model whose experts stay on disk and come into host memory as they are needed.

    The dense weights are loaded by HuggingFace as usual; expert weights are never materialised outside moert's tiers.
    The model is an ordinary HuggingFace model in evaluation mode: `generate`, pipelines and so on work as before. It
    keeps its files open and its threads alive until `moert.close`, the end of a `with` statement over it, or its
    collection. Blocks while it loads.

    With `device_memory` the dense weights are moved to the GPU, or go where HuggingFace's `device_map` says, and
    experts come to the GPU that their layer is on as they are needed, `device_memory` of them on each.

    Args:
        path_or_id: a checkpoint's folder, or a model id of the hub.
        progress: called from the loading thread while experts are preloaded.
        **options: the fields of `OffloadConfig` (host_memory, policy, ...); everything else (dtype, revision,
            attn_implementation, ...) goes to HuggingFace's `from_pretrained` unchanged, and so does `cache_dir`, which
            is the folder of models from the hub here.

    Returns:
        The model, of the class that its configuration names; what `from_pretrained` returns if it was asked for more.

    Raises:
        TypeError: what is to be loaded is neither a path nor an id.
        ConfigError: a malformed or misspelt option, or a path that is no checkpoint.
        UnsupportedModelError: a dense model, a quantised checkpoint, or experts of an unknown layout; it says which.
        KernelUnavailableError: with `device_memory`: the GPU is too old, or does not compute what the CPU does.
        CapacityError: a budget below what one token needs, or above the memory there is.
        CorruptFileError, TransferError: a file is missing, truncated, malformed or unreadable.
    """
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(
            f"moert.load takes a folder or a model id, not {_named(path_or_id)}; moert.patch takes a model in memory"
        )
    config, hf_kwargs = _split(options)
    if config.cache_dir is not None:
        hf_kwargs["cache_dir"] = config.cache_dir
    for name in hf_kwargs.keys() - {"cache_dir"}:
        if meant := difflib.get_close_matches(name, OffloadConfig.option_names(), n=1, cutoff=0.85):
            raise ConfigError(f"unknown option {name!r}; did you mean {meant[0]!r}?")
    return loading.load(path_or_id, config, progress, **hf_kwargs)


def patch(
    model: nn.Module, *, progress: Progress | None = None, device_map: DeviceMap | None = None, **options: Any
) -> Any:
    """Hand the experts of a model in memory to moert, in place; also usable as `with moert.patch(model): ...`.

    Without `host_memory`, or with enough of it, the experts stay in the very parameters they are in. With less, they
    are written to an unnamed file in `cache_dir` and their memory is freed, save for the slots. Blocks while it writes.
    Experts on a CUDA device stay in their parameters there, all of them, and moert's Triton kernels compute them.

    With `device_memory` the experts of a model on the CPU come to a GPU as they are needed, and everything else of the
    model is moved there, until `unpatch`.

    Args:
        progress: called from this thread while experts are preloaded.
        device_map: with `device_memory`, and as HuggingFace has it: which part of the model belongs on which GPU,
            "auto", "balanced", a device, or module path -> device. Each GPU has the experts of its layers, and
            `device_memory` of them. None: all of it on one GPU.
        **options: the fields of `OffloadConfig`.

    Returns:
        `model` itself. At the end of a `with` statement over it, it is unpatched. (Its type is not the argument's, as
        that has no `with` statement.)

    Raises:
        MoertError: it is patched already.
        TypeError: it is no model.
        ConfigError, UnsupportedModelError, KernelUnavailableError, CapacityError, TransferError: as `load`, and the
            model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"moert.patch takes a model that is in memory, not {_named(model)}; moert.load takes a folder or a model id"
        )
    config, unknown = _split(options)
    if unknown:
        raise ConfigError(f"unknown option {sorted(unknown)[0]!r}; there are {', '.join(OffloadConfig.option_names())}")
    if device_map is not None and config.device_memory is None:
        raise ConfigError(f"device_map={device_map!r} is for models whose experts come to GPUs: give device_memory too")
    placed: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    patching.patch(model, config, progress, **placed)
    return model


def unpatch(model: Model) -> Model:
    """Give a model its own experts modules back.

    After `patch`: the very same module and parameter objects, bit for bit. After `load`: the parameters are made and
    read, so the whole model must fit in memory, and it is then as if it had been loaded without moert. Blocks while it
    reads.

    Returns:
        `model` itself.

    Raises:
        MoertError: nothing in it is offloaded.
        CapacityError: too little memory for the experts; the model stays as it is and works.
        CorruptFileError, TransferError: an expert could not be read; likewise.
    """
    patching.unpatch(model)
    return model


def resize(model: nn.Module, host_memory: int | float | str | None = None) -> Resized:
    """Give the experts more or less host memory from now on, without loading anything again; no token changes.

    The experts that fit stay resident; which ones leave is the policy's choice. Memory that is given up is the system's
    again when this returns. It waits for the step that another thread is running, works between two steps, and blocks
    while memory is filled in or experts are moved within it.

    Args:
        model: loaded by moert, or patched with less host memory than its experts take.
        host_memory: as in `load`: "4GiB", bytes, or "25%" of the expert bytes. None: what `load` would take now by
            default, with room left for the KV cache of a text of `context` tokens, as the option of `load` or `patch`
            said; what such a cache takes already is not known, and so counts twice.

    Returns:
        The slots and bytes before and after.

    Raises:
        ConfigError: a malformed size.
        CapacityError: less than one token needs, or more than there is or may be taken; nothing has changed.
        MoertError: the experts are in the model's own parameters, or nothing is offloaded, or it is closed.
    """
    budget = None if host_memory is None else parse_budget(host_memory, "host_memory")
    runtime = _model.runtime_of(model)
    if budget is not None:
        return runtime.resize(budget)
    from moert.hf.cache_needs import cache_bytes_beside

    return runtime.resize(None, cache_bytes_beside(model))


def stats(model: nn.Module, trace: Trace | None = None) -> Stats:
    """What the model's cache has done since it was loaded or patched, or since `reset_stats`; a snapshot, cheap.

    Args:
        trace: what `record` has noted of the same tokens. Then the snapshot also says how far decoding was from the
            limit of this machine (`Stats.limit`), which takes seconds for long traces. It needs the model's
            calibration (`moert doctor MODEL --calibrate`).

    Raises:
        MoertError: nothing in the model is offloaded.
        ConfigError: with a trace: of other tokens, or the model is not calibrated here.
    """
    found = _model.runtime_of(model).stats()
    if trace is None:
        return found
    from moert.hf.limits import limit_of

    return replace(found, limit=limit_of(model, found, trace))


def reset_stats(model: nn.Module) -> None:
    """Start the counts of `stats` at zero; what is resident stays resident.

    Raises:
        MoertError: nothing in the model is offloaded.
    """
    _model.runtime_of(model).reset_stats()


@contextmanager
def record(
    model: nn.Module, path: str | os.PathLike[str] | None = None, *, scores: bool = False, weights: bool = True
) -> Iterator[Trace]:
    """Note which experts each token chooses, in every layer, while the model runs within the `with` statement.

    Any model that moert can run, loaded, patched or neither, on any device; not one that another library has compiled.
    Each row of a batch becomes a sequence of the trace, from a fresh cache (`past_key_values`) on for as long as that
    cache is used; a forward pass without one is a sequence of its own. A step is a forward pass, or a part of one in
    which no layer runs twice. Padding, left or right, is in the trace as `Phase.PADDING`, and so are the tokens that
    `generate` feeds a row whose text has ended: they are routed, and their experts fetched. Rejected drafts of assisted
    decoding were routed, so they stay. In beam search a sequence is a row of the batch, whichever beam is in it. Picks
    of weight 0, and of experts without weights, fetch nothing and are left out.

    One thread at a time. Recordings of one model may be nested.

    Args:
        path: a file for the trace, written sequence by sequence; nothing is left of it if the block fails. None: the
            trace is in memory.
        scores: note the router's probabilities for all experts too, [T, L, E]. They are many more numbers.
        weights: note the weights of the experts that were chosen.

    Yields:
        The trace; its sequences are there when the block has ended, in memory. With `path` they are in the file only,
        where scores are kept in full precision, and weights in half of it if there are no scores.

    Raises:
        UnsupportedModelError: the model has no experts that moert can run, or scores are asked for and cannot be found.
        MoertError: the model was patched or unpatched within the block.
        ConfigError, TransferError: the file cannot be written.
    """
    with recording.record(model, path, scores=scores, weights=weights) as (trace, _):
        yield trace


@contextmanager
def follow(model: nn.Module, trace: TraceLike) -> Iterator[None]:
    """Have the model's tokens choose the experts that `trace` says, with its weights, within the `with` statement.

    So that a model of random weights, whose routers know nothing, moves experts as a real one does: hit rates and times
    are those of the trace's texts, while what the model says means nothing. The routers run all the same. Any model
    that `record` can record, patched or not; a recording made within has the trace's picks. Predictors that go by
    hidden states have nothing to go by.

    The first sequence that begins in the model, a row of a batch for one, follows the trace's first sequence from its
    first token on, the next one the second; after the last one comes the first again, and so it is with the tokens of
    a sequence. A token that is taken back is followed again. Of a trace with more layers the first ones count. Where a
    trace has no weights, a token's picks have all the same.

    Raises:
        UnsupportedModelError: the model has no experts that moert can run.
        ConfigError: the trace has no sequences, fewer layers than the model, or more experts in one of them.
        MoertError: in a forward pass, for a model whose experts are not given all of its tokens.
    """
    with following.follow(model, trace):
        yield


def hint(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Say which tokens will probably come after those of the next forward pass: a draft, or the rest of a prompt.

    For one sequence, until that pass is over. A predictor that knows what tokens choose (`lookup`, `token_table`,
    `expertflow`) tells a policy that looks ahead (`ema_ahead`) by it; no token depends on it. Returns at once.

    Raises:
        MoertError: nothing in the model is offloaded, or its experts are closed.
        ConfigError: these are no token ids.
    """
    if not all(isinstance(token, numbers.Integral) for token in token_ids):
        raise ConfigError(f"token_ids={token_ids!r} must be whole numbers")
    _model.runtime_of(model).hint([int(token) for token in token_ids])


def close(model: nn.Module) -> None:
    """Give back the memory, threads and files behind a model's experts; later forwards raise MoertError. Idempotent.

    Raises:
        MoertError: nothing in the model is offloaded.
    """
    _model.close(model)


def _named(thing: object) -> str:
    return repr(thing) if isinstance(thing, (str, os.PathLike)) or thing is None else f"a {type(thing).__name__}"


def _split(options: dict[str, Any]) -> tuple[OffloadConfig, dict[str, Any]]:
    names = OffloadConfig.option_names()
    config = OffloadConfig(**{name: value for name, value in options.items() if name in names})
    if config.device_memory is not None:
        device_opening.check_machine(config)
    return config, {name: value for name, value in options.items() if name not in names}
