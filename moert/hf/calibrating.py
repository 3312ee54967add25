"""A checkpoint's shape, and the model in it set up so that its parts can be timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from moert.calibration.here import fingerprint
from moert.calibration.measuring import measure
from moert.calibration.repeating import MOST, repeated
from moert.calibration.result import Calibration, Fingerprint, Shape
from moert.calibration.subject import Ids, Subject
from moert.config import OffloadConfig
from moert.errors import UnsupportedModelError
from moert.hf.experts import OffloadedExperts
from moert.hf.inspection import Plan, Planner, inspection_of, plan_checkpoint
from moert.hf.loading import load
from moert.hf.model import close, offloaded_modules, runtime_of
from moert.hf.source import CheckpointSource
from moert.runtime.layer import LayerSpec
from moert.tiers.memory import available_bytes

MOST_BYTES = 2 << 30
"""Of experts in memory while they are timed."""
FORWARD_TOKENS = (1, 8, 32, 128, 512)


def identify(folder: Path, *, dtype: str = "auto") -> tuple[Fingerprint, Shape]:
    """This machine and the model in `folder`, as a calibration is looked up; reads headers, no weights.

    Raises:
        ConfigError, UnsupportedModelError, CorruptFileError, TransferError: loading would raise the same.
    """
    return fingerprint(folder.resolve()), _shape(plan_checkpoint(folder, Planner(), dtype=dtype))


def calibrate(
    folder: Path,
    config: OffloadConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    dtype: str = "auto",
    repeats: bool = True,
) -> Calibration:
    """Load the model in `folder` with some of its experts, and time its parts, twice or three times
    (`moert.calibration.repeating`). Blocks for half a minute, and for some minutes on a machine that is busy
    or has a slow disk.

    Args:
        config: how it will be loaded; host_memory, preload and predictor are chosen here.
        repeats: without, everything is measured once only.

    Raises:
        UnsupportedModelError: it does not generate text, or its experts are not computed by moert's kernels.
        ConfigError, CapacityError, CorruptFileError, TransferError: loading would raise the same.
    """
    plan = plan_checkpoint(folder, Planner(), dtype=dtype)
    shape = _shape(plan)
    planner = plan.planner
    options = replace(config or OffloadConfig(), host_memory=_budget(plan), preload=True, predictor="none")
    source = CheckpointSource(planner.paths, planner.records, direct=options.direct_io)
    try:
        model = load(str(folder), options, None, dtype=dtype)
        try:
            if not model.can_generate():
                raise UnsupportedModelError(f"{type(model).__name__} does not generate text, so no token can be timed")
            return _measure(
                model, plan, source, options, shape, fingerprint(folder.resolve()), progress, repeats=repeats
            )
        finally:
            close(model)
    finally:
        source.close()


def _measure(
    model: Any,
    plan: Plan,
    source: CheckpointSource,
    options: OffloadConfig,
    shape: Shape,
    here: Fingerprint,
    progress: Callable[[int, int], None] | None,
    *,
    repeats: bool,
) -> Calibration:
    wanted = {spec.index for spec in _alike(plan)}
    modules = {module.layer: module for module in offloaded_modules(model).values()}
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or FORWARD_TOKENS[-1]

    def run(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = modules[layer].forward(hidden, ids, weights)
        return output

    subject = Subject(
        layers=[layer for layer in runtime_of(model).layers if layer.spec.index in wanted],
        source=source,
        io_depth=options.io_depth,
        run=run,
        generate=lambda prompt, new_tokens, ids: _generate_s(model, wanted, prompt, new_tokens, ids),
        disk_s=lambda: runtime_of(model).stats().read_s,
        forward_tokens=[n for n in FORWARD_TOKENS if n < longest],
    )
    tell = progress or (lambda done, total: None)

    def once(before: int) -> Calibration:
        return measure(
            subject, here, shape, lambda done, total: tell(before * total + min(done, total - 1), MOST * total)
        )

    found = repeated(once) if repeats else once(0)
    tell(1, 1)
    return found


def _generate_s(model: Any, layers: Collection[int], prompt: int, new_tokens: int, ids: Ids) -> tuple[float, float]:
    text = torch.randint(0, 64, (1, prompt))
    with _routed(model, layers, ids):
        times = _Times()
        begin = perf_counter()
        model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            pad_token_id=0,
            streamer=times,
        )
        return times.first - begin, times.last - times.first


class _Times:
    """A streamer for `generate` that notes when the first new token came, and the last."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        self.last = perf_counter()
        if self._calls == 2:  # the first call is for the prompt
            self.first = self.last

    def end(self) -> None:
        pass


@contextmanager
def _routed(model: Any, layers: Collection[int], ids: Ids) -> Iterator[None]:
    """Experts that `ids` chooses, whatever the routers say, and a text that does not end."""
    modules = [module for module in offloaded_modules(model).values() if module.layer in layers]
    end = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = None
        for module in modules:
            module.forward = _chosen(module, ids)  # type: ignore[method-assign]
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
        model.generation_config.eos_token_id = end


def _chosen(module: OffloadedExperts, ids: Ids) -> Callable[..., torch.Tensor]:
    forward = module.forward

    def run(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        tokens, k = top_k_index.shape
        return forward(hidden_states, ids(module.layer, tokens, k), top_k_weights)

    return run


def _budget(plan: Plan) -> int:
    """Slots for half of the experts, so that the others can be missing; fewer where memory is short."""
    needs = inspection_of(plan).needs
    least = sum(need.top_k * need.slot_bytes for need in needs)
    half = sum(max(need.top_k, need.num_experts // 2) * need.slot_bytes for need in needs)
    return max(least, min(half, MOST_BYTES, available_bytes() // 4))


def _alike(plan: Plan) -> list[LayerSpec]:
    """The layers of the shape that most of them have."""
    specs = plan.planner.layers.specs
    keys = [(spec.expert_bytes, spec.num_experts, spec.top_k, spec.fused is None) for spec in specs]
    most = Counter(keys).most_common(1)[0][0]
    return [spec for spec, key in zip(specs, keys, strict=True) if key == most]


def _shape(plan: Plan) -> Shape:
    alike = _alike(plan)
    spec = alike[0]
    if spec.fused is None:
        raise UnsupportedModelError(f"{spec.name} cannot be calibrated: {spec.unfused_reason}")
    found = inspection_of(plan)
    ffn = spec.fused.ffn
    gate = ffn.gate
    if gate.gated and gate.interleaved:
        form = "gated, interleaved"
    else:
        form = "gated" if gate.gated else "plain"
    records = plan.planner.records[spec.index]
    return Shape(
        architecture=found.architecture,
        format=next(iter(found.stored_as), found.dtype),
        hidden=ffn.hidden,
        width=ffn.width,
        gate=f"{gate.activation} {form}",
        expert_bytes=spec.expert_bytes,
        slot_bytes=max(record.slot_bytes for record in records),
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        num_layers=len(alike),
        dense_bytes=found.dense_bytes,
    )
