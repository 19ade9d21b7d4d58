"""Which line of a kernel is running. Invariant: a frame found here belongs neither to Triton nor to this package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import FrameType


def _folder(package: str) -> str:
    found = importlib.util.find_spec(package)
    return str(Path(found.origin).parent) if found is not None and found.origin else ""


_MACHINERY = (str(Path(__file__).parent), _folder("triton"))


def kernel_frame() -> FrameType:
    """The running frame of a kernel or device function: whoever called Triton's and our machinery."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return frame


def kernel_line() -> str:
    """file:line of the running line of a kernel or device function."""
    frame = kernel_frame()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
