"""A model's parts, timed one by one on this machine, with the kernels, files and runtime that run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from moert.calibration._disk import Disk
from moert.calibration._whole_model import WholeModel
from moert.calibration._work import Work
from moert.calibration.looking import look
from moert.calibration.result import Calibration, Fingerprint, Shape, as_curve
from moert.calibration.sampling import Measured
from moert.calibration.subject import Subject
from moert.errors import ConfigError

STEP_TOKENS = (1, 16, 256)


def measure(
    subject: Subject, fingerprint: Fingerprint, shape: Shape, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Time everything. Blocks for some ten seconds; nothing else should run, neither here nor on the machine.

    Raises:
        ConfigError: the layers' experts are not computed by moert's kernels.
        TransferError, CorruptFileError: as reading records raises them.
    """
    tell = progress or (lambda done, total: None)
    parts = 6
    layer = subject.layers[0]
    if layer.spec.fused is None:
        raise ConfigError(f"{layer.spec.name} cannot be calibrated: {layer.spec.unfused_reason}")
    with torch.inference_mode():
        work = Work(subject, shape)
        call, expert = work.experts()
        tell(1, parts)
        with Disk(subject) as disk:
            read = disk.alone()
            tell(2, parts)
            expert_together, read_together = disk.beside(work, call.seconds)
        tell(3, parts)
        step = {n: work.step(n, call.seconds, expert) for n in STEP_TOKENS}
        tell(4, parts)
        model = WholeModel(subject, shape, work, call.seconds, as_curve(expert), as_curve(step))
        rest = {n: model.prompt(n) for n in subject.forward_tokens}
        tokens = model.tokens()
        tell(5, parts)
        paths = [str(file.path) for file in subject.source.files]
        looked = look(paths, shape.slot_bytes)
        without = Calibration(
            fingerprint=fingerprint,
            shape=shape,
            expert=expert,
            call=call,
            read=read,
            read_together=read_together,
            read_step=read,
            read_prompt=read,
            read_start=Measured.exactly(0.0),
            miss=Measured.exactly(0.0),
            miss_start=Measured.exactly(0.0),
            expert_together=expert_together,
            step=step,
            rest=rest,
            token=model.besides(tokens.whole),
            disk_bytes_per_s=looked,
        )
        found = replace(without, **model.reads(without.costs(), tokens)._asdict())
        found = replace(found, read_prompt=model.prompt_reads(found))
    tell(6, parts)
    return found
