"""Boundary probes of the page table: rows far apart, and ids of other pages where faults would read.

Invariant: an id that a fault reads is that of a page in use, so that a wrong address leads to the tokens of another
page, never out of the pool; each fault that leads elsewhere finds ids of its own order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache.address_faults import FAULTS, AddressFault, Addressing
from harness.cache.pool import POISON_BYTE, Extent, Interval, Pool, make_pool, pieces
from harness.problem.boundary import RowGeometry

_SIZE = 4  # bytes of an entry


@dataclass(frozen=True)
class Entries:
    """Entries of the page table that cached tokens are found by: int64 [n, 1] each."""

    seq: torch.Tensor
    column: torch.Tensor

    @classmethod
    def of(cls, cached_lens: tuple[int, ...], page_size: int, device: torch.device) -> Entries:
        where = [(seq, column) for seq, n in enumerate(cached_lens) for column in range(-(-n // page_size))]
        pairs = torch.tensor(where, dtype=torch.int64, device=device).view(-1, 2)
        return cls(pairs[:, :1], pairs[:, 1:])

    def right(self, at: Addressing) -> torch.Tensor:
        return self.seq * at.stride + self.column

    def moved(self, at: Addressing, fault: AddressFault) -> torch.Tensor:
        """int64 [n, 1]: the elements that `fault` reads instead, from the first of the table."""
        return fault.moved(self.seq, self.column, at)


def addressing(reach: RowGeometry) -> Addressing:
    return Addressing(reach.stride, _SIZE, reach.low_bits)


def reaching_table(table: torch.Tensor, reach: RowGeometry, entries: Entries) -> tuple[torch.Tensor, Pool]:
    """`table` [num_seqs, width] int32 with rows as far apart as `reach` says, and its pool. Raises MemoryError."""
    at, width = addressing(reach), table.shape[1]
    row = torch.arange(len(table))[:, None] * reach.stride + torch.arange(width)  # [num_seqs, width]
    moved = {fault.name: entries.moved(at, fault) for fault in FAULTS}
    own: list[Interval] = pieces(row * _SIZE)
    for offsets in moved.values():
        own += pieces(offsets * _SIZE)
    extent = Extent(-min(0, *(first for first, _ in own)), max(end for _, end in own), reach.low_bits)
    pool = make_pool(extent, own, table.device)
    far = pool.view(torch.int32, tuple(table.shape), (reach.stride, 1))
    far.copy_(table)
    memory = pool.bytes.view(torch.int32)  # [entries]
    ids = table[entries.seq, entries.column]  # [n, 1]
    taken, turn = [row.to(table.device).flatten()], 0
    for offsets in moved.values():
        free = ~torch.isin(offsets, torch.cat(taken))
        if bool(free.any()):
            turn += 1
            memory[offsets[free] + far.storage_offset()] = ids.roll(turn, 0)[free]
            taken.append(offsets[free])
    return far, pool


def shared_is_poison(pool: Pool) -> bool:
    return not any(bool((part != POISON_BYTE).any()) for part in pool.shared)
