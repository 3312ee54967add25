"""kt-kernel as a contender of the CPU expert benchmark, when it is installed in the environment.

Its wheel asks for another torch: `pip install --no-deps kt-kernel`, away from the project's own environment, will do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from cpu_layers import Layer, Shape, Step
from cpu_measure import Job

CLASSES = {"bf16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}
_pools: dict[int, Any] = {}


def refusal() -> str:
    """Why this contender cannot run; empty when it can."""
    if importlib.util.find_spec("kt_kernel") is None:
        return "kt_kernel is not installed"
    try:
        with _silence():
            import kt_kernel  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except Exception as error:
        return f"kt_kernel does not load: {type(error).__name__} {error}"
    return ""


class KtKernel:
    """Experts packed by kt-kernel from bf16: as they are, or in int8 or int4 with a scale a row."""

    def __init__(
        self, shape: Shape, layers: list[Layer], form: str, copies: int, workers: int, most_tokens: int
    ) -> None:
        with _silence():
            import kt_kernel
            from kt_kernel import kt_kernel_ext as native

            self.name = f"kt-kernel, {workers} worker{'s' * (workers > 1)}"
            self.detail = f"{CLASSES[form]}, {kt_kernel.__cpu_variant__}, and a dispatching thread that spins"
            scale_bytes = 0 if form == "bf16" else 4 / shape.hidden
            self.expert_bytes = shape.expert_numbers * ({"bf16": 2.0, "int8": 1.0, "int4": 0.5}[form] + scale_bytes)
            self.copies = copies
            self._picks = shape.picks
            self._pool = _pools.get(workers) or _pools.setdefault(workers, _make_pool(native, workers))
            self._mask = torch.zeros(shape.experts, dtype=torch.bool)
            self._numbers = torch.arange(shape.experts)
            self._models = [
                self._load(native, shape, layers[copy % len(layers)], form, most_tokens, copy) for copy in range(copies)
            ]

    def _load(self, native: Any, shape: Shape, layer: Layer, form: str, most_tokens: int, number: int) -> Any:
        config = native.moe.MOEConfig(shape.experts, shape.picks, shape.hidden, shape.width, self._mask.data_ptr())
        config.layer_idx = number
        config.pool = self._pool.backend_
        # Its buffers go by whole tiles of tokens.
        config.max_len = -(-most_tokens // 64) * 64
        gate, up = (half.contiguous() for half in layer.up.chunk(2, dim=1))
        parts = {"gate": gate, "up": up, "down": layer.down}
        for name, stack in parts.items():
            if form == "bf16":
                setattr(config, f"{name}_projs", [[one.data_ptr() for one in stack]])
                setattr(config, f"{name}_scales", [[0] * shape.experts])
            else:
                setattr(config, f"{name}_proj", stack.data_ptr())
        model = getattr(native.moe, CLASSES[form])(config)
        self._pool.submit(model.load_weights_task(self._numbers.data_ptr()))
        self._pool.sync()
        return model

    def begin(self) -> None:
        pass

    def prepare(self, step: Step, copy: int) -> Job:
        model = self._models[copy]
        tokens = torch.tensor([step.x.shape[0]], dtype=torch.int32)
        ids, weights, out = step.ids.contiguous(), step.weights.contiguous(), torch.empty_like(step.x)

        def job() -> torch.Tensor:
            self._pool.submit(
                model.forward_task(
                    tokens.data_ptr(),
                    self._picks,
                    ids.data_ptr(),
                    weights.data_ptr(),
                    step.x.data_ptr(),
                    out.data_ptr(),
                    False,
                )
            )
            self._pool.sync()
            return out

        return job

    def close(self) -> None:
        self._models = []


def _make_pool(native: Any, workers: int) -> Any:
    config = native.WorkerPoolConfig()
    config.subpool_count = 1
    config.subpool_numa_map = [0]
    config.subpool_thread_count = [workers]
    return native.CPUInfer(config)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Its C++ side talks on the standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
