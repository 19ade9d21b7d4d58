"""Guarded tensors: outputs that start as NaN inside red zones, inputs whose bytes are hashed.

Invariant: after a launch, every element of an output's allocation that is not part of the output still holds the
poison, and every byte of every input's allocation is what it was. The poison is a NaN of its own: one that a kernel
computes, or reads from a poisoned cache and passes on, does not count as never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

POISON = {  # by element size: integer type and bits, a NaN in every float type of that size
    1: (torch.uint8, 0x7F),
    2: (torch.int16, 0x7FD5),
    4: (torch.int32, 0x7FD5A5A5),
    8: (torch.int64, 0x7FF5A5A5A5A5A5A5),
}
_MINUS_ZERO = 0x80  # the only NaN of the fnuz types
MARGIN = 512  # elements of red zone on either side
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # words of a checksum at a time: temporaries stay in the caches of a CPU


@dataclass(frozen=True)
class GuardedOutput:
    """`tensor` is handed to the kernel; `allocation` [elements] holds it and all around it as integers, `poison` at
    first.
    """

    name: str
    tensor: torch.Tensor
    allocation: torch.Tensor
    poison: int

    def _here(self, allocation: torch.Tensor) -> torch.Tensor:
        """The elements of the output in an image of its allocation."""
        return allocation.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())

    @property
    def surroundings(self) -> torch.Tensor | None:
        """What a wrong address may reach beside the output, where that is more than its tensor."""
        return None

    def overrun(self) -> str | None:
        """Where an element outside the output was written, or None."""
        outside = self.allocation.clone()
        self._here(outside).fill_(self.poison)
        touched = outside != self.poison
        if not bool(touched.any()):
            return None
        first = int(touched.nonzero()[0, 0]) - self.tensor.storage_offset()
        side = "before" if first < 0 else "behind or between the rows of"
        return f"{int(touched.sum())} elements {side} {self.name} were written, the first {first:+d} from its start"

    def unwritten(self) -> torch.Tensor:
        """bool, of the output's shape: elements that still hold the poison they were handed out with."""
        return self._here(self.allocation) == self.poison


def guarded_output(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    strided: bool,
    poison: Mapping[int, tuple[torch.dtype, int]] = POISON,
) -> GuardedOutput:
    """A poisoned output of `shape` inside red zones; `strided` adds gaps between heads and between tokens."""
    integer, bits = poison[dtype.itemsize][0], _poison(dtype) if poison is POISON else poison[dtype.itemsize][1]
    strides = _strides(shape, strided)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    allocation = torch.full((extent + 2 * MARGIN,), bits, dtype=integer, device=device)
    tensor = allocation.view(dtype).as_strided(shape, strides, MARGIN)
    return GuardedOutput(name, tensor, allocation, bits)


def _poison(dtype: torch.dtype) -> int:
    """Bits of an element that nobody has written."""
    return _MINUS_ZERO if str(dtype).endswith("fnuz") else POISON[dtype.itemsize][1]


def strided_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a non-contiguous view whose gaps are poison."""
    guarded = guarded_output("copy", tuple(tensor.shape), tensor.dtype, tensor.device, strided=True)
    guarded.tensor.copy_(tensor)
    return guarded.tensor


def same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors hold the same bits, NaN included, wherever they lie; None is equal to None only."""
    if one is other:
        return True
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    integer, _ = POISON[one.element_size()]
    return one.device == other.device and torch.equal(one.view(integer), other.view(integer))


def _strides(shape: tuple[int, ...], strided: bool) -> tuple[int, ...]:
    """Row-major strides; with gaps of 8 elements behind every dimension but the last where `strided`."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1] + (8 if strided else 0)
    return tuple(strides)


def fingerprint(tensor: torch.Tensor) -> int:
    """The checksum of every byte of the tensor's allocation, gaps included."""
    storage = tensor.untyped_storage()
    return checksum(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))


def checksum(data: torch.Tensor) -> int:
    """Position-weighted checksum of `data`, uint8 [bytes] at an address that 8 divides, modulo 2^64.

    A single changed byte always changes it: the weights are odd, hence invertible modulo 2^64.
    """
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)  # [bytes / 8]
    chunk = _CHUNK[data.device.type]
    weights = torch.arange(min(chunk, len(words)), dtype=torch.int64, device=data.device) * 2 + 1  # of the first chunk
    total = 0
    for start in range(0, len(words), chunk):
        part = words[start : start + chunk]
        total += int((part * weights[: len(part)]).sum()) + 2 * start * int(part.sum())
    for i, byte in enumerate(data[whole:].tolist()):
        total += byte * (2 * (words.numel() + i) + 1)
    return total % 2**64
