"""How far a model's decoding was from the limit of this machine."""

from __future__ import annotations

from torch import nn

from moert.calibration.result import Calibration
from moert.calibration.store import load
from moert.errors import ConfigError, MoertError
from moert.hf.calibrating import identify
from moert.hf.inspection import local_folder
from moert.hf.model import runtime_of
from moert.planning.limit import Limit, Ran
from moert.planning.limit import limit_of as limit
from moert.runtime.stats import Stats
from moert.simulate.events import Reading
from moert.simulate.run import EventSource, Setup, fewest_misses
from moert.trace import Trace


def calibration_of(model: nn.Module) -> Calibration | None:
    """What has been measured of a model on this machine; None: nothing, or its folder is unknown.

    Raises:
        ConfigError: the file that is there cannot be used.
    """
    folder = local_folder(str(getattr(getattr(model, "config", None), "_name_or_path", "") or "."))
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        return load(*identify(folder))
    except MoertError as error:
        raise ConfigError(f"the limit is unknown: {error}") from error


def limit_of(model: nn.Module, stats: Stats, trace: Trace) -> Limit:
    """The limit of what `stats` count as decoding, whose routing is `trace`. Blocks.

    Raises:
        ConfigError: the trace is of other tokens, there is none, or the model is not calibrated on this machine.
    """
    runtime = runtime_of(model)
    done = stats.decoding
    if not done.tokens:
        raise ConfigError("no token has been decoded after a prompt's first, so there is no speed")
    source = EventSource(trace, Reading("decode", 1))
    accesses = sum(int(chunk.sizes[chunk.counted].sum()) for chunk in source)
    if accesses != done.hits + done.misses:
        raise ConfigError(
            f"the trace has {accesses} uses of experts while decoding, and the model had {done.hits + done.misses}: "
            "call moert.reset_stats when recording begins, and moert.stats when it ends"
        )
    found = calibration_of(model)
    if found is None:
        raise ConfigError("the limit is unknown: this model is not calibrated here; moert doctor MODEL --calibrate")
    # The most slots of any layer: with as many in each the bound can only be lower.
    slots = max(layer.residency.capacity for layer in runtime.layers)
    record_bytes = max(layer.read_bytes(0) for layer in runtime.layers)
    reads = done.bytes_read / record_bytes if record_bytes else 0.0
    ran = Ran(
        tokens=done.steps,
        seconds=done.seconds * done.steps / done.tokens,
        hits=done.hits,
        misses=done.misses,
        stall_s=done.stall_s,
        compute_s=done.compute_s,
        reads=reads,
    )
    least = fewest_misses(source, slots, Setup(bypass=True)) or 0
    # What a prompt has read ahead is no read of the tokens after it.
    return limit(
        ran, least_misses=min(least, int(reads)), costs=found.costs(), other_s=found.dense_s(1) + found.steps_s(1)
    )
