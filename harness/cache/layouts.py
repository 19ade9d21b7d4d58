"""Layouts: how (page, slot, head, dim) maps to storage.

    linear_nhd    K [pages, page_size, heads, d]          V [pages, page_size, heads, dv]
    vllm_classic  K [pages, heads, d / x, page_size, x]   V [pages, heads, dv, page_size]

x is 16 bytes of elements, or the largest power of two below that divides the head size (fp8 with head size 24: 8).
Invariant: `by_slot` is a view, so whatever is written through it lies in the storage handed to the kernel.
"""

from __future__ import annotations

import math

import torch

from harness.cache.quantise import bits_of
from harness.dtypes import ElementType

LAYOUTS = ("linear_nhd", "vllm_classic")


def vector_size(head_size: int, element_size: int) -> int:
    """x of vllm_classic."""
    return math.gcd(16 // element_size, head_size)


def cache_shape(
    layout: str, which: str, pages: int, page_size: int, heads: int, dim: int, size: int
) -> tuple[int, ...]:
    """Shape of K (`which` "k") or V ("v") with elements of `size` bytes."""
    if layout == "linear_nhd":
        return (pages, page_size, heads, dim)
    if which == "v":
        return (pages, heads, dim, page_size)
    x = vector_size(dim, size)
    return (pages, heads, dim // x, page_size, x)


def allocate(
    layout: str,
    which: str,
    shape: tuple[int, ...],
    stored: ElementType,
    fill: int,
    strided: bool,
    device: torch.device | str,
) -> torch.Tensor:
    """A cache of `shape` (see cache_shape) whose storage, gaps included, holds the bits `fill`: `stored` dtype.

    `strided` puts gaps behind every page, slot and head, of other sizes for V than for K; rows stay 16-byte aligned.
    """
    whole = storage_shape(layout, which, shape, stored, strided)
    storage = bits_of(torch.empty(whole, dtype=stored.torch, device=device))
    storage.fill_(fill)
    return storage[tuple(slice(n) for n in shape)].view(stored.torch)


def storage_shape(
    layout: str, which: str, shape: tuple[int, ...], stored: ElementType, strided: bool
) -> tuple[int, ...]:
    """Shape of the compact storage that a cache of `shape` is cut from the beginning of."""
    return _with_gaps(layout, which, shape, stored) if strided else shape


def by_slot(cache: torch.Tensor, layout: str) -> torch.Tensor:
    """View [page, slot, head, d], or [page, slot, head, d / x, x] for K of vllm_classic."""
    if layout == "linear_nhd":
        return cache
    return cache.permute(0, 3, 1, 2, 4) if cache.dim() == 5 else cache.permute(0, 3, 1, 2)


def as_stored(payload: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`payload` [n, heads, d] shaped as [n, *rest] for writing to `slots` [page, slot, *rest] (see by_slot)."""
    return payload.reshape(len(payload), *slots.shape[2:])


def _with_gaps(layout: str, which: str, shape: tuple[int, ...], stored: ElementType) -> tuple[int, ...]:
    step = 1 if which == "k" else 2
    row = step * (16 // stored.size)  # elements
    if layout == "linear_nhd":
        gaps: tuple[int, ...] = (0, step, 1, row)
    elif which == "k":
        gaps = (0, 1, 1, step, 0)
    else:
        gaps = (0, 1, 1, row)
    return tuple(n + gap for n, gap in zip(shape, gaps, strict=True))
