"""`strict_interpreter`: the context in which Triton's interpreter behaves as a GPU would.

Invariant: outside the context Triton is exactly as it was found, also after an exception; a kernel compiled for a GPU
is never touched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.interpreter import imported_interpreted, prepare
from harness.interpreter.errors import InterpreterUnsupported
from harness.interpreter.session import Session
from harness.interpreter.trace import Trace

if TYPE_CHECKING:
    import torch

PROVED = ((3, 6), (3, 7), (3, 8), (3, 9))  # the tests of this package pass on 3.6.0, 3.7.1, 3.8.0 and 3.9.0


@contextmanager
def strict_interpreter(
    buffers: Mapping[str, torch.Tensor] | None = None,
    *,
    outputs: Collection[str] | None = None,
    program_order_seed: int = 0,
    room: Mapping[str, int] | None = None,
    trace: Trace | None = None,
    workspaces: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> Iterator[Session]:
    """Run Triton kernels strictly: `with strict_interpreter({"q": q, "out": out}, outputs={"out"}) as session: ...`.

    buffers: CPU tensors that kernels may touch, by name; None: the tensors of each launch. outputs: names of those that
    may be stored to; None: all. Tensors of a launch whose allocation no buffer shares are the launch's workspaces.
    workspaces: more buffers that may be stored to, asked for as each launch begins.
    program_order_seed: orders the programs of every launch. room: elements behind the end of a buffer that may be
    loaded too. trace: filled with what programs load of the buffers that it watches.

    An access outside the buffers raises OutOfBounds, a store to an input ReadOnlyStore, both before memory is touched;
    elements stored by two programs of a launch, races (with a trace) and wrong hints are recorded in
    `Session.violations`. Any other exception of a kernel arrives as Triton's InterpreterError.

    Raises InterpreterUnsupported (triton missing, or a version this is not proved on), InterpreterNotReady (triton was
    imported without `prepare("cpu")`), NestedSession (a session is open), ValueError (`outputs` names no buffer).
    """
    if importlib.util.find_spec("triton") is None:
        raise InterpreterUnsupported("triton is not installed: pip install triton")
    prepare("cpu")
    import triton

    check_version(triton.__version__)
    assert imported_interpreted()
    session = Session(buffers, outputs, program_order_seed, room or {}, trace, workspaces)

    from harness.interpreter.patches import install

    patches = install(session)
    try:
        yield session
    finally:
        patches.restore()


def check_version(version: str) -> None:
    """Raises InterpreterUnsupported unless `version` of Triton is one the strict interpreter is proved on."""
    numbers = version.split("+")[0].split(".")[:2]
    if not all(n.isdecimal() for n in numbers) or tuple(int(n) for n in numbers) not in PROVED:
        known = ", ".join(f"{major}.{minor}" for major, minor in PROVED)
        raise InterpreterUnsupported(f"the strict interpreter is proved on Triton {known}; found {version}")
