"""`moert plan`: whether and how a model fits a machine, and how fast it will be there."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli.opening import reading
from moert.cli.options import Json, Model, resolve_model
from moert.cli.output import bar, facts, percent, print_json, rate, stdout
from moert.cli.plan_ahead import at_most, check_asked, in_words, notes_of, simulated
from moert.cli.routing import read_routing
from moert.cli.timing import WIDE
from moert.config import Budget, format_at_least, format_bytes, parse_budget
from moert.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from moert.planning.forecast import HitCurve, Prompts, Speed
    from moert.planning.machine import Machine
    from moert.planning.memory import Layout
    from moert.planning.model import ModelNeeds

CONTEXT = 4096
_GIB = 1 << 30
_PARTS = {
    "cpu": "the CPU, reading weights",
    "device": "the device",
    "link": "the link to the device",
    "disk": "the disk",
    "overhead": "what a layer takes besides its weights",
}


def plan(
    model: Model,
    machine: Annotated[
        str,
        typer.Option(
            metavar="this|NAME|FILE",
            help='For which machine: "this" is looked at now, others come with moert or are described in a file.',
        ),
    ] = "this",
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the device, for experts.", show_default=False)
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the host, for experts.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Tokens of a sequence. Default: {CONTEXT}, or what the model takes.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.")] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Routing to expect. Default: that of usual models.", show_default=False),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --trace, what reads ahead of time are simulated with. Default: the runtime's own, or joint "
            "where that one needs more than a trace has; none: not simulated.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Say what goes where, how fast the model will be, what holds it up, and the command to run it.

    Reads the model's configuration and file headers, no weights.
    """
    check_asked(predictor, trace)
    with bar("reading headers"):
        folder = _folder(resolve_model(model))
        needs = _needs(folder)
    with bar("looking at the machine"):
        where = _machine(machine, folder)
    with bar("planning"):
        routing = read_routing(trace, needs)
        budgets = {
            "host_memory": None if host_memory is None else parse_budget(host_memory, "host_memory"),
            "device_memory": None if device_memory is None else parse_budget(device_memory, "device_memory"),
        }
        length = min(CONTEXT, needs.longest_context or CONTEXT) if context is None else context
        document = make_plan(
            needs,
            where,
            context=length,
            batch=batch,
            hits=routing.hits,
            prompts=routing.prompts,
            host_memory=budgets["host_memory"],
            device_memory=budgets["device_memory"],
        )
    if trace is not None and predictor != "none" and document["reads_ahead"] is not None:
        with bar("simulating reads ahead of time"):
            document["reads_ahead"] |= {"simulated": simulated(trace, predictor, needs, where, document)}
    document = {"model": model, "expected_routing": routing.source, **document}
    if machine == "this":
        from moert.cli.calibration import note_of

        document["machine_note"] = note_of(where)
    document["command"] = _command(model, needs, document)
    if json:
        print_json(document)
    else:
        _print(document, stdout())
    return 0


def _folder(name: str) -> Path:
    from moert.hf.inspection import local_folder
    from moert.hf.text import hush

    hush(bars=True)
    folder = local_folder(name)
    if folder is None:
        raise ConfigError(
            f"{name!r} is no folder, and no model of the hub that is on this machine yet: download it and ask again"
        )
    return folder


def _needs(folder: Path) -> ModelNeeds:
    from moert.hf.model_needs import read_needs

    with reading(str(folder)):
        return read_needs(folder)


def _machine(name: str, folder: Path) -> Machine:
    from moert.planning.machine import load_machine

    if name != "this":
        return load_machine(name)
    from moert.cli.calibration import calibrated
    from moert.cli.this_machine import this_machine

    return calibrated(this_machine(), folder)


