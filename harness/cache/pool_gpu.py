"""Aliased pools on a GPU: the driver's virtual memory maps one allocation again and again, granules of its own between.
And fenced memory: one allocation in the middle of a reservation.

Invariant: every mapping is a whole allocation, so that each can be unmapped as it was mapped; the range is freed in the
reverse order after the device has come to rest, when the last tensor over it is gone. Everything happens in torch's
primary context; neither managed memory nor multicast is used. HIP has the same calls under other names.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator, Sequence

import torch

from harness.cache.pool import Extent, Interval, Pool, granules
from harness.errors import DeviceMemoryError

BLOCK_GRANULES = 16  # in the block that whole stretches share
_2_32 = 1 << 32
_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0  # alike in both drivers
_OUT_OF_MEMORY = 2  # alike, too
_Word = ctypes.c_uint64  # an address or a handle
_size = ctypes.c_size_t
_CALLS = (
    "AddressReserve", "AddressFree", "Create", "Release", "Map", "Unmap", "SetAccess", "GetAllocationGranularity",
)  # fmt: skip


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):  # CUmemAllocationProp, hipMemAllocationProp
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):  # CUmemAccessDesc, hipMemAccessDesc
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Driver:
    """The calls of _CALLS as methods that raise MemoryError where the driver refuses."""

    def __init__(self) -> None:
        hip = torch.version.hip is not None
        library = ctypes.CDLL("libamdhip64.so" if hip else "libcuda.so.1")
        self._calls = {name: getattr(library, f"{'hipMem' if hip else 'cuMem'}{name}") for name in _CALLS}

    def status(self, name: str, *args: object) -> int:
        return int(self._calls[name](*args))

    def call(self, name: str, *args: object) -> None:
        if status := self.status(name, *args):
            why = "out of memory" if status == _OUT_OF_MEMORY else f"driver error {status}"
            raise DeviceMemoryError(f"virtual memory cannot be had: {name}: {why}")


@functools.cache
def _driver() -> _Driver | None:
    try:
        return _Driver()
    except (OSError, AttributeError):  # no such library, or one without virtual memory
        return None


def granule_size(device: torch.device) -> int | None:
    """Bytes of the smallest mapping on `device`; None where its driver has no virtual memory."""
    driver = _driver()
    if driver is None:
        return None
    torch.empty(1, device=device)  # makes torch's primary context current
    size = ctypes.c_size_t()
    refused = driver.status(
        "GetAllocationGranularity", ctypes.byref(size), ctypes.byref(_on(device)), ctypes.c_int(_MINIMUM)
    )
    return None if refused else int(size.value)


def _on(device: torch.device) -> _Properties:
    index = torch.cuda.current_device() if device.index is None else device.index
    return _Properties(type=_PINNED, location=_Location(_ON_DEVICE, index))


class _Range:
    """A reservation and what is mapped into it; torch reads it through `__cuda_array_interface__`."""

    def __init__(self, driver: _Driver, device: torch.device) -> None:
        self.properties = _on(device)
        self.first = self.span = 0  # address and bytes of what torch sees
        self._driver = driver
        self._undo: list[tuple[str, tuple[object, ...]]] = []
        weakref.finalize(self, _free, driver, self._undo, self.properties.location.id)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.span,), "typestr": "|u1", "data": (self.first, False), "version": 3, "strides": None}

    def reserve(self, size: int, granule: int) -> int:
        """The address of `size` bytes that nothing is mapped to."""
        start, zero = _Word(), ctypes.c_ulonglong(0)
        self._driver.call("AddressReserve", ctypes.byref(start), _size(size), _size(granule), _Word(0), zero)
        self._undo.append(("AddressFree", (_Word(start.value), _size(size))))
        return int(start.value)

    def create(self, size: int) -> int:
        """The handle of `size` bytes of memory."""
        handle, zero = _Word(), ctypes.c_ulonglong(0)
        self._driver.call("Create", ctypes.byref(handle), _size(size), ctypes.byref(self.properties), zero)
        self._undo.append(("Release", (_Word(handle.value),)))
        return int(handle.value)

    def map(self, address: int, size: int, handle: int) -> None:
        zero = ctypes.c_ulonglong(0)
        self._driver.call("Map", _Word(address), _size(size), _size(0), _Word(handle), zero)
        self._undo.append(("Unmap", (_Word(address), _size(size))))

    def show(self, first: int, span: int) -> torch.Tensor:
        """uint8 [span]: the memory mapped from address `first` on, which it keeps."""
        access = _Access(self.properties.location, _READ_WRITE)
        self._driver.call("SetAccess", _Word(first), _size(span), ctypes.byref(access), _size(1))
        self.first, self.span = first, span
        return torch.as_tensor(self, device=torch.device("cuda", self.properties.location.id))


def _free(driver: _Driver, undo: list[tuple[str, tuple[object, ...]]], index: int) -> None:
    """Refusals are not told: after a fault the context is dead, and its memory with it."""
    try:
        torch.cuda.synchronize(index)
    except torch.AcceleratorError:
        return
    while undo:
        name, args = undo.pop()
        driver.status(name, *args)


def aliased_pool_gpu(extent: Extent, own: Sequence[Interval], fill: int, device: torch.device, granule: int) -> Pool:
    """A pool over `extent` of bytes `fill`; it costs one block, one granule and the granules of `own`.

    `granule` is granule_size(device). Raises MemoryError.
    """
    driver = _driver()
    assert driver is not None
    block = granule * BLOCK_GRANULES
    lead = -(-extent.lead // granule) * granule + granule
    span = -(-(lead + extent.size + 2 * granule) // block) * block + block  # the last: an alias, always
    memory = _Range(driver, device)
    start = memory.reserve(span + _2_32 + granule, granule)
    base = start + lead + (extent.low_bits - start - lead) % _2_32
    first = (base - lead) // granule * granule
    private = granules(own, granule, (base - first) % granule)
    large, small = memory.create(block), memory.create(granule)
    stretches = list(_stretches([(base + low - first, base + high - first) for low, high in private], span, block))
    for low, high, is_own in stretches:
        step = granule if is_own or high - low < block else block
        for address in range(first + low, first + high, step):
            memory.map(address, step, memory.create(granule) if is_own else large if step == block else small)
    data = memory.show(first, span)
    shared = [data[span - block :]]
    shared += [data[low : low + granule] for low, high, is_own in stretches if not is_own and high - low < block][:1]
    physical = block + granule + sum(high - low for low, high in private)
    pool = Pool("aliased", data, base - first, tuple(private), physical, tuple(shared))
    for part in pool.parts():
        part.fill_(fill)
    return pool


def fenced_gpu(size: int, fence: int, device: torch.device, granule: int) -> torch.Tensor:
    """uint8 [size, up to whole granules]: memory with `fence` bytes on either side whose touch is an illegal access.

    Raises MemoryError.
    """
    span, fence = -(-max(size, 1) // granule) * granule, -(-fence // granule) * granule
    driver = _driver()
    assert driver is not None
    memory = _Range(driver, device)
    first = memory.reserve(span + 2 * fence, granule) + fence
    memory.map(first, span, memory.create(span))
    return memory.show(first, span)


def _stretches(own: Sequence[Interval], span: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """[0, span) cut at whole blocks and at `own`: (first, end, whether own); no stretch of others crosses a block."""
    place = 0
    for low, high in (*own, (span, span)):
        while place < low:
            end = min((place // block + 1) * block, low)
            yield place, end, False
            place = end
        if low < high:
            yield low, high, True
            place = high
