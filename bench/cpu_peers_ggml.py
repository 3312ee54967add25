"""llama.cpp's ggml as a contender of the CPU expert benchmark, when llama_cpp is installed in the environment.

The graph is that of llama.cpp's MoE layer after the router: three products by expert, SwiGLU, weights, a sum over the
picks. Its libraries are called through ctypes, by functions alone: no structure of theirs is looked into.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from cpu_layers import Layer, Shape, Step
from cpu_measure import Job

F32, I32 = 0, 26
# Numbers of ggml's types, and whether llama.cpp keeps them repacked on x86.
TYPES = {"bf16": ("bf16", 30, False), "int8": ("q8_0", 8, False), "int4": ("q4_0", 2, True)}
_POINTER, _SIZE, _INT64, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _INT64, _INT64]),
    "ggml_new_tensor_3d": (_POINTER, [_POINTER, _INT, _INT64, _INT64, _INT64]),
    "ggml_reshape_3d": (_POINTER, [_POINTER, _POINTER, _INT64, _INT64, _INT64]),
    "ggml_view_2d": (_POINTER, [_POINTER, _POINTER, _INT64, _INT64, _SIZE, _SIZE]),
    "ggml_mul_mat_id": (_POINTER, [_POINTER] * 4),
    "ggml_swiglu_split": (_POINTER, [_POINTER] * 3),
    "ggml_mul": (_POINTER, [_POINTER] * 3),
    "ggml_add": (_POINTER, [_POINTER] * 3),
    "ggml_set_input": (None, [_POINTER]),
    "ggml_set_output": (None, [_POINTER]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_nbytes": (_SIZE, [_POINTER]),
    "ggml_row_size": (_SIZE, [_INT, _INT64]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_get_default_buffer_type": (_POINTER, [_POINTER]),
    "ggml_backend_reg_dev_get": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_log_set": (None, [_POINTER, _POINTER]),
    "ggml_gallocr_new": (_POINTER, [_POINTER]),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, [_POINTER, _POINTER]),
    "ggml_gallocr_free": (None, [_POINTER]),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
    "ggml_backend_cpu_reg": (_POINTER, []),
}


def _folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).with_name("lib") if spec is not None and spec.origin else None


def refusal() -> str:
    """Why this contender cannot run; empty when it can."""
    if _folder() is None:
        return "llama_cpp is not installed"
    try:
        _ggml()
    except (OSError, AttributeError) as error:
        return f"llama_cpp's ggml does not load: {error}"
    return ""


@ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
def _quiet(level: int, text: bytes, data: Any) -> None:
    """Takes ggml's talk of every tensor that it repacks."""


@functools.cache
def _ggml() -> Any:
    folder = _folder()
    assert folder is not None

    class Functions:
        pass

    functions = Functions()
    for library, names in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
        loaded = ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in names.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            setattr(functions, name.removeprefix("ggml_"), function)
    functions.log_set(_quiet, None)  # type: ignore[attr-defined]
    return functions


