"""The one module that changes Triton: it lays the strict machine over Triton's interpreter.

Invariant: every change goes through one `Patches`, which undoes all of them in reverse order. Only launches and memory
are here; the arithmetic is in harness.interpreter.arithmetic.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import KernelParam

from harness.errors import AttnregError, UsageError
from harness.interpreter import narrow
from harness.interpreter.arithmetic import strict_arithmetic
from harness.interpreter.errors import InterpreterUnsupported, NestedSession
from harness.interpreter.hints import broken_hint
from harness.interpreter.session import Session

_MISSING = object()
_LOUD_BYTE = 0xAA  # of every byte of an undefined integer lane
_TOUCHED = (  # (owner, names): all must exist before anything is patched
    (interpreter, ("_patch_lang", "_patch_attr", "_LangPatchScope", "_implicit_cvt", "_tuple_create", "_get_np_dtype")),
    (interpreter, ("interpreter_builder", "interpreter_semantic", "_interpreter", "_ir")),
    (interpreter.InterpretedFunction, ("run", "__call__", "rewrite")),
    (interpreter.InterpreterBuilder, ("binary_op", "unary_op", "cast_impl", "create_dot", "create_masked_load")),
    (interpreter.ReduceOps, ("apply_impl", "min_max", "sum", "to_tensor")),
    (interpreter.ScanOps, ("cumsum", "cumprod")),
)


class Patches:
    """Attribute changes that can be undone. Has the interface of Triton's own patch scope (set_attr, restore)."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        while self._undo:
            owner, name, original = self._undo.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def install(session: Session) -> Patches:
    """Patch Triton for `session`; the caller restores.

    Raises NestedSession where a session is open, InterpreterUnsupported where this Triton lacks what would be patched.
    """
    if interpreter._patch_lang.__module__ != interpreter.__name__:
        raise NestedSession("a strict session is open already: sessions do not nest")
    missing = [f"{owner.__name__}.{n}" for owner, names in _TOUCHED for n in names if not hasattr(owner, n)]
    if missing:
        raise InterpreterUnsupported(f"Triton {tl.__package__}'s interpreter lacks {', '.join(missing)}")
    patches = Patches()
    try:
        _patch_language(patches, session)
        _patch_launch(patches, session)
        _patch_memory(patches, session)
        for owner, name, value in strict_arithmetic():
            patches.set_attr(owner, name, value)
    except BaseException:
        patches.restore()
        raise
    return patches


# ---- the language: patched once per session instead of at every call ----


def _patch_language(patches: Patches, session: Session) -> None:
    patch_lang = interpreter._patch_lang
    patches.set_attr(interpreter, "_LangPatchScope", lambda: patches)
    patches.set_attr(interpreter, "_patch_attr", _patch_builtin)
    patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patches.set_attr(tl.dtype, "to_ir", _with_fnuz(tl.dtype.to_ir))
    # Stock 3.6 asks for a 0-dimensional array here, which scalars of the interpreter are not.
    patches.set_attr(tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.item()))
    # Stock builds its table of types anew at each of thousands of calls.
    patches.set_attr(interpreter, "_get_np_dtype", _cached_by_name(interpreter._get_np_dtype))
    # Launches and calls of device functions find nothing left to patch.
    patches.set_attr(interpreter, "_patch_lang", lambda fn: Patches())
    for name in ("multiple_of", "max_contiguous", "max_constancy"):
        hint = _checked_hint(name, session)
        patches.set_attr(tl, name, hint)
        patches.set_attr(tl.core, name, hint)


