"""Buffers whose rows lie far apart, for boundary probes: their content, and other content where faults would read.

Invariant: every element that a fault of FAULTS reads instead of a right one holds content of its own (a decoy) or is
one that others read; what neither needs is poison that all share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.cache.address_faults import FAULTS, AddressFault, Addressing
from harness.cache.pool import Extent, Interval, Pool, make_pool, pieces
from harness.cache.probe import Decoy, strides_of
from harness.cache.quantise import bits_of


@dataclass(frozen=True)
class Cells:
    """Elements that are read: the `row` [n, 1] of each group of them, and their place in it, `inner` [n, m]; int64."""

    row: torch.Tensor
    inner: torch.Tensor

    def right(self, at: Addressing) -> torch.Tensor:
        """int64 [n, m]: elements from the first of the buffer."""
        return self.row * at.stride + self.inner

    def moved(self, at: Addressing, fault: AddressFault) -> torch.Tensor:
        """int64 [n, m]: those that `fault` reads instead."""
        return fault.moved(self.row, self.inner, at)


def reaching_rows(
    name: str,
    content: torch.Tensor,
    rows: torch.Tensor,
    at: Addressing,
    cells: Cells,
    decoy: Callable[[int], torch.Tensor],
) -> tuple[torch.Tensor, Pool, tuple[Decoy, ...]]:
    """`content` [n, ...] as far apart as `at` says, its pool, and what lies where faults would read. Of its rows `rows`
    [k] are there and stay what they are, the others are poison.

    `decoy` gives, for numbers from 1 up, what stands in for the elements of `cells`: [n, m]. Raises MemoryError.
    """
    kept = rows[:, None] * at.stride + torch.arange(content[0].numel(), device=content.device)  # [k, elements of a row]
    moved = [cells.moved(at, fault) for fault in FAULTS]
    own: list[Interval] = pieces(kept * at.itemsize)
    for offsets in moved:
        own += pieces(offsets * at.itemsize)
    last = len(content) * at.stride * at.itemsize
    extent = Extent(-min(0, *(first for first, _ in own)), max(last, *(end for _, end in own)), at.low_bits)
    pool = make_pool(extent, own, content.device)
    shape = tuple(content.shape)
    far = pool.view(content.dtype, shape, strides_of(shape, at.stride))
    far[rows] = content[rows]
    memory = bits_of(pool.elements(content.dtype))  # [elements]
    taken = [kept.flatten()]
    decoys: list[Decoy] = []
    for offsets in moved:
        free = ~torch.isin(offsets, torch.cat(taken))
        if bool(free.any()):
            where = offsets[free] + int(far.storage_offset())
            memory[where] = bits_of(decoy(len(decoys) + 1))[free]
            decoys.append(Decoy(name, where, memory[where]))
            taken.append(offsets[free])
    return far, pool, tuple(decoys)