class Ggml:
    """Weights in the buffer type that llama.cpp would take, a graph for each step and copy."""

    def __init__(self, shape: Shape, layers: list[Layer], form: str, copies: int, threads: int) -> None:
        ggml = self._ggml = _ggml()
        type_name, self._type, is_repacked = TYPES[form]
        self.name = f"llama.cpp {type_name}"
        self.copies = copies
        self._shape = shape
        self._backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self._backend, threads)
        self._host = ggml.backend_get_default_buffer_type(self._backend)
        kind = self._repack_type() if is_repacked else None
        self.detail = ggml.backend_buft_name(kind or self._host).decode()
        self.expert_bytes = 3.0 * shape.width * ggml.row_size(self._type, shape.hidden)
        stored = [self._encode(part) for part in (*layers[0].up.chunk(2, dim=1), layers[0].down)]
        self._freed: list[tuple[Any, Any]] = []
        self._weights = [self._place(stored, kind or self._host) for _ in range(copies)]

    def _repack_type(self) -> Any:
        ggml = self._ggml
        registry = ggml.backend_cpu_reg()
        address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(ggml.backend_reg_dev_get(registry, 0))
        place = 0
        while listed[place]:
            if ggml.backend_buft_name(listed[place]) == b"CPU_REPACK":
                return listed[place]
            place += 1
        return None

    def _encode(self, stack: torch.Tensor) -> torch.Tensor:
        experts, rows, columns = stack.shape
        if self._type == TYPES["bf16"][1]:
            return stack.contiguous()
        coded = torch.empty(experts, rows * self._ggml.row_size(self._type, columns), dtype=torch.uint8)
        for source, target in zip(stack, coded, strict=True):
            numbers = source.float().contiguous()
            self._ggml.quantize_chunk(self._type, numbers.data_ptr(), target.data_ptr(), 0, rows, columns, None)
        return coded

    def _context(self, tensors: int, graph: bool = False) -> Any:
        ggml = self._ggml
        size = tensors * ggml.tensor_overhead() + (ggml.graph_overhead() if graph else 0)
        return ggml.init(_InitParams(size + 1024, None, True))

    def _place(self, stored: list[torch.Tensor], kind: Any) -> list[Any]:
        ggml, shape = self._ggml, self._shape
        context = self._context(3)
        sizes = [(shape.hidden, shape.width)] * 2 + [(shape.width, shape.hidden)]
        tensors = [ggml.new_tensor_3d(context, self._type, columns, rows, shape.experts) for columns, rows in sizes]
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise MemoryError("ggml has no memory for the experts; lower --working-set")
        self._freed.append((ggml.backend_buffer_free, buffer))
        self._freed.append((ggml.free, context))
        for tensor, data in zip(tensors, stored, strict=True):
            ggml.backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)
        return tensors

    def begin(self) -> None:
        pass

    def prepare(self, step: Step, copy: int) -> Job:
        ggml, shape = self._ggml, self._shape
        gate, up, down = self._weights[copy]
        tokens = step.x.shape[0]
        context = self._context(32 + 2 * shape.picks, graph=True)
        x = ggml.new_tensor_2d(context, F32, shape.hidden, tokens)
        ids = ggml.new_tensor_2d(context, I32, shape.picks, tokens)
        weights = ggml.new_tensor_3d(context, F32, 1, shape.picks, tokens)
        for tensor in (x, ids, weights):
            # Outputs too: the memory of a mere input is used again once it has been read, and the graph runs often.
            ggml.set_input(tensor)
            ggml.set_output(tensor)
        graph = ggml.new_graph(context)
        rows = ggml.reshape_3d(context, x, shape.hidden, 1, tokens)
        value = ggml.mul_mat_id(context, up, rows, ids)
        hidden = ggml.swiglu_split(context, ggml.mul_mat_id(context, gate, rows, ids), value)
        weighted = ggml.mul(context, ggml.mul_mat_id(context, down, hidden, ids), weights)
        ggml.build_forward_expand(graph, weighted)
        row_bytes = 4 * shape.hidden
        parts = [
            ggml.view_2d(context, weighted, shape.hidden, tokens, row_bytes * shape.picks, row_bytes * pick)
            for pick in range(shape.picks)
        ]
        total = functools.reduce(lambda left, right: ggml.add(context, left, right), parts)
        ggml.set_output(total)
        ggml.build_forward_expand(graph, total)
        allocator = ggml.gallocr_new(self._host)
        if not ggml.gallocr_alloc_graph(allocator, graph):
            raise MemoryError("ggml has no memory for the graph")
        self._freed += [(ggml.gallocr_free, allocator), (ggml.free, context)]
        inputs = (step.x.float(), step.ids.to(torch.int32), step.weights)
        for tensor, data in zip((x, ids, weights), (one.contiguous() for one in inputs), strict=True):
            ggml.backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)
        memory = (ctypes.c_float * (shape.hidden * tokens)).from_address(ggml.get_data(total))
        result = torch.frombuffer(memory, dtype=torch.float32).view(tokens, shape.hidden)

        def job() -> torch.Tensor:
            status = ggml.backend_graph_compute(self._backend, graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute gave {status}")
            return result

        return job

    def close(self) -> None:
        for free, handle in self._freed:
            free(handle)
        self._freed, self._weights = [], []
        self._ggml.backend_free(self._backend)