def _with_fnuz(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """dtype.to_ir, which stock knows for every format of 8 bits but the fnuz ones."""

    def to_ir(dtype: Any, builder: Any) -> Any:
        if narrow.FORMATS.get(dtype.name) in narrow.FNUZ:
            return getattr(builder, f"get_{dtype.name}_ty")()
        return stock(dtype, builder)

    return to_ir


def _cached_by_name(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def np_dtype(ty: Any) -> Any:
        found = known.get(ty.name)
        if found is None:
            found = known[ty.name] = stock(ty)
        return found

    return np_dtype


def _patch_builtin(owner: Any, name: str, member: Any, builder: Any, scope: Patches) -> None:
    semantic = interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    scope.set_attr(owner, name, call)


def _checked_hint(name: str, session: Session) -> Callable[..., Any]:
    def hint(input: Any, values: Any) -> Any:
        if isinstance(input, tl.tensor):
            listed = values if isinstance(values, (list, tuple)) else [values]
            wanted = [int(v.value) if isinstance(v, tl.constexpr) else int(v) for v in listed]
            if len(wanted) != max(1, len(input.shape)):
                raise ValueError(f"tl.{name} takes one value per dimension: {len(input.shape)}, got {len(wanted)}")
            broken = broken_hint(name, input.handle.data, wanted)
            if broken is not None:
                session.record("wrong_hint", broken)
        return input

    return hint


# ---- launches: annotated types, arguments in place, programs shuffled ----


def _patch_launch(patches: Patches, session: Session) -> None:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            _launch(session, kernel, grid, args, kwargs)

    def call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        # Annotations of device functions change no type when compiled either: only a launch honours them.
        return function.rewrite()(*args, **kwargs)

    patches.set_attr(interpreter.InterpretedFunction, "run", run)
    patches.set_attr(interpreter.InterpretedFunction, "__call__", call_device_function)


def _launch(session: Session, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function = kernel.rewrite()
    parameters = {
        name: KernelParam(i, parameter, False, False)
        for i, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items())
    }
    kwargs = {name: value for name, value in kwargs.items() if name in parameters}  # the rest are launch options
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    bound = inspect.getcallargs(kernel.fn, *args, **kwargs)
    tensors: dict[str, Any] = {}
    for name, value in bound.items():
        _collect_tensors(name, value, tensors)
    arguments = {
        name: value if parameters[name].is_constexpr else _argument(value, parameters[name].annotation_type)
        for name, value in bound.items()
    }
    sizes = [int(n) for n in (grid(bound) if callable(grid) else grid)]
    if not 1 <= len(sizes) <= 3:
        raise UsageError(f"{kernel.fn.__name__}: a grid has 1 to 3 dimensions, got {sizes}")
    x, y, z = [*sizes, 1, 1][:3]
    launch = session.begin_launch(kernel.fn.__name__, (x, y, z), tensors)
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(x, y, z)
    try:
        with np.errstate(all="ignore"):  # a GPU is silent about NaN and overflow
            for program in launch.programs():
                session.begin_program(program)
                builder.set_grid_idx(*program)
                function(**arguments)
        session.end_launch()
    except AttnregError:
        raise
    except Exception as error:  # whatever a kernel raises, as the stock interpreter reports it
        raise InterpreterError(f"{kernel.fn.__name__}: {error!r}") from error


def _collect_tensors(name: str, value: Any, tensors: dict[str, Any]) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _collect_tensors(f"{name}[{i}]", item, tensors)
    elif isinstance(value, interpreter.TensorDescriptor):
        _collect_tensors(name, value.base, tensors)
    elif hasattr(value, "data_ptr"):
        tensor = interpreter._unwrap_tensor(value)
        if tensor.device.type != "cpu":
            raise UsageError(f"{name} lives on {tensor.device}: interpreted kernels run on CPU tensors, in place")
        tensors[name] = tensor


def _argument(value: Any, annotated: str) -> Any:
    """A launch argument as the kernel sees it: a number gets its annotated type, or the one the compiler would give."""
    if isinstance(value, tuple):
        return interpreter._tuple_create(value, (_argument(item, "") for item in value))
    if not isinstance(value, (bool, int, float)):
        return interpreter._implicit_cvt(value)
    if not annotated or annotated.startswith("*"):
        annotated = _natural_type(value)
    ty = tl.str_to_ty(annotated, None)
    if ty.name in narrow.NARROW:
        data = narrow.encode(np.array([value], dtype=np.float32), ty.name)
    else:
        data = np.array([value], dtype=interpreter._get_np_dtype(ty))  # [1]
    return tl.tensor(interpreter.TensorHandle(data, ty), ty)


def _natural_type(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"


# ---- memory: every unmasked lane checked, undefined lanes loud ----


def _patch_memory(patches: Patches, session: Session) -> None:
    # The cache arguments between pointer and is_volatile differ between versions and mean nothing here.
    native = interpreter._interpreter
    handle = interpreter.TensorHandle

    def load(builder: Any, ptr: Any, *_: Any, **__: Any) -> Any:
        element = ptr.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        session.check("load", ptr.data, None, dtype.itemsize)
        everywhere = np.ones(ptr.data.shape, dtype=bool)
        return handle(native.load(ptr.data, everywhere, np.zeros(ptr.data.shape, dtype), dtype), element)

    def masked_load(builder: Any, ptrs: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        selected = np.asarray(mask.data, dtype=bool)
        session.check("load", ptrs.data, selected, dtype.itemsize)
        rest = undefined(ptrs.data.shape, element, dtype) if other is None else other.data
        return handle(native.load(ptrs.data, selected, rest, dtype), element)

    def store(builder: Any, ptr: Any, value: Any, *_: Any, **__: Any) -> None:
        everywhere = np.ones(ptr.data.shape, dtype=bool)
        masked_store(builder, ptr, value, SimpleNamespace(data=everywhere))

    def masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *_: Any, **__: Any) -> None:
        dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
        selected = np.asarray(mask.data, dtype=bool)
        session.check("store", ptrs.data, selected, dtype.itemsize)
        native.store(ptrs.data, value.data.astype(dtype, copy=False), selected)

    def atomic(name: str, pointer: int, mask: int | None) -> Callable[..., Any]:
        stock = getattr(interpreter.InterpreterBuilder, name)

        def checked(builder: Any, *args: Any) -> Any:
            addresses = args[pointer].data
            selected = None if mask is None else np.asarray(args[mask].data, dtype=bool)
            element = args[pointer].get_element_ty()
            if element.name in narrow.NARROW:
                raise InterpreterUnsupported(f"atomics on {element.name} are not interpreted")
            session.check("atomic", addresses, selected, interpreter._get_np_dtype(element).itemsize)
            return stock(builder, *args)

        return checked

    builder = interpreter.InterpreterBuilder
    patches.set_attr(builder, "create_load", load)
    patches.set_attr(builder, "create_masked_load", masked_load)
    patches.set_attr(builder, "create_store", store)
    patches.set_attr(builder, "create_masked_store", masked_store)
    patches.set_attr(builder, "create_atomic_cas", atomic("create_atomic_cas", 0, None))
    patches.set_attr(builder, "create_atomic_rmw", atomic("create_atomic_rmw", 1, 3))


def undefined(shape: tuple[int, ...], element: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """What a masked lane without `other` holds: NaN, or a negative integer of bytes 0xAA (-1431655766 for int32).

    On a GPU such a lane holds whatever the register held. A format without NaN gets its largest value.
    """
    if element.is_floating():
        if dtype.kind == "f":
            return np.full(shape, np.nan, dtype=dtype)
        return np.full(shape, narrow.NAN_CODES.get(element.name, 0x7F), dtype=dtype)
    return np.frombuffer(bytes([_LOUD_BYTE]) * dtype.itemsize, dtype=dtype).repeat(int(np.prod(shape))).reshape(shape)
