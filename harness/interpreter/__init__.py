"""Triton's interpreter made strict: on a CPU a kernel does what it would do on a GPU, and is watched more closely.

Invariant: importing this package imports neither torch nor triton, so that `prepare` can run before both. The context
manager is `harness.interpreter.strict.strict_interpreter`.
"""

from __future__ import annotations

import os
import sys

from harness.interpreter.errors import InterpreterNotReady

_VARIABLE = "TRITON_INTERPRET"  # Triton's own switch, read when a kernel is decorated


def prepare(device: str) -> None:
    """Make Triton interpret kernels on `device` "cpu" and compile them on any other.

    Call before triton is imported: Triton decides when a kernel, its own library included, is decorated. Triton need
    not be installed. Raises InterpreterNotReady where it was imported the other way.
    """
    interpret = device.split(":")[0] == "cpu"
    imported = imported_interpreted()
    if imported is not None and imported is not interpret:
        ways = ("to compile kernels", "to interpret kernels")
        raise InterpreterNotReady(
            f"triton was imported {ways[imported]}, but device '{device}' needs it {ways[interpret]}: "
            "start a new process, and choose the device before anything imports triton"
        )
    if interpret:
        os.environ[_VARIABLE] = "1"
    else:
        os.environ.pop(_VARIABLE, None)


def imported_interpreted() -> bool | None:
    """Whether the triton already imported interprets kernels; None where it is not imported yet."""
    library = sys.modules.get("triton.language.standard")
    if library is None:
        return None
    return type(library.sum).__name__ == "InterpretedFunction"
