"""Aliased pools on a CPU: one small memory file mapped again and again over a large reservation, private pages on top.
And fenced memory: pages in the middle of a reservation that nothing else is mapped into.

Invariant: the range is reserved before anything is mapped into it, so that no mapping can hit other memory; it is
unmapped when the last tensor over it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence

import torch

from harness.cache.pool import Extent, Interval, Pool, granules

BLOCK = 8 << 20  # bytes that everything without memory of its own shares
_PAGE = mmap.PAGESIZE
_2_32 = 1 << 32
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # of Linux
_PROT_NONE = 0


def cpu_can_alias() -> bool:
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def aliased_pool_cpu(extent: Extent, own: Sequence[Interval], fill: int) -> Pool:
    """A pool over `extent` of bytes `fill`; it costs BLOCK bytes and the pages of `own`. Raises MemoryError."""
    libc = _libc()
    lead = -(-extent.lead // _PAGE) * _PAGE + _PAGE
    span = -(-(lead + extent.size + 2 * _PAGE) // BLOCK) * BLOCK + BLOCK  # the last: an alias, always
    reserved = span + _2_32 + _PAGE
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _map(libc, None, reserved, _PROT_NONE, private | _MAP_NORESERVE, -1)
    base = start + lead + (extent.low_bits - start - lead) % _2_32
    first = (base - lead) // _PAGE * _PAGE  # of the range that is used
    pages = granules(own, _PAGE, base % _PAGE)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        file = os.memfd_create("attnreg-pool")
        try:
            os.truncate(file, BLOCK)
            for address in range(first, first + span, BLOCK):
                _map(libc, address, BLOCK, access, mmap.MAP_SHARED | _MAP_FIXED, file)
        finally:
            os.close(file)
        ctypes.memset(first + span - BLOCK, fill, BLOCK)
        for low, high in pages:
            _map(libc, base + low, high - low, access, private | _MAP_FIXED, -1)
            ctypes.memset(base + low, fill, high - low)
    except BaseException:
        libc.munmap(start, reserved)
        raise
    memory = _Memory.from_address_range(first, span)
    weakref.finalize(memory, libc.munmap, start, reserved)
    data = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
    physical = BLOCK + sum(high - low for low, high in pages)
    return Pool("aliased", data, base - first, tuple(pages), physical, (data[span - BLOCK :],))


def fenced_cpu(size: int, fence: int) -> torch.Tensor:
    """uint8 [size, up to whole pages]: memory with `fence` bytes on either side whose touch is SIGSEGV or SIGBUS.

    Raises MemoryError.
    """
    libc = _libc()
    span, fence = -(-max(size, 1) // _PAGE) * _PAGE, -(-fence // _PAGE) * _PAGE
    start = _map(libc, None, span + 2 * fence, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    if libc.mprotect(start + fence, span, mmap.PROT_READ | mmap.PROT_WRITE):
        why = os.strerror(ctypes.get_errno())
        libc.munmap(start, span + 2 * fence)
        raise MemoryError(f"{span:,} bytes between fences cannot be had: {why}")
    memory = _Memory.from_address_range(start + fence, span)
    weakref.finalize(memory, libc.munmap, start, span + 2 * fence)
    return torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`


class _Memory(ctypes.Structure):
    """A buffer over memory it does not own; being a class of Python's it can be watched by weakref."""

    @staticmethod
    def from_address_range(address: int, size: int) -> _Memory:
        sized: type[_Memory] = type("_Range", (_Memory,), {"_fields_": [("data", ctypes.c_char * size)]})
        return sized.from_address(address)


def _map(libc: ctypes.CDLL, address: int | None, size: int, access: int, flags: int, file: int) -> int:
    found = libc.mmap(address, size, access, flags, file, 0)
    if found == _FAILED:
        why = os.strerror(ctypes.get_errno())
        raise MemoryError(f"{size:,} bytes of addresses cannot be mapped: {why}")
    return int(found)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
