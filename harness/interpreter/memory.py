"""Which addresses a kernel may touch, and which program stored which element last.

Invariant: a region is a maximal run of bytes covered by overlapping buffers (two views of one pool are one region);
regions of a list are disjoint and ascending, so that one sorted search places an access.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Addresses = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Buffer:
    """The bytes from the first to behind the last addressed element of a tensor, gaps of a strided view included."""

    name: str
    start: int
    end: int
    itemsize: int
    storage: int  # address of the allocation
    writable: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, writable: bool, room: int = 0) -> Buffer:
        """The bytes of `tensor` and of `room` elements behind it."""
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1 + room) * tensor.element_size() if tensor.numel() else 0
        start = tensor.data_ptr()
        storage = tensor.untyped_storage().data_ptr()
        unit = tensor.element_size()
        return cls(name, start, start + size, unit, storage, writable, tuple(tensor.shape), tensor.stride())

    def index(self, address: int) -> tuple[int, ...] | None:
        """Index of the element at `address`; None between elements, or where elements overlap."""
        rest, off = divmod(address - self.start, self.itemsize)
        found = [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            if self.shape[axis] > 1 and self.strides[axis]:
                found[axis], rest = divmod(rest, self.strides[axis])
        inside = all(i < n for i, n in zip(found, self.shape, strict=True))
        return tuple(found) if inside and not rest and not off else None

    @property
    def has_gaps(self) -> bool:
        return (self.end - self.start) // self.itemsize > math.prod(self.shape) > 0

    def holds(self, addresses: Addresses) -> npt.NDArray[np.bool_]:
        """Whether each address is that of an element, and not between elements.  addresses: [n]; [n]"""
        byte = addresses.astype(np.int64) - self.start
        rest = byte // self.itemsize
        inside = rest * self.itemsize == byte
        for stride, size in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            if size > 1 and stride:
                at = rest // stride
                rest -= at * stride
                inside &= at < size
        return np.asarray(inside & (rest == 0), dtype=bool)

    def distance(self, start: int, size: int) -> int:
        """Bytes between this buffer and the far end of the access; 0 where the access lies inside."""
        return max(self.start - start, start + size - self.end, 0)


class Regions:
    """Disjoint byte ranges merged from buffers."""

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.units: list[int] = []  # smallest element size in the region
        for buffer in sorted(buffers, key=lambda b: b.start):
            if buffer.start == buffer.end:
                continue
            if self.ends and buffer.start < self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], buffer.end)
                self.units[-1] = min(self.units[-1], buffer.itemsize)
            else:
                self.starts.append(buffer.start)
                self.ends.append(buffer.end)
                self.units.append(buffer.itemsize)
        self._starts = np.array(self.starts, dtype=np.uint64)
        self._ends = np.array(self.ends, dtype=np.uint64)

    def containing(self, lowest: int, highest: int, size: int) -> int:
        """Index of the one region that holds accesses of `size` bytes from `lowest` to `highest`; -1 if none does."""
        index = bisect_right(self.starts, lowest) - 1
        return index if index >= 0 and highest + size <= self.ends[index] else -1

    def place(self, addresses: Addresses, size: int) -> npt.NDArray[np.int64]:
        """Index of the region of every access, -1 where no region holds it.  # [n]"""
        index = np.searchsorted(self._starts, addresses, side="right") - 1
        if not self.starts:
            return index
        inside = (index >= 0) & (addresses + np.uint64(size) <= self._ends[index])
        return np.where(inside, index, -1)


@dataclass(frozen=True)
class StoreCounts:
    """What a store met: elements another program of this launch stored, and elements an earlier launch stored."""

    by_other_program: int
    by_earlier_launch: int
    first_clash: int  # address of the first element of the former; 0 where there is none


class WriterMap:
    """Serial number of the program that stored each element last; programs are numbered across launches from 1."""

    def __init__(self) -> None:
        self._writers: dict[tuple[int, int, int], npt.NDArray[np.int32]] = {}

    def store(
        self, start: int, end: int, unit: int, addresses: Addresses, size: int, serial: int, launch_serial: int
    ) -> StoreCounts:
        """Record that program `serial` of the launch that began at `launch_serial` stores `size` bytes per address.

        All addresses lie in the region [start, end) whose elements have `unit` bytes.  addresses: [n]
        """
        writers = self._of(start, end, unit)
        element = _elements(start, unit, addresses, size)
        previous = writers[element]
        writers[element] = serial
        if not previous.any():
            return StoreCounts(0, 0, 0)
        clash = (previous >= launch_serial) & (previous != serial)
        earlier = (previous > 0) & (previous < launch_serial)
        first = start + int(element[clash.argmax()]) * unit if clash.any() else 0
        return StoreCounts(int(clash.sum()), int(earlier.sum()), first)

    def last(self, start: int, end: int, unit: int, addresses: Addresses, size: int) -> npt.NDArray[np.int32]:
        """Who stored the elements of each access last, 0 for nobody: [n, elements per access].  addresses: [n]"""
        return self._of(start, end, unit)[_elements(start, unit, addresses, size)].reshape(len(addresses), -1)

    def view(self, start: int, end: int, unit: int, buffer: Buffer) -> npt.NDArray[np.int32]:
        """Who stored each element of `buffer`, which lies in the region, last: of its shape."""
        first, scale = (buffer.start - start) // unit, buffer.itemsize // unit
        strides = tuple(stride * scale * 4 for stride in buffer.strides)
        return np.lib.stride_tricks.as_strided(self._of(start, end, unit)[first:], buffer.shape, strides).copy()

    def _of(self, start: int, end: int, unit: int) -> npt.NDArray[np.int32]:
        writers = self._writers.get((start, end, unit))
        if writers is None:
            # Zero pages cost nothing until they are written, so that a large address range is fine.
            writers = self._writers[start, end, unit] = np.zeros((end - start + unit - 1) // unit, dtype=np.int32)
        return writers


def _elements(start: int, unit: int, addresses: Addresses, size: int) -> npt.NDArray[np.int64]:
    """Numbers of the elements that accesses of `size` bytes cover.  addresses: [n]"""
    element = ((addresses - np.uint64(start)) // np.uint64(unit)).astype(np.int64)
    return (element[:, None] + np.arange(size // unit)).reshape(-1) if size > unit else element


def describe(buffers: Iterable[Buffer], address: int, size: int) -> str:
    """Where an access lies in words: inside, before or past the nearest buffer."""
    nearest = min(buffers, key=lambda b: b.distance(address, size), default=None)
    if nearest is None:
        return "with no buffer registered"
    past, before = address + size - nearest.end, nearest.start - address
    if past <= 0 and before <= 0:
        index = nearest.index(address)
        element = "" if index is None else f", element {list(index)}"
        return f"at byte {address - nearest.start} of '{nearest.name}'{element}"
    if past >= before:
        return f"{past} bytes past the end of '{nearest.name}'"
    return f"{before} bytes before the start of '{nearest.name}'"
