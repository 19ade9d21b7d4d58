"""Addresses in a cache tensor: the element offset of (page, slot, head, dim), in int64, as a right kernel computes it.

Invariant: follows from the strides of the tensor and the layout's table alone; no view of the tensor is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from harness.layout import parts


@dataclass(frozen=True)
class Address:
    """Element offsets in the storage of one cache tensor, by meaning."""

    origin: int
    page: int
    slots: torch.Tensor  # [page_size] int64: offset of each slot in its page
    inner: torch.Tensor  # [heads * dim] int64: offset of (head, dim)

    def offsets(self, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """int64 [n, heads * dim] for `page`, `slot` [n]."""
        return (self.origin + page.to(torch.int64) * self.page)[:, None] + self.in_page(slot)

    def in_page(self, slot: torch.Tensor) -> torch.Tensor:
        """int64 [n, heads * dim]: offsets from the start of its page of every element of `slot` [n]."""
        return self.slots[slot.to(torch.int64)][:, None] + self.inner


def address(tensor: torch.Tensor, layout: str, which: str, heads: int, dim: int) -> Address:
    """Offset of (page, slot, head, dim) in K (`which` "k") or V: each dimension's share of its index by its stride."""
    at = planned_address(tuple(tensor.shape), tensor.stride(), layout, which, heads, dim)
    slots, inner = at.slots.to(tensor.device), at.inner.to(tensor.device)
    return replace(at, origin=int(tensor.storage_offset()), slots=slots, inner=inner)


def planned_address(
    shape: Sequence[int], strides: Sequence[int], layout: str, which: str, heads: int, dim: int
) -> Address:
    """The same of a tensor that is yet to be, at the start of its storage and on the CPU."""
    dims = tuple(zip(parts(layout, which, shape), strides, strict=True))

    page_size = math.prod(part.size for part, _ in dims if part.of == "slot")

    def share(of: str, count: int) -> torch.Tensor:
        index, offset = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        for part, stride in dims:
            if part.of == of:
                offset += index // part.step % part.size * stride
        return offset

    inner = share("head", heads)[:, None] + share("dim", dim)
    page = next(stride for part, stride in dims if part.of == "page")
    return Address(0, page, share("slot", page_size), inner.flatten())
