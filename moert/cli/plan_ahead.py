"""What `moert plan` says of reads ahead of time: how much they can bring at most, and what a trace says they do."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli.output import percent, rate
from moert.config import OffloadConfig
from moert.errors import ConfigError

if TYPE_CHECKING:
    from moert.planning.forecast import Speed
    from moert.planning.machine import Machine
    from moert.planning.model import ModelNeeds
    from moert.predictors.base import Need

TOKENS = 500
"""Of a trace that are simulated, as `moert simulate --machine` does."""


def check_asked(predictor: str | None, trace: Path | None) -> None:
    """
    Raises:
        ConfigError: a predictor without routing to predict.
    """
    if predictor is not None and trace is None:
        raise ConfigError(
            f"--predictor {predictor} without --trace: what reads ahead of time gain depends on the routing; "
            "give --trace TRACE, or leave --predictor out"
        )


def at_most(decode: Speed) -> dict[str, Any]:
    """The bound of what reads ahead of time can make of a forecast that has none."""
    least_s = decode.overlapped_s
    return {
        "counted": False,
        "predictor": OffloadConfig.predictor,
        "at_most_tokens_per_s": decode.tokens / least_s,
        "at_most_gain": decode.seconds / least_s - 1,
        "simulated": None,
    }


def simulated(
    path: Path, predictor: str | None, needs: ModelNeeds, machine: Machine, plan: dict[str, Any]
) -> dict[str, Any] | None:
    """What the runtime's steps take in simulated time, with what a predictor tells of the trace and without.

    Blocks for some seconds. None: sequences that run together cannot be simulated.

    Raises:
        ConfigError: there is no such predictor, or it needs more than the trace has.
    """
    if plan["batch"] != 1:
        return None
    from moert.cli.traces import open_trace
    from moert.runtime.simulated import at_hand_in, simulate_live
    from moert.simulate.steps import first_tokens
    from moert.trace import Trace

    n_layers = len(needs.cache or needs.layers)
    other_s = sum(machine.forward_s(needs.dense_read_bytes, n_layers, 1, needs.weight_bits))
    other_s += machine.layer_s(needs.cache_bytes(plan["context"], 1)) - machine.layer_start_s
    with ExitStack() as stack:
        opened = open_trace(stack, path, max(need.num_experts for need in needs.layers))
        text = _usual(at_hand_in(opened)) if predictor is None else predictor
        trace = Trace(opened.header, first_tokens(opened, TOKENS))
    without, found = (
        simulate_live(
            trace,
            OffloadConfig.policy,
            f"{plan['host']['expert_bytes']}B",
            [machine.costs(need.slot_bytes, needs.weight_bits) for need in needs.layers],
            layer_s=other_s / len(needs.layers),
            predictor=told,
            expert_bytes=[need.slot_bytes for need in needs.layers],
        )
        for told in (None, text)
    )
    return {
        "predictor": text,
        "timed_tokens": found.tokens,
        "ms_per_token": 1e3 * found.seconds_per_token,
        "unpredicted_ms_per_token": 1e3 * without.seconds_per_token,
        "gain": without.seconds / found.seconds - 1,
        "read_ahead_per_token": found.read_ahead / found.tokens,
        "predict_ms_per_token": 1e3 * found.predict_s / found.tokens,
    }


def _usual(at_hand: Collection[Need]) -> str:
    """The runtime's own predictor, or the one that takes its place where it lacks something."""
    from moert.hf.router_weights import WITHOUT_ROUTERS
    from moert.predictors._choice import read_predictor
    from moert.predictors.base import missing_needs

    kind, _ = read_predictor(OffloadConfig.predictor)
    return WITHOUT_ROUTERS if missing_needs(kind, at_hand) else OffloadConfig.predictor


def in_words(document: dict[str, Any]) -> list[tuple[str, str]]:
    """A row of the plan; none where nothing is read from disk."""
    ahead = document["reads_ahead"]
    if ahead is None:
        return []
    most = f"at most {rate(ahead['at_most_tokens_per_s'])} ({_gain(ahead['at_most_gain'])}), if nothing waited for them"
    found = ahead["simulated"]
    if found is None:
        return [("reads ahead", f"not counted; {most}")]
    speed = rate(document["decode"]["tokens_per_s"] * (1 + found["gain"]))
    return [("reads ahead", f"{speed} ({_gain(found['gain'])}) as {found['predictor']} predicts; {most}")]


def notes_of(document: dict[str, Any]) -> list[str]:
    """What is counted, in sentences."""
    ahead = document["reads_ahead"]
    if ahead is None:
        return []
    found = ahead["simulated"]
    text = (
        f"“Decode” counts no reads ahead of time. The runtime makes them ({ahead['predictor']}) and goes on where "
        "tokens come faster with them, so “decode” is what there is without"
    )
    if found is None:
        return [f"{text}; how much they bring depends on the routing, and --trace simulates it."]
    told = (
        f"With them: the runtime's own steps in simulated time, over {found['timed_tokens']:,} tokens of the trace, "
        f"predicting with {found['predictor']}"
    )
    return [f"{text}. {told}."]


def _gain(share: float) -> str:
    return f"+{percent(share)}" if share >= 0 else percent(share)
