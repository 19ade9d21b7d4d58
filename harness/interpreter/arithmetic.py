"""The strict machine's arithmetic: the operations of Triton's interpreter whose stock results differ from a GPU's.

Invariant: bfloat16 and 8-bit floats are raw codes in a handle; whatever computes on them decodes, computes in
float32 and rounds once. Comparisons give int1. Nothing here changes Triton: `strict_arithmetic` lists replacements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from harness.interpreter import narrow
from harness.interpreter.errors import InterpreterUnsupported

Array = npt.NDArray[Any]
_ir = interpreter._ir


def strict_arithmetic() -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, value) of everything that replaces stock arithmetic."""
    builder = interpreter.InterpreterBuilder
    replacements: dict[str, Any] = {
        "binary_op": binary_op,
        "unary_op": unary_op,
        "cast_impl": convert,
        "create_fp_to_fp": convert,
        "create_dot": dot,
        "create_fma": fma,
        "create_clampf": clamp,
        "get_bf16": get_bf16,
        # propagate_nan=NONE, Triton's default, is the hardware's max: it returns the operand that is a number.
        "create_maxnumf": partialmethod(binary_op, op=np.fmax),
        "create_minnumf": partialmethod(binary_op, op=np.fmin),
    }
    yield from ((builder, name, value) for name, value in replacements.items())
    yield interpreter.ReduceOps, "apply_impl", reduce
    yield interpreter.ScanOps, "cumsum", _scan(np.cumsum)
    yield interpreter.ScanOps, "cumprod", _scan(np.cumprod)
    # The stock builder computes an overflow check beside every integer operation, then drops it: pure cost.
    singleton = interpreter.interpreter_builder
    yield singleton, "options", dataclasses.replace(singleton.options, sanitize_overflow=False)
    yield singleton, "codegen_fns", {**singleton.codegen_fns, "min_dot_size": min_dot_size}


# ---- narrow formats ----


def numbers(data: Array, element: Any) -> Array:
    """Handle data as numbers numpy computes with."""
    if data.dtype.itemsize <= 2 and element.name in narrow.NARROW:
        return narrow.decode(data, element.name)
    return data


def handle_of(values: Array, element: Any) -> TensorHandle:
    """Numbers as a handle of type `element`, rounded once where it is narrower."""
    if element.name in narrow.NARROW:
        return TensorHandle(_encode(values, element.name, False), element)
    return TensorHandle(values.astype(interpreter._get_np_dtype(element), copy=False), element)


def _encode(values: Array, name: str, toward_zero: bool) -> Array:
    if name == "fp8e4b15":
        raise InterpreterUnsupported("conversion to fp8e4b15 is the compiler's own code and is not interpreted")
    return narrow.encode(values, name, toward_zero)


# ---- element-wise ----


def binary_op(builder: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[[Array, Array], Array]) -> TensorHandle:
    element = lhs.dtype.scalar
    output = op(numbers(lhs.data, element), numbers(rhs.data, rhs.dtype.scalar))
    if output.dtype == np.bool_:
        return TensorHandle(output, tl.int1)
    return handle_of(output, element)


def unary_op(builder: Any, arg: TensorHandle, op: Callable[[Array], Array]) -> TensorHandle:
    element = arg.dtype.scalar
    return handle_of(op(numbers(arg.data, element)), element)


