"""What has been measured of a model here: made by `moert doctor --calibrate`, used by plan, simulate and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moert.cli.output import print_warning
from moert.errors import MoertError

if TYPE_CHECKING:
    from moert.calibration import Calibration, Fingerprint, Measured, Shape
    from moert.planning.machine import Machine


@dataclass(frozen=True)
class Known:
    """What there is of a checkpoint."""

    fingerprint: Fingerprint
    shape: Shape
    calibration: Calibration | None
    path: Path
    """Where it is, or would be."""
    problem: str | None = None
    """Why the file that is there cannot be used."""


def look_up(folder: Path, dtype: str = "auto") -> Known:
    """The calibration of the model in `folder` on this machine; reads headers, no weights.

    Raises:
        UnsupportedModelError: its experts cannot be calibrated; others as loading would.
    """
    from moert.calibration.store import load, path_of
    from moert.hf.calibrating import identify

    here, shape = identify(folder, dtype=dtype)
    path = path_of(here, shape)
    try:
        return Known(here, shape, load(here, shape), path)
    except MoertError as error:
        return Known(here, shape, None, path, str(error))


def calibrated(machine: Machine, folder: Path) -> Machine:
    """`machine`, which is this one, with what was measured of the model in `folder`, if anything.

    What cannot be used is said in one line. Takes a short look at the disk, whose speed now corrects that of then.
    """
    from moert.calibration import CalibratedMachine
    from moert.calibration.looking import read_factor
    from moert.hf.inspection import shard_files

    try:
        known = look_up(folder)
    except MoertError:
        return machine
    if known.problem is not None:
        print_warning(f"{known.problem} (moert doctor MODEL --calibrate)")
    if known.calibration is None:
        return machine
    return CalibratedMachine.of(machine, known.calibration, read_factor(known.calibration, shard_files(folder)))


def calibrated_for(machine: Machine, expert_bytes: int) -> Machine:
    """`machine`, which is this one, with what was measured of the latest model whose experts are so large, if any."""
    from moert.calibration import CalibratedMachine, find
    from moert.calibration.here import fingerprint

    found = find(expert_bytes, fingerprint(Path.cwd()))
    return machine if found is None else CalibratedMachine.of(machine, found)


def note_of(machine: Machine) -> str:
    """How well the numbers of this machine are known, in a sentence."""
    from moert.calibration import CalibratedMachine

    if not isinstance(machine, CalibratedMachine) or machine.calibration is None:
        return (
            "This machine's numbers are from a look of some seconds; “moert doctor MODEL --calibrate” measures the "
            "model's own parts."
        )
    text = f"Times are measured on this machine, of {machine.calibration.shape.architecture}"
    if abs(machine.read_factor - 1) > 0.02:
        text += f"; a read takes {machine.read_factor:.2f} times as long now as then"
    unsteady = machine.calibration.unsteady
    return f"{text}. {_unsteady(unsteady)}" if unsteady else f"{text}."


def summary(known: Known) -> dict[str, Any]:
    """What doctor says of it, as a document."""
    found = known.calibration
    document: dict[str, Any] = {"path": str(known.path), "problem": known.problem, "measured": None}
    if found is not None:
        document["measured"] = {
            **found.as_dict(),
            "cpu_slowdown": found.cpu_slowdown,
            "read_slowdown": found.read_slowdown,
            "unsteady": list(found.unsteady),
        }
    return document


def rows(known: Known) -> list[tuple[str, str]]:
    """The same for people."""
    found = known.calibration
    if found is None:
        return [("measured", known.problem or "not yet; --calibrate does it in a minute or two")]
    tokens = [n for n in (1, 16, 128) if n in found.expert]
    steps = [n for n in (1, 256) if n in found.step]
    prompts = [n for n in found.rest if n > 1][-2:]
    size = found.shape.slot_bytes
    lines = [
        ("an expert", ", ".join(f"{_ms(found.expert[n])} for {n}" for n in tokens) + " tokens, on the CPU"),
        ("… beside reads", f"{_ms(found.expert_together)} for 1 token, {found.cpu_slowdown:.2f} times as long"),
        ("a record", f"{_ms(found.read)} from the disk, {size / found.read.seconds / 1e9:.2f} GB/s"),
        ("… beside compute", f"{_ms(found.read_together)}, {found.read_slowdown:.2f} times as long"),
        (
            "… in a step",
            (
                f"{_ms(found.read_step)} of a token, {_ms(found.read_prompt)} of a prompt; {_ms(found.read_start)} "
                f"first; of the CPU {_ms(found.miss_start)}, and {_ms(found.miss)} for each"
            ),
        ),
        ("a layer's step", ", ".join(f"{_ms(found.step[n])} for {n}" for n in steps) + " tokens, besides experts"),
        (
            "all else",
            ", ".join(
                [f"{_ms(found.token)} for a token", *(f"{_ms(found.rest[n])} for a prompt of {n}" for n in prompts)]
            ),
        ),
        ("the device", "not measured; the first step on one times an expert there, on the link and on the CPU"),
        ("kept in", str(known.path)),
    ]
    if found.unsteady:
        lines.append(("remark", _unsteady(found.unsteady)))
    return lines


def _unsteady(parts: tuple[str, ...]) -> str:
    return (
        f"The machine was busy: {len(parts)} numbers varied by more than a fifth ({', '.join(parts[:3])}"
        f"{', …' if len(parts) > 3 else ''}); calibrate again when it is idle."
    )


def _ms(one: Measured) -> str:
    text = f"{1e3 * one.seconds:.2f} ms"
    if one.high > 1.1 * one.low:
        text += f" ({1e3 * one.low:.2f}–{1e3 * one.high:.2f})"
    return text
