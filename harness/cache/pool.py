"""Pools: the memory that cache tensors lie in, dense or aliased, behind one interface.

Invariant: every byte of the range reads as the fill until it is written; bytes asked for as `own` have memory of their
own, all others may share one block, whose every alias shows a write to any. Nothing is allocated beyond what is there:
MemoryError says what was asked for, and what was left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.errors import DeviceMemoryError

POISON_BYTE = 0xFF  # NaN in every float type here
Interval = tuple[int, int]  # bytes [first, end)
_PIECE = 4096  # bytes
_SPARE = 256 << 20  # bytes that a dense pool leaves to everybody else


@dataclass(frozen=True)
class Extent:
    """What a pool must span: bytes [-lead, size) around its base, whose address ends in `low_bits` (32 of them)."""

    lead: int
    size: int
    low_bits: int


@dataclass(frozen=True)
class Pool:
    """`bytes` [lead + size + ...] uint8 is the whole range, `base` the byte of it that offsets count from.

    `own` (bytes, counted from the base) has memory of its own; all else lies in `shared`: uint8 [bytes] each, of which
    the range holds aliases.
    """

    kind: str  # dense | aliased
    bytes: torch.Tensor
    base: int
    own: tuple[Interval, ...]
    physical_bytes: int
    shared: tuple[torch.Tensor, ...] = ()

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """A tensor of `shape` with element `strides` whose first element is the base, an address of whole elements."""
        return self.elements(dtype).as_strided(shape, strides, self.base // dtype.itemsize)

    def elements(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole range, as far as it holds whole elements: `dtype` [elements]."""
        return self.bytes[: len(self.bytes) // dtype.itemsize * dtype.itemsize].view(dtype)

    def parts(self) -> Iterator[torch.Tensor]:
        """The memory behind the range, each byte once: uint8 [bytes]."""
        yield from (self.bytes[self.base + first : self.base + end] for first, end in self.own)
        yield from self.shared


def dense_pool(tensor: torch.Tensor) -> Pool:
    """The allocation of `tensor` as a pool: all of it is its own."""
    storage = tensor.untyped_storage()
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # [bytes]
    return Pool("dense", data, 0, ((0, len(data)),), len(data))


def make_pool(
    extent: Extent, own: Iterable[Interval], device: torch.device, fill: int = POISON_BYTE, *, dense: bool = False
) -> Pool:
    """A pool over `extent` of bytes `fill`, aliased where the system can, else (or if so asked) dense.

    Raises MemoryError.
    """
    intervals = sorted(own)
    if device.type == "cuda" and not dense:
        from harness.cache.pool_gpu import aliased_pool_gpu, granule_size

        if granule := granule_size(device):
            return aliased_pool_gpu(extent, intervals, fill, device, granule)
    elif not dense:
        from harness.cache.pool_cpu import aliased_pool_cpu, cpu_can_alias

        if cpu_can_alias():
            return aliased_pool_cpu(extent, intervals, fill)
    return filled_pool(extent, fill, device)


def filled_pool(extent: Extent, fill: int, device: torch.device) -> Pool:
    """A dense pool over `extent`; its base ends in low_bits within the slack that costs. Raises MemoryError."""
    slack = 1 << 32 if extent.low_bits else 0
    total = extent.lead + extent.size + slack
    require_memory(total, device)
    data = torch.full((total,), fill, dtype=torch.uint8, device=device)
    base = extent.lead
    if extent.low_bits:
        base += (extent.low_bits - data.data_ptr() - extent.lead) % (1 << 32)
    return Pool("dense", data, base, ((-base, total - base),), total)


def require_memory(size: int, device: torch.device) -> None:
    """Raise MemoryError unless a dense pool of `size` bytes can be had."""
    free = available(device)
    if size + _SPARE > free:
        error = DeviceMemoryError if device.type == "cuda" else MemoryError
        raise error(f"a dense pool needs {size:,} bytes on {device}, and {free:,} are free")


def available(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now; on a CPU within what the control group of the process allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_meminfo()]
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(left)


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62  # a system that does not say: the allocation itself will
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def pieces(offsets: torch.Tensor) -> list[Interval]:
    """Intervals of a few bytes each that hold the bytes at `offsets`, int64 of any shape."""
    return [(piece * _PIECE, (piece + 1) * _PIECE) for piece in set((offsets // _PIECE).flatten().tolist())]


def granules(own: Iterable[Interval], size: int, offset: int) -> list[Interval]:
    """`own` as intervals of whole granules of `size` bytes, disjoint and ascending; granule 0 begins `offset` bytes
    before the byte that intervals count from.
    """
    found: list[Interval] = []
    for first, end in sorted(own):
        low, high = (first + offset) // size * size - offset, -(-(end + offset) // size) * size - offset
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found
