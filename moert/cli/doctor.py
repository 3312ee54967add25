"""`moert doctor`: what this machine offers, which path each part of moert takes, and why."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moert.cli import probes
from moert.cli.opening import InputError, reading
from moert.cli.options import MODEL_HELP, Json, LoadOptions, resolve_model, with_load_options
from moert.cli.output import bar, facts, one_line, print_json, print_warning, stdout
from moert.cli.paths import choose_paths
from moert.config import format_bytes
from moert.errors import ConfigError, MoertError


@with_load_options(only=["host_memory", "direct_io", "cache_dir"])
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP, show_default=False)] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Load MODEL, measure what its parts take here, and keep that for forecasts."),
    ] = False,
    json: Json = False,
    *,
    options: LoadOptions,
) -> int:
    """Say what this machine offers, which path each part of moert takes, and why.

    With MODEL, also what the model holds, how much memory it needs, and what has been measured of it; its weights are
    loaded with --calibrate only.
    """
    if calibrate and model is None:
        raise ConfigError("--calibrate measures a model's parts: say which MODEL")
    name = resolve_model(model) if model is not None else None
    if calibrate and name is not None:
        _calibrate(name, options)
    with bar("looking around"):
        document = examine(name, options)
    if json:
        print_json(document)
    else:
        _print(document, stdout())
    return 0


def _calibrate(name: str, options: LoadOptions) -> None:
    """Measure, and keep what comes of it.

    Raises:
        ConfigError: the model is not on this machine.
        TransferError: there is no place to keep what is measured.
    """
    from moert.calibration import make_folder, save
    from moert.hf.calibrating import calibrate
    from moert.hf.inspection import local_folder
    from moert.hf.text import hush

    hush(bars=True)
    folder = local_folder(name, options.revision)
    if folder is None:
        raise ConfigError(
            f"{name!r} is no folder, and no model of the hub that is on this machine yet: download it and ask again"
        )
    make_folder()  # what cannot be kept need not be measured
    with bar("calibrating") as progress, reading(name):
        found = calibrate(folder, options.offload, progress.update, dtype=options.dtype)
    save(found)
    if found.unsteady:
        print_warning("the machine was busy while it was measured: intervals are wide, and forecasts as vague")


def examine(name: str | None, options: LoadOptions) -> dict[str, Any]:
    """Everything that doctor says, as one document."""
    processor = probes.probe(probes.cpu)
    cores = processor.get("cores_usable") or len(os.sched_getaffinity(0))
    memory = probes.probe(probes.memory, cores)
    checkpoint = None if name is None else _examine_model(name, options, memory.get("available_bytes"))
    record_bytes = (checkpoint or {}).get("slot_bytes") or probes.DEFAULT_RECORD_BYTES
    cache = options.offload.cache_dir or tempfile.gettempdir()
    disks = {"cache": {"path": cache, **probes.probe(probes.folder_disk, cache, record_bytes)}}
    files = (checkpoint or {}).pop("files", [])
    if files:
        folder = str(Path(files[0]).parent)
        disks["checkpoint"] = {"path": folder, **probes.probe(probes.checkpoint_disk, files, record_bytes)}
    document: dict[str, Any] = {
        "versions": probes.probe(probes.versions),
        "cpu": processor,
        "memory": memory,
        "disks": disks,
        "devices": probes.probe(probes.devices),
        "torch_threads": probes.probe(probes.torch_threads),
        "model": checkpoint,
    }
    document["paths"] = choose_paths(document, options.offload)
    return document


def _examine_model(name: str, options: LoadOptions, available_bytes: int | None) -> dict[str, Any]:
    """What a checkpoint holds; where moert cannot run it, why."""
    from moert.hf.cache_needs import cache_bytes
    from moert.hf.inspection import Planner, inspection_of, local_folder, plan_checkpoint
    from moert.hf.text import hush, read_settings
    from moert.plan import default_budget

    hush(bars=True)
    with reading(name):
        settings = read_settings(name, options.revision)
    found: dict[str, Any] = {
        "model": name,
        "model_type": settings.get("model_type"),
        "architecture": next(iter(settings.get("architectures") or ()), None),
        "files": [],
    }
    folder = local_folder(name, options.revision)
    if folder is None:
        return {**found, "supported": None, "reason": "not on this machine yet; download it and ask again"}
    try:
        with reading(name):
            plan = plan_checkpoint(folder, Planner(), dtype=options.dtype)
            inspection = inspection_of(plan)
            found["files"] = list(inspection.files)
    except ConfigError:
        raise
    except (MoertError, InputError) as error:
        return {**found, "supported": False, "reason": one_line(error)}
    needs = inspection.needs
    slots = sum(need.num_experts * need.slot_bytes for need in needs)
    room = None if available_bytes is None else max(0, available_bytes - inspection.dense_bytes)
    reserved = cache_bytes(plan.model, options.offload.context)
    return {
        **found,
        "calibration": _known(folder, options.dtype),
        "supported": True,
        "reason": None,
        "architecture": inspection.architecture,
        "dtype": inspection.dtype,
        "stored_as": next(iter(inspection.stored_as), None),
        "fused_gates": list(inspection.gates),
        "unfused_reasons": list(inspection.unfused_reasons),
        "num_layers": len(needs),
        "num_experts": max(need.num_experts for need in needs),
        "top_k": max(need.top_k for need in needs),
        "bytes_of_one_expert": max(need.expert_bytes for need in needs),
        "slot_bytes": max(need.slot_bytes for need in needs),
        "expert_bytes": inspection.expert_bytes,
        "dense_bytes": inspection.dense_bytes,
        "read_in_place": inspection.is_direct,
        "host_bytes_for_all": slots,
        "smallest_host_bytes": sum(need.top_k * need.slot_bytes for need in needs),
        "default_host_bytes": None if room is None else default_budget(needs, room, reserved).nbytes,
    }


def _known(folder: Path, dtype: str) -> dict[str, Any] | None:
    """What has been measured of the model; None where it cannot be."""
    from moert.cli.calibration import look_up, rows, summary

    try:
        known = look_up(folder, dtype)
    except MoertError:
        return None
    return {**summary(known), "rows": rows(known)}


def _print(document: dict[str, Any], console: Console) -> None:
    processor, memory, devices = document["cpu"], document["memory"], document["devices"]
    console.print()
    _section(console, "Machine", [*_cpu_rows(processor), *_memory_rows(memory), *_device_rows(devices)])
    for role, disk in document["disks"].items():
        _section(console, "Checkpoint disk" if role == "checkpoint" else "Disk of the cache folder", _disk_rows(disk))
    if document["model"] is not None:
        _section(console, "Model", _model_rows(document["model"]))
        if document["model"].get("calibration"):
            _section(console, "Its parts on this machine", document["model"]["calibration"]["rows"])
    console.print("[bold]What runs how[/]")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(overflow="fold")
    for path in document["paths"]:
        table.add_row(f"  {path['part']}", Text.assemble(path["path"], (f"\n{path['why']}", "bright_black")))
    console.print(table)
    console.print()
    console.print(Text(_versions_text(document["versions"]), style="bright_black"))


def _versions_text(versions: dict[str, Any]) -> str:
    if "problem" in versions:
        return f"versions could not be probed: {versions['problem']}"
    shown = ("moert", "python", "torch", "transformers", "triton")
    return "  ".join(f"{name} {versions[name] or '–'}" for name in shown)


def _section(console: Console, title: str, rows: list[tuple[str, str | Text]]) -> None:
    console.print(f"[bold]{title}[/]")
    console.print(facts([(f"  {name}", value) for name, value in rows]))
    console.print()


def _problem(name: str, finding: dict[str, Any]) -> list[tuple[str, str | Text]]:
    return [(name, Text(f"could not be probed: {finding['problem']}", style="yellow"))]


def _cpu_rows(cpu: dict[str, Any]) -> list[tuple[str, str | Text]]:
    if "problem" in cpu:
        return _problem("processor", cpu)
    why = f", held to {cpu['cores_quota']:.1f} by its cgroup" if cpu["cores_quota"] is not None else ""
    features = [name for name, usable in cpu["features"].items() if usable]
    return [
        ("processor", cpu["model"]),
        ("cores", f"{cpu['cores_usable']} usable of {cpu['cores_machine']}{why}"),
        ("instructions", ", ".join(features) or "none that moert knows"),
    ]


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str | Text]]:
    if "problem" in memory:
        return _problem("memory", memory)
    is_cgroup = memory["binding"] != memory["limits"][0]["source"]
    limit = f"limited by {memory['binding']}" if is_cgroup else "with no tighter limit by a cgroup"
    total, available = format_bytes(memory["total_bytes"]), format_bytes(memory["available_bytes"])
    return [
        ("memory", f"{available} available of {total}, {limit}"),
        ("memory speed", f"{_per_s(memory['read_bytes_per_s'])} read by all usable cores"),
        ("huge pages", f"{memory['huge_pages'] or 'unknown'}; {_huge_share(memory)}"),
        ("page-locking", f"up to {_limit(memory['locked_limit_bytes'])}"),
    ]


def _huge_share(memory: dict[str, Any]) -> str:
    if memory["arena_huge_bytes"] is None:
        return "the kernel does not say how many a test got"
    return f"{format_bytes(memory['arena_huge_bytes'])} of {format_bytes(memory['arena_bytes'])} in a test"


def _device_rows(devices: dict[str, Any]) -> list[tuple[str, str | Text]]:
    if "problem" in devices:
        return _problem("CUDA", devices)
    if not devices["devices"]:
        return [("CUDA", f"none: {devices['why']}")]
    return [("CUDA" if not index else "", _device_text(device)) for index, device in enumerate(devices["devices"])]


def _device_text(device: dict[str, Any]) -> str:
    free, total = format_bytes(device["free_bytes"]), format_bytes(device["total_bytes"])
    return f"{device['name']}, {free} free of {total}, sm_{device['capability'].replace('.', '')}"


def _disk_rows(disk: dict[str, Any]) -> list[tuple[str, str | Text]]:
    if "problem" in disk:
        return [("folder", disk["path"]), *_problem("reads", disk)]
    way = "past the page cache (O_DIRECT)" if disk["direct"] else "through the page cache, which may answer from memory"
    return [
        ("folder", disk["path"]),
        ("file system", f"{disk['file_system']} on {disk['device']}, {format_bytes(disk['free_bytes'])} free"),
        ("reads", f"{_per_s(disk['read_bytes_per_s'])} in {format_bytes(disk['record_bytes'])} records, {way}"),
    ]


def _model_rows(model: dict[str, Any]) -> list[tuple[str, str | Text]]:
    rows: list[tuple[str, str | Text]] = [("name", model["model"]), ("class", str(model["architecture"]))]
    if not model["supported"]:
        word = "unknown" if model["supported"] is None else "no"
        return [*rows, ("supported", Text(f"{word}: {model['reason']}", style="yellow"))]
    default = model["default_host_bytes"]
    sizes = ("bytes_of_one_expert", "expert_bytes", "dense_bytes")
    one, all_, dense = (format_bytes(model[name]) for name in sizes)
    return [
        *rows,
        ("supported", Text("yes", style="green")),
        ("experts", f"{model['num_layers']} layers of {model['num_experts']}, {model['top_k']} for each token"),
        *([("packed as", model["stored_as"])] if model["stored_as"] else []),
        ("sizes", f"one expert {one}, all {all_}, everything else {dense} ({model['dtype']})"),
        ("--host-memory", f"at least {format_bytes(model['smallest_host_bytes'])}; {_default(default, model)}"),
    ]


def _default(default: int | None, model: dict[str, Any]) -> str:
    if default is None:
        return "the default is unknown here"
    holds = (
        "all experts"
        if default >= model["host_bytes_for_all"]
        else f"{default / model['host_bytes_for_all']:.0%} of them"
    )
    return f"by default {format_bytes(default)}, which holds {holds}"


def _per_s(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s"


def _limit(value: int | None) -> str:
    return "any amount" if value is None else format_bytes(value)
