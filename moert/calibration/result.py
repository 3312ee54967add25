"""What has been measured of one machine and one model's shape, as numbers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from moert.calibration.sampling import Measured
from moert.errors import ConfigError, CorruptFileError
from moert.schedule import Costs, Curve

VERSION = 2


@dataclass(frozen=True)
class Fingerprint:
    """What must be the same for numbers of one machine to hold on another."""

    cpu: str
    cores: int
    """That may be used."""
    kernels: str
    """The instruction set that experts are computed with."""
    threads: int
    """That compute."""
    memory_bytes: int
    """Of the machine, in whole GiB: the kernel keeps a little more or less of it each time."""
    disk: str
    """File system and device that the experts are read from."""
    moert: str
    torch: str
    transformers: str


@dataclass(frozen=True)
class Shape:
    """What must be the same for numbers of one model to hold for another."""

    architecture: str
    format: str
    """How an expert's weights are stored."""
    hidden: int
    width: int
    gate: str
    expert_bytes: int
    slot_bytes: int
    num_experts: int
    top_k: int
    num_layers: int
    """With experts."""
    dense_bytes: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.architecture} {self.format} {self.hidden}x{self.width} {self.gate}"


@dataclass(frozen=True)
class Calibration:
    """The times of a model's parts on a machine without a device. All of them are seconds."""

    fingerprint: Fingerprint
    shape: Shape
    expert: Mapping[int, Measured]
    """By tokens: one expert on the CPU, of `top_k` that are computed at once, in memory and out of the caches."""
    call: Measured
    """The fixed start of computing some experts at once."""
    read: Measured
    """One record from the disk, as many at once as it likes, and nothing else going on."""
    read_together: Measured
    """One record while the CPU computes without a pause."""
    read_step: Measured
    """For one record more that a step of the running model has to wait for, the disk is at work for so long."""
    read_prompt: Measured
    """One record more of the many that a prompt's step reads."""
    read_start: Measured
    """What the first of a step's records takes it besides that."""
    miss: Measured
    """For one record more a step takes so much longer besides."""
    miss_start: Measured
    """And this, if it has to wait for any."""
    expert_together: Measured
    """One expert and one token while the disk reads without a pause."""
    step: Mapping[int, Measured]
    """By tokens: what the runtime takes for a step of one layer besides its experts."""
    rest: Mapping[int, Measured]
    """By tokens: a prompt's forward, less what its experts and the runtime's steps take by the above."""
    token: Measured
    """The same for one more token of `generate`, all that it does included."""
    disk_bytes_per_s: float
    """What a short look at the disk said at the same time; a later look tells by how much it has changed."""
    device: None = None
    """Nothing of a device is measured."""

    def __post_init__(self) -> None:
        for name in ("expert", "step", "rest"):
            tokens = list(getattr(self, name))
            if not tokens or tokens[0] != 1 or any(b <= a for a, b in pairwise(tokens)):
                raise ConfigError(f"{name} must be measured for ascending numbers of tokens from 1 on, not {tokens}")
        if not (math.isfinite(self.disk_bytes_per_s) and self.disk_bytes_per_s > 0):
            raise ConfigError(f"disk_bytes_per_s={self.disk_bytes_per_s} must be above 0")

    @property
    def unsteady(self) -> tuple[str, ...]:
        """What could not be measured well because the machine was busy."""
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Measured):
                found += [] if value.is_steady else [field.name]
            elif isinstance(value, Mapping):
                found += [f"{field.name} of {n}" for n, one in value.items() if not one.is_steady]
        return tuple(found)

    def ends(self) -> tuple[Calibration, Calibration]:
        """What it would be if everything had always taken as little, or as much, as it did at times.

        How much the CPU and the disk slow each other down stays as it is.
        """

        def all_at(pick: str) -> Calibration:
            def one(value: Measured) -> Measured:
                return Measured.exactly(getattr(value, pick))

            found: dict[str, Any] = {}
            for field in fields(self):
                value = getattr(self, field.name)
                if isinstance(value, Measured):
                    found[field.name] = one(value)
                elif isinstance(value, Mapping):
                    found[field.name] = {n: one(part) for n, part in value.items()}
            found["expert_together"] = Measured.exactly(found["expert"][1].seconds * self.cpu_slowdown)
            found["read_together"] = Measured.exactly(found["read"].seconds * self.read_slowdown)
            return replace(self, **found)

        return all_at("low"), all_at("high")

    @property
    def cpu_slowdown(self) -> float:
        """How many times as long an expert takes while the disk reads; at least 1."""
        return max(1.0, _ratio(self.expert_together, self.expert[1]))

    @property
    def read_slowdown(self) -> float:
        """How many times as long a read takes while the CPU computes; at least 1."""
        return max(1.0, _ratio(self.read_together, self.read))

    def costs(self, *, read_factor: float = 1.0) -> Costs:
        """For `moert.schedule`; reads take `read_factor` times as long as they did."""
        return Costs(
            as_curve(self.expert),
            read_s=self.read_step.seconds * read_factor,
            cpu_start_s=self.call.seconds,
            read_start_s=self.read_start.seconds,
            miss_start_s=self.miss_start.seconds,
            miss_s=self.miss.seconds,
            read_few=self.shape.top_k,
            read_many_s=self.read_prompt.seconds * read_factor,
            cpu_slowdown=self.cpu_slowdown,
            read_slowdown=self.read_slowdown,
        )

    def dense_s(self, tokens: int) -> float:
        """The model's own work in a forward of so many new tokens, without its experts."""
        return self.token.seconds if tokens == 1 else as_curve(self.rest)(tokens)

    def steps_s(self, tokens: int) -> float:
        """What the runtime takes for all layers' steps in it, besides experts."""
        return self.shape.num_layers * as_curve(self.step)(tokens)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON, with a checksum."""
        document: dict[str, Any] = {"version": VERSION, **asdict(self)}
        for name in ("expert", "step", "rest"):
            document[name] = {str(n): one for n, one in document[name].items()}
        return {**document, "checksum": _checksum(document)}


def from_dict(document: Any) -> Calibration:
    """What `as_dict` made.

    Raises:
        CorruptFileError: it is something else, or has been changed, or is of another version.
    """
    if not isinstance(document, dict):
        raise CorruptFileError("is no JSON object")
    if document.get("version") != VERSION:
        raise CorruptFileError(f"is of version {document.get('version')!r}, not {VERSION}")
    content = {key: value for key, value in document.items() if key != "checksum"}
    if document.get("checksum") != _checksum(content):
        raise CorruptFileError("is not as it was written: its checksum is another")
    try:
        found: dict[str, Any] = {key: value for key, value in content.items() if key != "version"}
        found["fingerprint"] = Fingerprint(**found["fingerprint"])
        found["shape"] = Shape(**found["shape"])
        for name in ("expert", "step", "rest"):
            found[name] = {int(n): Measured(**one) for n, one in found[name].items()}
        for name in (
            "call",
            "read",
            "read_together",
            "read_step",
            "read_prompt",
            "read_start",
            "miss",
            "miss_start",
            "expert_together",
            "token",
        ):
            found[name] = Measured(**found[name])
        return Calibration(**found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"does not hold what a calibration does ({type(error).__name__}: {error})") from error


def as_curve(points: Mapping[int, Measured]) -> Curve:
    """The points as a cost curve: more tokens never take less, whatever the samples say."""
    seconds: list[float] = []
    for one in points.values():
        seconds.append(max(one.seconds, seconds[-1] if seconds else 0.0))
    return Curve(tuple(points), tuple(seconds))


def difference(one: Fingerprint | Shape, other: Fingerprint | Shape) -> str:
    """In what they differ, in words; empty if they do not."""
    mine, theirs = asdict(one), asdict(other)
    return ", ".join(f"{name} {theirs[name]}, not {mine[name]}" for name in mine if mine[name] != theirs.get(name))


def _ratio(one: Measured, other: Measured) -> float:
    return one.seconds / other.seconds if other.seconds else 1.0


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