def make_plan(
    needs: ModelNeeds,
    machine: Machine,
    *,
    context: int,
    batch: int,
    hits: HitCurve,
    host_memory: Budget | None = None,
    device_memory: Budget | None = None,
    prompt: int | None = None,
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """The plan as `--json` prints it.

    Args:
        prompt: tokens that prefill reads; None: 512, or the context if that is shorter.

    Raises:
        CapacityError, ConfigError: as `moert.planning.memory.lay_out`.
    """
    from moert.planning.forecast import decode_speed, prefill_speed, uniform_hits
    from moert.planning.memory import lay_out

    how = {"context": context, "batch": batch}
    layout = lay_out(needs, machine, **how, host_memory=host_memory, device_memory=device_memory)
    prompt = min(context, 512) if prompt is None else prompt

    def decoding(machine: Machine, hits: HitCurve = hits) -> Speed:
        return decode_speed(needs, machine, layout.placement, **how, hits=hits)

    def reading_prompts(machine: Machine) -> Speed:
        return prefill_speed(needs, machine, layout.placement, prompt=prompt, batch=batch, hits=hits, prompts=prompts)

    decode, worst, prefill = decoding(machine), decoding(machine, uniform_hits), reading_prompts(machine)
    ends = machine.ends()
    document: dict[str, Any] = {
        "architecture": needs.name,
        "machine": machine.name,
        "machine_numbers": dict(machine.notes or {}),
        **how,
        "fits": True,
        "host": _memory(layout.host),
        "device": None if layout.device is None else _memory(layout.device),
        "host_slots": list(layout.placement.host),
        "device_slots": None if layout.placement.device is None else list(layout.placement.device),
        "experts_bytes": needs.expert_bytes,
        "reads_from_disk": layout.is_read_from_disk,
        "cache_known": needs.cache is not None,
        "cache_problem": needs.cache_problem or None,
        "smallest_expert_bytes": needs.least_bytes,
        "decode": {**_speed(decode), "range_tokens_per_s": _range(decoding, ends)},
        "decode_without_locality": _speed(worst),
        "reads_ahead": at_most(decode) if layout.device is None and layout.is_read_from_disk else None,
        "prefill": {
            "prompt_tokens": prompt,
            **_speed(prefill),
            "range_tokens_per_s": _range(reading_prompts, ends),
        },
        "one_more_gib": {},
    }
    for tier in ("device", "host") if layout.device is not None else ("host",):
        document["one_more_gib"][tier] = _one_more(needs, machine, layout, tier, decode, hits, **how)
    return document


def _memory(memory: Any) -> dict[str, Any]:
    return {**asdict(memory), "used_bytes": memory.used_bytes}


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "tokens_per_s": speed.tokens_per_s,
        "seconds": speed.seconds,
        "hit_rate": speed.hit_rate,
        "bottleneck": speed.bottleneck,
        "busy_s": speed.busy,
    }


def _range(speed: Callable[[Machine], Speed], ends: tuple[Machine, Machine] | None) -> list[float] | None:
    """The least and the most of what the machine has been seen to do; None: it was not measured."""
    return None if ends is None else sorted(speed(end).tokens_per_s for end in ends)


def _shown(speed: dict[str, Any]) -> str:
    """A forecast, as a range where it is wide."""
    text = rate(speed["tokens_per_s"])
    least, most = speed["range_tokens_per_s"] or (1.0, 1.0)
    return f"{text} ({least:.1f}–{most:.1f})" if most > WIDE * least else text


