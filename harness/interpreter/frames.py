"""Which lines of a kernel are running. Invariant: a frame found here belongs neither to Triton nor to this package."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import FrameType

LAUNCH = "_launch"  # the function of harness.interpreter.patches below which everything is a kernel


def kernel_frames() -> tuple[FrameType, FrameType]:
    """The running frame of a kernel or device function, and that of the kernel it was called from."""
    frame: FrameType | None = sys._getframe(1)
    inner = outer = None
    while frame is not None:
        if not _is_machinery(frame.f_code.co_filename):
            inner, outer = inner or frame, frame
        elif inner is not None and frame.f_code.co_name == LAUNCH:
            break
        frame = frame.f_back
    assert inner is not None
    assert outer is not None
    return inner, outer


def kernel_line() -> str:
    """file:line of the running line of a kernel or device function."""
    frame, _ = kernel_frames()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


@functools.cache
def _is_machinery(filename: str) -> bool:
    return filename.startswith(_machinery())


@functools.cache
def _machinery() -> tuple[str, ...]:
    triton = importlib.util.find_spec("triton")
    found = [Path(__file__), *([Path(triton.origin)] if triton is not None and triton.origin else [])]
    return tuple(str(path.parent) for path in found)
