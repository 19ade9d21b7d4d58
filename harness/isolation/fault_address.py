"""The address that a fatal access went to, and whether it was a store, which Python's faulthandler does not tell.

Invariant: for a process that is about to die and nothing else: the handler writes the address, puts back the handler
that was there, and lets the access fail again. Where it cannot be had (no Linux), nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SA_SIGINFO = 4
_CODE, _ADDRESS = 8, 16  # offsets in siginfo_t, 64 bit
_SI_KERNEL = 128  # an address that is none: the processor does not say which
_ERROR = 40 + 19 * 8 if platform.machine() == "x86_64" else None  # offset of REG_ERR in ucontext_t
_WROTE = 2  # bit of it
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Fault:
    """A fatal access: "read", "wrote", or "touched" where the machine does not say which."""

    address: int
    access: str


class _Action(ctypes.Structure):
    """struct sigaction of Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def note_fault_address(path: Path) -> Callable[[], None]:
    """Have address and access of the next SIGSEGV or SIGBUS written to `path`. Undone by what is returned.

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
            os.write(file, b"%#x %s\n" % (ctypes.c_uint64.from_address(info + _ADDRESS).value, _access(context)))
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


def _access(context: int) -> bytes:
    if _ERROR is None:
        return b"touched"
    return b"wrote" if ctypes.c_uint64.from_address(context + _ERROR).value & _WROTE else b"read"


def read_fault(path: Path) -> Fault | None:
    """The access that was noted, if any was."""
    text = path.read_text(encoding="ascii").split() if path.exists() else []
    return Fault(int(text[0], 16), text[1]) if text else None