def _one_more(
    needs: ModelNeeds, machine: Machine, layout: Layout, tier: str, now: Speed, hits: HitCurve, **how: int
) -> float | None:
    """Tokens a second that another GiB of experts brings; None: all of them are there."""
    from moert.planning.forecast import decode_speed
    from moert.planning.memory import lay_out

    memory = layout.device if tier == "device" else layout.host
    assert memory is not None
    if memory.expert_bytes >= needs.expert_bytes:
        return None
    # A machine with as much more, so that the question makes sense where memory is full.
    more = min(memory.expert_bytes + _GIB, needs.expert_bytes)
    field = f"{tier}_memory_bytes"
    larger = replace(machine, **{field: getattr(machine, field) + 2 * _GIB})
    other = layout.host if tier == "device" else layout.device
    budgets = {f"{tier}_memory": Budget(nbytes=more)}
    if other is not None:
        budgets["host_memory" if tier == "device" else "device_memory"] = Budget(nbytes=other.expert_bytes)
    try:
        grown = lay_out(needs, larger, **how, **budgets)  # type: ignore[arg-type]
    except CapacityError:
        return None
    return decode_speed(needs, larger, grown.placement, **how, hits=hits).tokens_per_s - now.tokens_per_s


def _command(model: str, needs: ModelNeeds, document: dict[str, Any]) -> str:
    words = ["moert", "run", model, "PROMPT"]
    for tier in ("host", "device"):
        if document[tier] is not None:
            words += [f"--{tier}-memory", _size(document[tier]["expert_bytes"], needs, document[f"{tier}_slots"])]
    return shlex.join(words)


def _size(nbytes: int, needs: ModelNeeds, slots: list[int]) -> str:
    """A budget that gives just these slots, in MiB if some number of them does."""
    from moert.plan import plan_slots

    if nbytes >= needs.expert_bytes:
        return "100%"
    for mib in (nbytes >> 20, (nbytes >> 20) + 1):
        if mib << 20 >= needs.least_bytes and plan_slots(needs.layers, Budget(nbytes=mib << 20)) == slots:
            return f"{mib}MiB"
    return f"{nbytes}B"


def _print(document: dict[str, Any], console: Console) -> None:
    console.print()
    console.print(Text.assemble((document["model"], "bold"), f"  on {document['machine']}"), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bright_black", padding=(0, 2, 0, 0))
    tiers = [tier for tier in ("device", "host") if document[tier] is not None]
    table.add_column("")
    for tier in tiers:
        table.add_column(tier, justify="right", no_wrap=True)
    names = {
        "dense_bytes": "dense weights",
        "cache_bytes": f"KV cache, {document['batch']} x {document['context']:,} tokens",
        "workspace_bytes": "workspace",
        "staging_bytes": "staging",
        "expert_bytes": f"experts, of {format_bytes(document['experts_bytes'])}",
        "used_bytes": "in all",
        "available_bytes": "available",
    }
    for key, name in names.items():
        values = [document[tier][key] for tier in tiers]
        if any(values):
            table.add_row(name, *(format_bytes(value) if value else "–" for value in values))
    console.print(table)
    console.print()
    decode, prefill, worst = document["decode"], document["prefill"], document["decode_without_locality"]
    gains = [
        f"{gain:+.1f} tokens/s on the {tier}"
        for tier, gain in document["one_more_gib"].items()
        if gain is not None and gain > 0.05
    ]
    console.print(
        facts(
            [
                ("decode", f"{_shown(decode)}, {percent(decode['hit_rate'])} of experts found"),
                *in_words(document),
                ("at worst", f"{rate(worst['tokens_per_s'])}, if routing prefers no expert"),
                ("prefill", f"{_shown(prefill)} of a prompt of {prefill['prompt_tokens']}"),
                ("held up by", _PARTS[decode["bottleneck"]]),
                ("1 GiB more", ", ".join(gains) or "brings nothing"),
                ("smallest", f"{format_at_least(document['smallest_expert_bytes'])} for experts"),
                ("run it", document["command"]),
            ]
        )
    )
    console.print()
    notes = [f"Speeds are forecasts; of the routing it expects {document['expected_routing']}."]
    notes += [document["machine_note"]] if "machine_note" in document else []
    if not document["cache_known"]:
        notes.append(f"The KV cache is unknown and counted as nothing: {document['cache_problem']}.")
    notes += notes_of(document)
    for note in notes:
        console.print(Text(note, style="bright_black"), soft_wrap=True)
