"""Boundary probes of the page table: rows far apart, or a list amid which addresses carry, and ids of other pages where
faults would read.

Invariant: an id that a fault reads is that of a page in use, so that a wrong address leads to the tokens of another
page, never out of the pool; each fault that leads elsewhere finds ids of its own order.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from harness.cache.address_faults import Addressing
from harness.cache.page_table import PageTable, Tables
from harness.cache.pool import POISON_BYTE, Pool
from harness.cache.row_probe import Cells, reaching_rows
from harness.case import Case
from harness.problem.admission import pages_needed
from harness.problem.boundary import RowGeometry

_SIZE = 4  # bytes of an entry


def entries(case: Case, cached_lens: tuple[int, ...], device: torch.device) -> Cells:
    """Entries of the page table that cached tokens are found by, one to a group, by sequence and position."""
    starts = [*accumulate(pages_needed(case), initial=0)]
    where = []
    for seq, n in enumerate(cached_lens):
        columns = range(-(-n // case.page_size))
        where += [(seq, c) if case.page_table == "block_table" else (starts[seq] + c, 0) for c in columns]
    pairs = torch.tensor(where, dtype=torch.int64, device=device).view(-1, 2)
    return Cells(pairs[:, :1], pairs[:, 1:])


def addressing(reach: RowGeometry) -> Addressing:
    return Addressing(reach.stride, _SIZE, reach.low_bits)


def page_ids_of(table: Tables) -> torch.Tensor:
    """What page ids are read from, in rows: int32 [num_seqs, width], or [entries, 1] of a list."""
    if table.block_table is not None:
        return table.block_table
    assert table.kv_page_indices is not None
    return table.kv_page_indices[:, None]


def reaching_table(table: PageTable, reach: RowGeometry, cells: Cells) -> tuple[PageTable, Pool]:
    """`table` with rows, or entries of a list, where `reach` says, and the pool of them. Raises MemoryError."""
    near = page_ids_of(table)
    ids = near[cells.row, cells.inner]  # [n, 1]
    rows = torch.arange(len(near), device=near.device)
    far, pool, _ = reaching_rows("table", near, rows, addressing(reach), cells, lambda turn: ids.roll(turn, 0))
    if table.block_table is not None:
        return PageTable(far), pool
    return PageTable(None, table.kv_indptr, far[:, 0], table.kv_last_page_len), pool


def shared_is_poison(pool: Pool) -> bool:
    return not any(bool((part != POISON_BYTE).any()) for part in pool.shared)
