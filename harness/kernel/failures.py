"""What an exception means that came out of a launch: a fault of the kernel, or memory that could not be had.

Invariant: memory of host or device that ran out is OUT_OF_MEMORY, whoever asked for it. What a program asks of its
multiprocessor (shared memory, registers) is the kernel's own fault: no state of the machine would let it run.
"""

from __future__ import annotations

import re

import torch

from harness.errors import AttnregError, DeviceMemoryError, KernelRaised, OutOfMemory, first_line

_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory.*?(\d+) bytes", re.DOTALL)
_DEVICE_MEMORY = re.compile(r"(?:Triton Error \[\w+\]|(?:CUDA|HIP) error): (?:out of memory|hipErrorOutOfMemory)")
_TOO_MANY_RESOURCES = "too many resources requested for launch"
_SPENT = {  # what Triton's OutOfResources counts, by its name for it
    "shared memory": "{required:,} bytes of shared memory, a multiprocessor here has {limit:,}",
    "tensor memory": "{required:,} columns of tensor memory, a multiprocessor here has {limit:,}",
    "threads": "{required:,} threads, its registers leave room for {limit:,} on a multiprocessor",
}


def cause_of(error: BaseException) -> BaseException:
    """The exception itself, without those that Triton's interpreter and compiler wrap around it."""
    while error.__cause__ is not None and (
        _is_triton(error, "InterpreterError")
        or (_is_triton(error, "CompilationError") and _is_triton(error.__cause__, "CompilationError"))
    ):
        error = error.__cause__
    return error


def kernel_error(error: BaseException) -> AttnregError:
    """OutOfMemory or KernelRaised, in a line, for what a kernel raised."""
    cause = cause_of(error)
    if shortage := memory_shortage(cause):
        return OutOfMemory(f"the kernel ran out of {shortage}")
    if excess := _excess(cause):
        return KernelRaised(f"the kernel cannot be launched: it needs {excess}")
    return KernelRaised(f"the kernel raised {type(cause).__name__}: {message_of(cause).splitlines()[0]}")


def message_of(cause: BaseException) -> str:
    """What an exception says; of Triton's compiler without the source it repeats. Never empty."""
    said = getattr(cause, "error_message", None) if _is_triton(cause, "CompilationError") else str(cause)
    return str(said or "").strip() or type(cause).__name__


def memory_shortage(error: BaseException) -> str | None:
    """Which memory could not be had, or None where `error` says nothing of the kind."""
    if isinstance(error, (torch.OutOfMemoryError, DeviceMemoryError)):
        return f"device memory: {first_line(error)}"
    if isinstance(error, MemoryError):
        return f"host memory: {first_line(error)}"
    if isinstance(error, RuntimeError):
        if found := _HOST_MEMORY.search(str(error)):
            return f"host memory: {int(found[1]):,} bytes could not be allocated"
        if _DEVICE_MEMORY.search(str(error)):
            return f"device memory: {first_line(error)}"
    return None


def is_refused_launch(error: BaseException) -> bool:
    """Whether a device error is about this launch alone and leaves the context alive."""
    return _TOO_MANY_RESOURCES in str(error)


def _excess(error: BaseException) -> str | None:
    """What the kernel asks of a multiprocessor that it does not have, or None."""
    if _is_triton(error, "OutOfResources"):
        spent = _SPENT.get(str(getattr(error, "name", "")), "{required:,} of what there are {limit:,}")
        return spent.format(required=getattr(error, "required", 0), limit=getattr(error, "limit", 0))
    if isinstance(error, RuntimeError) and is_refused_launch(error):
        return "more registers for its threads than a multiprocessor here has"
    return None


def _is_triton(error: BaseException, name: str) -> bool:
    """Whether `error` is of Triton's class `name`, told without importing Triton."""
    return any(c.__name__ == name and c.__module__.startswith("triton.") for c in type(error).__mro__)
