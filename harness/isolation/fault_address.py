"""The address that a fatal access went to, which Python's faulthandler does not tell.

Invariant: for a process that is about to die and nothing else: the handler writes the address, puts back the handler
that was there, and lets the access fail again. Where it cannot be had (no Linux), nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_SA_SIGINFO = 4
_CODE, _ADDRESS = 8, 16  # offsets in siginfo_t, 64 bit
_SI_KERNEL = 128  # an address that is none: the processor does not say which
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def note_fault_address(path: Path) -> Callable[[], None]:
    """Have the address of the next SIGSEGV or SIGBUS written to `path`, in hexadecimal. Undone by what is returned.

    To be called after faulthandler.enable, whose handler is the one that is put back.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)
    before = {number: _Action() for number in (signal.SIGSEGV, signal.SIGBUS)}
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def noted(number: int, info: int, context: int) -> None:
        code = ctypes.c_int.from_address(info + _CODE).value
        if code > 0 and code != _SI_KERNEL:
            os.write(file, b"%#x\n" % ctypes.c_uint64.from_address(info + _ADDRESS).value)
        libc.sigaction(number, ctypes.byref(before[signal.Signals(number)]), None)
        if code <= 0:  # sent by somebody: it does not come again by itself
            getattr(libc, "raise")(number)

    handler = _Handler(noted)
    action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p), flags=_SA_SIGINFO)
    for number, old in before.items():
        libc.sigaction(number, ctypes.byref(action), ctypes.byref(old))

    def undo() -> None:
        for number, old in before.items():
            libc.sigaction(number, ctypes.byref(old), None)
        os.close(file)
        _ = handler  # lives as long as it is installed

    return undo


def read_fault_address(path: Path) -> int | None:
    """The address that was written, if any was."""
    text = path.read_text(encoding="ascii").split() if path.exists() else []
    return int(text[0], 16) if text else None
