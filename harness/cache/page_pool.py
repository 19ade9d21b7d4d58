"""Caches of as many pages as a case asks for: dense, or aliased where all pages that no sequence has share one block.

Invariant: either way the cache has the same shape, strides and content; only memory and time differ. `auto` is dense
unless the pool is LARGE and mostly unused (what a writer stores to is compared whole, and dense). A large dense pool is
asked for before it is made: MemoryError otherwise.
"""

from __future__ import annotations

import math

import torch

from harness.cache.layouts import allocate, storage_shape
from harness.cache.pool import Extent, Pool, make_pool, require_memory
from harness.cache.probe import strides_of
from harness.case import Case
from harness.dtypes import ElementType

LARGE = 1 << 30  # bytes of K, or of V
_MOSTLY = 4  # a pool of which less than one page in so many is in use is mostly unused


def allocate_pages(
    case: Case,
    which: str,
    shape: tuple[int, ...],
    stored: ElementType,
    fill: int,
    used: set[int],
    device: torch.device,
) -> tuple[torch.Tensor, Pool | None]:
    """K or V of `shape` (see layouts.cache_shape) that holds the bits `fill`: `stored` dtype; and its pool, where that
    is aliased. `used`: the pages that get memory of their own. Raises MemoryError.
    """
    strided = case.strides != "compact"
    whole = storage_shape(case.layout, which, shape, stored, strided)
    size = math.prod(whole) * stored.size
    if not _aliased(case, size, len(used), shape[0]):
        if size > LARGE:
            require_memory(2 * size if which == "k" else size, device)  # V comes after K, and is about as large
        return allocate(case.layout, which, shape, stored, fill, strided, device), None
    page = size // shape[0]
    own = [(number * page, (number + 1) * page) for number in used]
    pool = make_pool(Extent(0, size, 0), own, device, fill & 0xFF)
    strides = strides_of(whole, page // stored.size)
    return pool.view(stored.torch, shape, strides), pool


def _aliased(case: Case, size: int, used: int, num_pages: int) -> bool:
    if case.pool == "auto":
        return case.writer is None and size > LARGE and used * _MOSTLY < num_pages
    return case.pool == "aliased"