def fma(builder: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x * y + z: the product is not rounded to the operands' type."""
    element = z.dtype.scalar
    a, b, c = (numbers(h.data, h.dtype.scalar) for h in (x, y, z))
    if element.is_floating():
        a = a.astype(np.float64)
    return handle_of(a * b + c, element)


def clamp(builder: Any, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans: Any) -> TensorHandle:
    element = arg.dtype.scalar
    x, low, high = (numbers(h.data, h.dtype.scalar) for h in (arg, lo, hi))
    if propagate_nans == _ir.PROPAGATE_NAN.NONE:
        return handle_of(np.fmin(np.fmax(x, low), high), element)
    return handle_of(np.minimum(np.maximum(x, low), high), element)


def get_bf16(builder: Any, value: float) -> TensorHandle:
    return handle_of(np.array([value], dtype=np.float32), tl.bfloat16)


def convert(builder: Any, src: TensorHandle, dst_type: Any, rounding: Any = None) -> TensorHandle:
    """Any conversion between numbers; rounding is to nearest even unless it says toward zero."""
    source, target = src.dtype.scalar, dst_type.scalar
    values = numbers(src.data, source)
    toward_zero = rounding == _ir.ROUNDING_MODE.RTZ
    if target.name in narrow.NARROW:
        return TensorHandle(_encode(_as_float(values), target.name, toward_zero), target)
    if toward_zero and target == tl.float16:
        return TensorHandle(narrow.narrow_float16_toward_zero(values), target)
    return TensorHandle(values.astype(interpreter._get_np_dtype(target)), target)


def _as_float(values: Array) -> Array:
    return values if values.dtype.kind == "f" else values.astype(np.float32)


# ---- products ----


def dot(builder: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: Any) -> TensorHandle:
    """a @ b + d, summed in the accumulator's type or wider: int32 for int8, float64 for float64, else float32.

    a: [..., M, K], b: [..., K, N], d: [..., M, N]. float32 operands are rounded to TF32 where that is the precision
    asked for, which is Triton's default on NVIDIA GPUs.
    """
    left, right = numbers(a.data, a.dtype.scalar), numbers(b.data, b.dtype.scalar)
    if left.dtype.kind in "iu":
        wide: type[Any] = np.int32
    elif left.dtype == np.float64:
        wide = np.float64
    else:
        wide = np.float32
        if precision == _ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            left, right = narrow.round_to_tf32(left), narrow.round_to_tf32(right)
    product = np.matmul(left.astype(wide, copy=False), right.astype(wide, copy=False))
    element = d.dtype.scalar
    return handle_of(product + numbers(d.data, element), element)


def min_dot_size(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    """Least (M, N, K) of a dot that compiles for NVIDIA GPUs in every proved version."""
    return {8: (1, 1, 32), 16: (1, 1, 16), 32: (1, 1, 16), 64: (1, 1, 16)}[lhs.scalar.primitive_bitwidth]


# ---- reductions ----


def reduce(operation: Any, input: Any) -> Any:
    """Reduction with NaN propagated by max and min.

    Compiled, `tl.max` drops a NaN as the hardware's max does, and whether it shows depends on what follows. Here a NaN
    score never vanishes from a row maximum: honest kernels mask before they reduce, so it costs them nothing.
    """
    library = tl.standard
    combine = operation.combine_fn
    if combine is library._elementwise_max:
        return _extreme(operation, input[0], np.max, None)
    if combine is library._elementwise_min:
        return _extreme(operation, input[0], np.min, None)
    if combine in (library._argmax_combine_tie_break_left, library._argmax_combine_tie_break_fast):
        return _extreme(operation, input[0], np.max, np.argmax)
    if combine in (library._argmin_combine_tie_break_left, library._argmin_combine_tie_break_fast):
        return _extreme(operation, input[0], np.min, np.argmin)
    if combine is library._sum_combine:
        return _sum(operation, input[0])
    return operation.generic_reduce(input)


def _extreme(operation: Any, input: Any, value_op: Any, index_op: Any) -> Any:
    element = input.dtype
    data = numbers(input.handle.data, element)
    value = _packed(operation, value_op(data, axis=operation.axis, keepdims=operation.keep_dims), element)
    if index_op is None:
        return value
    index = index_op(data, axis=operation.axis, keepdims=operation.keep_dims)
    return value, operation.to_tensor(index, tl.int32)


def _sum(operation: Any, input: Any) -> Any:
    data = numbers(input.handle.data, input.dtype)
    return _packed(operation, np.sum(data, axis=operation.axis, keepdims=operation.keep_dims), input.dtype)


def _packed(operation: Any, values: Any, element: Any) -> Any:
    if element.name in narrow.NARROW:
        values = _encode(np.asarray(values), element.name, False)
    return operation.to_tensor(values, element)


def _scan(accumulate: Any) -> Callable[[Any, Any], list[Any]]:
    def scan(operation: Any, input: Any) -> list[Any]:
        sums = accumulate(numbers(input.handle.data, input.dtype), axis=operation.axis)
        return [_packed(operation, sums, input.dtype)]

    return scan
