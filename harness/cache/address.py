"""Addresses in a cache tensor: the element offset of (page, slot, head, dim), in int64, as a right kernel computes it.

Invariant: follows from the strides of the tensor and the layout's formula alone; no view of the tensor is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Address:
    """Element offsets in the storage of one cache tensor, by meaning; `vector` is x of vllm_classic K, else 1."""

    origin: int
    page: int
    slot: int
    inner: torch.Tensor  # [heads * dim] int64: offset of (head, dim)

    def offsets(self, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """int64 [n, heads * dim] for `page`, `slot` [n]."""
        return (self.origin + page.to(torch.int64) * self.page + slot.to(torch.int64) * self.slot)[:, None] + self.inner


def address(tensor: torch.Tensor, layout: str, which: str, heads: int, dim: int) -> Address:
    """Offset of (page, slot, head, dim): page, slot and head by their strides, dim as (dim // x, dim % x)."""
    at = planned_address(tuple(tensor.shape), tensor.stride(), layout, which, heads, dim)
    return replace(at, origin=int(tensor.storage_offset()), inner=at.inner.to(tensor.device))


def planned_address(
    shape: tuple[int, ...], strides: tuple[int, ...], layout: str, which: str, heads: int, dim: int
) -> Address:
    """The same of a tensor that is yet to be, at the start of its storage and on the CPU."""
    s = strides
    if layout == "linear_nhd":
        page, slot, head, block, lane, vector = s[0], s[1], s[2], s[3], 0, 1
    elif which == "k":
        page, head, block, slot, lane, vector = *s, shape[4]
    else:
        page, head, block, slot, lane, vector = *s, 0, 1
    d = torch.arange(dim)
    inner = torch.arange(heads)[:, None] * head + d // vector * block + d % vector * lane
    return Address(0, page, slot, inner.flatten())
