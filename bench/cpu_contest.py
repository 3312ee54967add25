"""One contest of the CPU expert benchmark: who takes part, whether they are right, then who is fast."""

from __future__ import annotations

import importlib.util
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cpu_ours
import cpu_peers_ggml
import cpu_peers_kt
import torch
from cpu_layers import (
    SHAPES,
    Layer,
    Quantised,
    Shape,
    Step,
    dequantise,
    make_layers,
    make_steps,
    reference,
    rms_error,
    rounded,
    worst_error,
)
from cpu_measure import Cell, Contender, Job, Limits, rounds
from cpu_neighbour import measure_neighbour
from cpu_peers_torch import TorchGrouped, TorchLinear, TorchQuantised, Transformers
from cpu_report import cell_as_dict, limits_line, summarise

from moert import _C
from moert.config import format_bytes
from moert.errors import CapacityError
from moert.tiers.memory import memory_report

SYSTEMS = ("moert", "torch", "transformers", "kt-kernel", "llama.cpp")
NEIGHBOUR_SYSTEMS = ("moert", "transformers", "llama.cpp")

# moert is to give the fp64 result of what it is given (weights and activations as its format has them) up to sums in
# fp32: 1e-7, and 1e-4 where their noise moves an activation to the next bf16 number, which is 0.4 % off. In int8 such a
# number may be the largest of its group, and with it the scale of the group moves.
ALLOWED = {"bf16": 1e-3, "int8": 4e-3, "int4": 4e-3}
# Half a unit in bf16's last place is at most 2^-8 of a number, and what is rounded lies anywhere in it.
ROUNDING = 2.0**-8 / math.sqrt(3)
# Others are only to compute the same thing: rounding differs from one to the next.
ALLOWED_PEER = {"bf16": 0.02, "int8": 0.1, "int4": 0.4}
MOST_LAYERS_OF_A_BATCH = 3

MASKS = {
    "avx512_vnni": ("AVX512_CORE_VNNI", "AVX512", "avx512", "avx512_vnni"),
    "avx512": ("AVX512_CORE", "AVX512", "avx512", "avx512_base"),
    "avx2": ("AVX2", "AVX2", "avx2", "avx2"),
}


class Parity:
    """Verdicts on moert's output."""

    GREEN = "green"
    RED = "red"


def masked_environment(isa: str | None) -> dict[str, str]:
    """Environment variables that keep libraries from newer instructions; llama.cpp knows none."""
    if isa is None:
        return {}
    onednn, mkl, aten, kt = MASKS[isa]
    return {
        "MOERT_ISA": isa,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ATEN_CPU_CAPABILITY": aten,
        "KT_KERNEL_CPU_VARIANT": kt,
    }


def default_threads() -> int:
    """Physical cores that this process may use, by its affinity and its cgroups."""
    threads: int = _C.cpu_limits("/", sorted(os.sched_getaffinity(0)))["threads"]
    return threads


def refusals(systems: list[str]) -> dict[str, str]:
    """Those of the systems that cannot run here, and why."""
    asked: dict[str, Callable[[], str]] = {
        "kt-kernel": cpu_peers_kt.refusal,
        "llama.cpp": cpu_peers_ggml.refusal,
        "transformers": lambda: "" if importlib.util.find_spec("transformers") else "transformers is not installed",
    }
    found = {name: asked[name]() for name in systems if name in asked}
    return {name: why for name, why in found.items() if why}


