"""Boundary probes of the page table: rows far apart, and ids of other pages where faults would read.

Invariant: an id that a fault reads is that of a page in use, so that a wrong address leads to the tokens of another
page, never out of the pool; each fault that leads elsewhere finds ids of its own order.
"""

from __future__ import annotations

import torch

from harness.cache.address_faults import Addressing
from harness.cache.pool import POISON_BYTE, Pool
from harness.cache.row_probe import Cells, reaching_rows
from harness.problem.boundary import RowGeometry

_SIZE = 4  # bytes of an entry


def entries(cached_lens: tuple[int, ...], page_size: int, device: torch.device) -> Cells:
    """Entries of the page table that cached tokens are found by, one to a group."""
    where = [(seq, column) for seq, n in enumerate(cached_lens) for column in range(-(-n // page_size))]
    pairs = torch.tensor(where, dtype=torch.int64, device=device).view(-1, 2)
    return Cells(pairs[:, :1], pairs[:, 1:])


def addressing(reach: RowGeometry) -> Addressing:
    return Addressing(reach.stride, _SIZE, reach.low_bits)


def reaching_table(table: torch.Tensor, reach: RowGeometry, cells: Cells) -> tuple[torch.Tensor, Pool]:
    """`table` [num_seqs, width] int32 with rows as far apart as `reach` says, and its pool. Raises MemoryError."""
    ids = table[cells.row, cells.inner]  # [n, 1]
    rows = torch.arange(len(table), device=table.device)
    far, pool, _ = reaching_rows("table", table, rows, addressing(reach), cells, lambda turn: ids.roll(turn, 0))
    return far, pool


def shared_is_poison(pool: Pool) -> bool:
    return not any(bool((part != POISON_BYTE).any()) for part in pool.shared)
