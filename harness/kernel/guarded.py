"""Guarded tensors: outputs that start as NaN inside red zones, inputs whose bytes are hashed.

Invariant: after a launch, every byte of an output's allocation that is not part of the output still holds the poison,
and every byte of every input's allocation is what it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

POISON_BYTE = 0xFF  # NaN in every float type in use, -1 in every integer type
MARGIN = 512  # elements of red zone on either side
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class GuardedOutput:
    """`tensor` is handed to the kernel; `allocation` [bytes] uint8 surrounds it."""

    name: str
    tensor: torch.Tensor
    allocation: torch.Tensor

    def overrun(self) -> str | None:
        """Where a byte outside the output was written, or None."""
        outside = self.allocation.clone()
        view = _same_place(self.tensor, outside)
        view.fill_(-1 if view.dtype != torch.uint8 else POISON_BYTE)
        touched = outside != POISON_BYTE
        if not bool(touched.any()):
            return None
        first = int(touched.nonzero()[0, 0])
        start = self.tensor.storage_offset() * self.tensor.element_size()
        side = "before" if first < start else "behind or between the rows of"
        place = f"the first {first - start:+d} bytes from its start"
        return f"{int(touched.sum())} bytes {side} {self.name} were written, {place}"

    def unwritten(self) -> torch.Tensor:
        """bool, of the output's shape: elements that still hold the poison they were handed out with."""
        view = _same_place(self.tensor, self.allocation)
        return view == (-1 if view.dtype != torch.uint8 else POISON_BYTE)


def guarded_output(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool
) -> GuardedOutput:
    """A poisoned output of `shape` inside red zones; `strided` adds gaps between heads and between tokens."""
    size = dtype.itemsize
    strides = _strides(shape, strided)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    allocation = torch.full(((extent + 2 * MARGIN) * size,), POISON_BYTE, dtype=torch.uint8, device=device)
    tensor = allocation.view(dtype).as_strided(shape, strides, MARGIN)
    return GuardedOutput(name, tensor, allocation)


def strided_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a non-contiguous view whose gaps are poison."""
    guarded = guarded_output("copy", tuple(tensor.shape), tensor.dtype, tensor.device, strided=True)
    guarded.tensor.copy_(tensor)
    return guarded.tensor


def _strides(shape: tuple[int, ...], strided: bool) -> tuple[int, ...]:
    """Row-major strides; with gaps of 8 elements behind every dimension but the last where `strided`."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1] + (8 if strided else 0)
    return tuple(strides)


def _same_place(tensor: torch.Tensor, allocation: torch.Tensor) -> torch.Tensor:
    """The elements of `tensor` as integers, looked up in `allocation` (a byte image of its allocation)."""
    integers = allocation.view(_SAME_SIZE_INT[tensor.element_size()])
    return integers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def fingerprint(tensor: torch.Tensor) -> int:
    """Position-weighted checksum of every byte of the tensor's allocation, gaps included, modulo 2^64.

    A single changed byte always changes it: the weights are odd, hence invertible modulo 2^64.
    """
    storage = tensor.untyped_storage()
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # [bytes]
    whole = data.numel() // 8 * 8
    total = 0
    words = data[:whole].view(torch.int64)  # [bytes / 8]
    chunk = 1 << 24
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk]
        weights = torch.arange(start, start + part.numel(), device=part.device, dtype=torch.int64) * 2 + 1
        total += int((part * weights).sum())
    for i, byte in enumerate(data[whole:].tolist()):
        total += byte * (2 * (words.numel() + i) + 1)
    return total % 2**64
