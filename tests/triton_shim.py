"""Has Triton's interpreter treat bf16 as numbers.

NumPy has no bf16, so the interpreter keeps its bits as uint16, and products, sums and dots of them are silently those
of the bits; casts from fp32 cut off instead of rounding. Here operands become fp32 first, and results round to nearest
even, as do sums and maxima along an axis. For triton 3.6 to 3.9.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """The numbers that bf16 `bits`, uint16, stand for."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, to nearest, ties to even; NaN stays NaN."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Change the interpreter of this process, once; it must be on already."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    import triton
    import triton.language as tl
    from triton.runtime import JITFunction, interpreter

    if isinstance(tl.sum, JITFunction):
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: its own functions are compiled ones")
    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "knows_bf16", False):
        return
    builder.knows_bf16 = True
    if triton.__version__.startswith("3.6."):
        _take_bounds_from_arrays(interpreter)
    _make_quick(interpreter, tl)

    def is_bf16(handle: Any) -> bool:
        return (
            isinstance(handle, handle_type)
            and handle.get_element_ty() == tl.bfloat16
            and handle.data.dtype == np.uint16
        )

    def up(handle: Any) -> Any:
        return handle_type(to_fp32(handle.data), tl.float32) if is_bf16(handle) else handle

    def down(handle: Any) -> Any:
        return handle_type(to_bf16(handle.data), tl.bfloat16)

    dot, binary, unary, cast = builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, up(a), up(b), *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        result = binary(self, up(left), up(right), op)
        return result if result.data.dtype == np.bool_ else down(result)

    def unary_op(self: Any, argument: Any, op: Any) -> Any:
        return down(unary(self, up(argument), op)) if is_bf16(argument) else unary(self, argument, op)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.get_element_ty(), getattr(target, "scalar", target)
        if before == tl.bfloat16 and after != tl.bfloat16:
            return up(source) if after == tl.float32 else cast(self, up(source), target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return down(handle_type(source.data.astype(np.float32), tl.float32))
        return cast(self, source, target)

    builder.create_dot, builder.binary_op, builder.unary_op = create_dot, binary_op, unary_op
    builder.cast_impl = cast_impl
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        if hasattr(builder, f"create_{name}"):
            setattr(builder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))

    for name in ("sum", "min_max"):
        if hasattr(interpreter.ReduceOps, name):
            setattr(interpreter.ReduceOps, name, _reduce_in_fp32(getattr(interpreter.ReduceOps, name), is_bf16, tl))


def _make_quick(interpreter: Any, tl: Any) -> None:
    """Leave out what takes most of the interpreter's time and changes nothing."""
    # Else all of the language is looked through at each launch, and at each call from one kernel's function to another.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    # Whether sums and products of whole numbers overflow is computed, and looked at with debug=True only.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    # Makes a table of all types at each call.
    numpy_type = interpreter._get_np_dtype
    of_numbers = cache(numpy_type)
    interpreter._get_np_dtype = lambda of: of_numbers(of.scalar) if type(of.scalar) is tl.dtype else numpy_type(of)
    equal = tl.dtype.__eq__
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    # Shapes that are the same need not be compared number by number.
    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(left: Any, right: Any) -> Any:
        same = left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values
        return (left, right) if same else broadcast(left, right)

    semantic.broadcast_impl_value = broadcast_impl_value
    # All of a type's shape is wrapped, checked and written out for each tensor, twice.
    _remember(tl.core.block_type, lambda element, shape: (element.name, *(getattr(n, "value", n) for n in shape)))
    _remember(tl.core.tensor, lambda handle, of: (type(of), of.name), "handle", "type")


def _remember(kind: Any, key_of: Callable[..., Hashable], *own: str) -> None:
    """Have objects of a class whose arguments are alike share their attributes, but for those given as `own`."""
    begin = kind.__init__
    known: dict[Hashable, dict[str, Any]] = {}

    def init(self: Any, *given: Any) -> None:
        key = key_of(*given)
        if key not in known:
            begin(self, *given)
            known[key] = {name: value for name, value in vars(self).items() if name not in own}
        else:
            vars(self).update(known[key])
            vars(self).update(zip(own, given, strict=False))

    kind.__init__ = init


def _take_bounds_from_arrays(interpreter: Any) -> None:
    """For loops up to a scalar: triton 3.6 keeps it in an array of one, which NumPy from 2.4 on takes for no number."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def _reduce_in_fp32(reduce: Callable[..., Any], is_bf16: Callable[[Any], bool], tl: Any) -> Callable[..., Any]:
    def reduced(self: Any, argument: Any, *rest: Any, **named: Any) -> Any:
        if not is_bf16(argument.handle):
            return reduce(self, argument, *rest, **named)
        numbers = self.to_tensor(to_fp32(argument.handle.data), tl.float32)
        result = reduce(self, numbers, *rest, **named)

        def lowered(part: Any) -> Any:
            data = part.handle.data
            return self.to_tensor(to_bf16(data), tl.bfloat16) if data.dtype == np.float32 else part

        return tuple(map(lowered, result)) if isinstance(result, tuple) else lowered(result)

    return reduced
