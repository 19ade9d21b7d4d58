"""Fences: memory with nothing mapped before and behind it, so that touching what lies there is a fault.

Invariant: the end of the last element is the end of what is mapped, as far as the alignment that is kept allows; every
byte that is mapped and is none of the image's holds the fill. What is moved has the bytes it had, gaps included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from harness.cache.pool import require_memory
from harness.errors import UsageError

FENCE = 64 << 20  # bytes of addresses on either side, which cost nothing
ALIGNMENT = 16  # bytes: addresses keep their remainder, as vector loads of honest kernels need it


@dataclass(frozen=True)
class View:
    """How a tensor lies in its storage. Offset and strides are in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> View:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @property
    def first(self) -> int:
        """Byte of the storage that it begins at."""
        return self.offset * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Byte of the storage behind its last element."""
        if not all(self.shape):
            return self.first
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.first + (last + 1) * self.dtype.itemsize

    def over(self, memory: torch.Tensor, shift: int) -> torch.Tensor:
        """The same view of `memory`, uint8 [bytes], `shift` bytes further on."""
        offset = (self.first + shift) // self.dtype.itemsize
        return memory.view(self.dtype).as_strided(self.shape, self.strides, offset)


@dataclass(frozen=True)
class Fenced:
    """`memory` uint8 [bytes] is all that is mapped; `views` are what was moved there."""

    memory: torch.Tensor
    views: dict[str, torch.Tensor]


def fenced(
    tensors: Mapping[str, torch.Tensor], *, fill: tuple[torch.dtype, int], room: int = 0, front: bool = False
) -> Fenced:
    """`tensors`, which share one storage, moved together to fenced memory.

    fill: integer type and value that all memory around them holds. room: bytes behind the last element that belong to
    them as well. front: they begin where the memory does, and what is left of it lies behind.
    Raises MemoryError, and UsageError where there is no virtual memory.
    """
    first_tensor = next(iter(tensors.values()))
    storage = torch.empty(0, dtype=torch.uint8, device=first_tensor.device).set_(first_tensor.untyped_storage())
    views = {name: View.of(tensor) for name, tensor in tensors.items()}
    first = min(view.first for view in views.values())
    image = storage[first : min(max(view.end for view in views.values()) + room, len(storage))]  # [bytes]
    step = max(_alignment(tensor) for tensor in tensors.values())
    memory = _mapped(len(image) + step - 1, image.device)
    memory.view(fill[0]).fill_(fill[1])
    at = step - 1 if front else len(memory) - len(image)
    at -= (at - (storage.data_ptr() + first)) % step  # a mapping begins at a multiple of any step
    memory[at : at + len(image)] = image
    return Fenced(memory, {name: view.over(memory, at - first) for name, view in views.items()})


def _alignment(tensor: torch.Tensor) -> int:
    """Of the base: index tensors and single numbers are handed over as slices of others, so only to whole elements."""
    of_elements = tensor.dtype in (torch.int32, torch.int64) or tensor.numel() == 1
    return tensor.element_size() if of_elements else ALIGNMENT


def _mapped(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size or more]"""
    if device.type == "cuda":
        from harness.cache.pool_gpu import fenced_gpu, granule_size

        if granule := granule_size(device):
            return fenced_gpu(size, FENCE, device, granule)
    elif os.name == "posix":
        from harness.cache.pool_cpu import fenced_cpu

        require_memory(size, device)
        return fenced_cpu(size, FENCE)
    raise UsageError(f"--fences: {device} has no virtual memory that could be left unmapped")