@dataclass
class Contest:
    """What stays the same over all cells."""

    systems: list[str]
    isas: list[str]
    rounds: int
    threads: int
    kt_workers: list[int]
    working_bytes: int
    draw: random.Random
    seed: int
    is_red: bool = False
    """moert was wrong somewhere: nothing is timed from then on, as nothing will be told."""

    def run(
        self, shape_name: str, formats: list[str], batches: list[int], say: Callable[[str], None], *, neighbour: bool
    ) -> list[dict[str, Any]]:
        """All cells of one shape."""
        shape = SHAPES[shape_name]
        say(f"{shape_name}: weights")
        pages, layers = make_layers(shape, self._copies(2.0 * shape.expert_numbers * shape.experts), self.seed)
        limits = Limits(pages, self.threads)
        steps = {batch: make_steps(shape, batch, self.seed) for batch in batches}
        say(f"{shape_name}: the right answers, in fp64")
        exact = {batch: [_exact(layers[0], step) for step in taken] for batch, taken in steps.items()}
        cells = []
        for form in formats:
            stored = cpu_ours.stored(layers[0], form) if form != "bf16" and "moert" in self.systems else None
            entrants = self._entrants(shape, layers, form, max(batches), stored, neighbour)
            self._check_memory(shape, form, [name for name, _ in entrants])
            contenders: list[Contender] = []
            for name, make in self._entrants(shape, layers, form, max(batches), stored, neighbour):
                say(f"{shape_name}, {form}: weights of {name}")
                contenders.append(make())
            try:
                for batch in batches:
                    label = f"{shape_name}, {form}, {batch} tokens"
                    one = self._cell(
                        shape, form, steps[batch], exact[batch], contenders, layers, stored, limits,
                        lambda text, label=label: say(f"{label}: {text}"), neighbour,
                    )  # fmt: skip
                    cells.append({"shape": shape_name, "format": form, "batch": batch, "rounds": self.rounds, **one})
            finally:
                for contender in contenders:
                    contender.close()
        return cells

    def _check_memory(self, shape: Shape, form: str, names: list[str]) -> None:
        layer_bytes = shape.expert_numbers * shape.experts * cpu_ours.BYTES_PER_NUMBER[form]
        own = [name for name in names if form != "bf16" or name in ("kt-kernel", "llama.cpp")]
        need_bytes = int(len(own) * self._copies(layer_bytes) * layer_bytes + layer_bytes)
        available_bytes = memory_report().available_bytes
        if need_bytes > available_bytes:
            raise CapacityError(
                f"{form} weights for {', '.join(own)} take {format_bytes(need_bytes)}, there is "
                f"{format_bytes(available_bytes)}; lower --working-set or leave out some --systems"
            )

    def _copies(self, layer_bytes: float) -> int:
        return max(1, -(-self.working_bytes // int(layer_bytes)))

    def _entrants(
        self,
        shape: Shape,
        layers: list[Layer],
        form: str,
        most_tokens: int,
        stored: tuple[list[Quantised], list[Quantised]] | None,
        neighbour: bool,
    ) -> list[tuple[str, Callable[[], Contender]]]:
        copies = self._copies(shape.expert_numbers * shape.experts * cpu_ours.BYTES_PER_NUMBER[form])
        found: list[tuple[str, Callable[[], Contender]]] = []
        found += [
            ("moert", lambda isa=isa: cpu_ours.Moert(shape, layers, form, copies, stored, isa))
            for isa in (None, *self.isas)
        ]
        if form == "bf16":
            found.append(("torch", lambda: TorchLinear(shape, layers)))
            found.append(("torch", lambda: TorchGrouped(shape, layers)))
            found.append(("transformers", lambda: Transformers(shape, layers, "eager")))
            found.append(("transformers", lambda: Transformers(shape, layers, "grouped_mm")))
        found += [
            ("torch", lambda kind=kind: TorchQuantised(shape, layers, kind, copies))
            for kind in {"bf16": (), "int8": ("fbgemm", "int8pack"), "int4": ("int4pack",)}[form]
        ]
        found += [
            ("kt-kernel", lambda count=count: cpu_peers_kt.KtKernel(shape, layers, form, copies, count, most_tokens))
            for count in self.kt_workers
        ]
        found.append(("llama.cpp", lambda: cpu_peers_ggml.Ggml(shape, layers, form, copies, self.threads)))
        asked = [name for name in self.systems if not neighbour or name in NEIGHBOUR_SYSTEMS]
        return [(name, make) for name, make in found if name in asked]

    def _cell(
        self,
        shape: Shape,
        form: str,
        steps: list[Step],
        exact: list[torch.Tensor],
        contenders: list[Contender],
        layers: list[Layer],
        stored: tuple[list[Quantised], list[Quantised]] | None,
        limits: Limits,
        say: Callable[[str], None],
        neighbour: bool,
    ) -> dict[str, Any]:
        say("parity")
        ours = [one.name for one in contenders if isinstance(one, cpu_ours.Moert)]
        jobs: dict[str, list[Job]] = {}
        about: dict[str, dict[str, Any]] = {}
        for one in contenders:
            made = _jobs(one, steps)
            wanted = None
            if isinstance(one, cpu_ours.Moert):
                wanted = [_gated(layers[0], stored, form, step, one.decodes) for step in steps]
            about[one.name] = _judge(one, made[: len(steps)], exact, wanted, form)
            if not about[one.name]["refused"]:
                jobs[one.name] = made
        is_green = all(not about[name]["refused"] for name in ours)
        result: dict[str, Any] = {"parity": Parity.GREEN if is_green else Parity.RED, "contenders": about}
        self.is_red = self.is_red or not is_green
        if self.is_red:
            return {**result, "rows": []}
        begin = {one.name: one.begin for one in contenders}
        expert_bytes = {one.name: one.expert_bytes for one in contenders}
        step_bytes = {name: nbytes * steps[0].touched for name, nbytes in expert_bytes.items()}
        if neighbour:
            result["neighbour"] = measure_neighbour(jobs, begin, self.rounds, self.draw, say)
            return {**result, "rows": []}
        cell: Cell = rounds(jobs, begin, step_bytes, limits, self.rounds, self.draw, say)
        rows = summarise(cell, shape, steps[0], expert_bytes, ours[0] if ours else "", self.threads)
        return {**result, "rows": rows, "limits_line": limits_line(cell), **cell_as_dict(cell)}


def _jobs(contender: Contender, steps: list[Step]) -> list[Job]:
    """Every step on every copy, copy by copy; of a batch, which reads nearly all of a copy, on a few copies only."""
    copies = contender.copies
    if len(steps) == 1:
        copies = min(copies, MOST_LAYERS_OF_A_BATCH)
    return [contender.prepare(step, copy) for copy in range(copies) for step in steps]


def _judge(
    contender: Contender, jobs: list[Job], exact: list[torch.Tensor], wanted: list[torch.Tensor] | None, form: str
) -> dict[str, Any]:
    """The errors of a contender, from the second run of each job: nothing may be left over from the first."""
    contender.begin()
    outputs = []
    for job in jobs:
        job()
        outputs.append(job().clone())
    error = rms_error(torch.cat(outputs), torch.cat(exact))
    gate, allowed, refused = None, None, ""
    if wanted is not None:
        gate, allowed = worst_error(torch.cat(outputs), torch.cat(wanted)), ALLOWED[form]
        if outputs[0].dtype is torch.bfloat16:
            allowed = math.hypot(allowed, ROUNDING)
        if not gate <= allowed:
            refused = f"wrong output: {gate:.2e} off, allowed {allowed:.0e}"
    elif not error <= ALLOWED_PEER[form]:
        refused = f"wrong output: error {error:.2%}, so not timed"
    return {
        "detail": contender.detail,
        "expert_bytes": contender.expert_bytes,
        "error": error,
        "gate": gate,
        "allowed": allowed,
        "refused": refused,
    }


def _exact(layer: Layer, step: Step) -> torch.Tensor:
    return reference(step, lambda expert: layer.up[expert].double(), lambda expert: layer.down[expert].double())


def _gated(
    layer: Layer,
    stored: tuple[list[Quantised], list[Quantised]] | None,
    form: str,
    step: Step,
    decodes: Callable[[int], bool],
) -> torch.Tensor:
    """What moert is to give: its own weights, activations rounded as its kernels say, everything else in fp64."""

    def see(x: torch.Tensor) -> torch.Tensor:
        return rounded(x, form)

    if stored is None:
        return reference(step, lambda e: layer.up[e].double(), lambda e: layer.down[e].double(), see)
    ups, downs = stored
    return reference(step, lambda e: dequantise(ups[e], form), lambda e: dequantise(downs[e], form), see, decodes)
