"""Page tables in the two forms kernels take: built, and read back as a kernel reads them.

    block_table  block_table [num_seqs, max_pages]
    kv_indices   kv_page_indices [total pages, then padding]: the pages of all sequences, one after the other;
                 kv_indptr [num_seqs + 1]: where those of each begin, counted in pages;
                 kv_last_page_len [num_seqs]: tokens in the last page of each, 0 where a sequence has none

Invariant: all are int32, and padding lies behind what a sequence (of the second form: the last one) needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from harness.cache.placement import Placed

INDEX_PADDING = (
    128  # entries behind the last of kv_page_indices: as much as serving engines allocate, and kernels rely on
)
_FAR = 1 << 30  # padding `out_of_range`: times any stride beyond any pool


class Tables(Protocol):
    """What has the page table of a batch in one of its forms; the arguments of the other are None."""

    @property
    def block_table(self) -> torch.Tensor | None: ...
    @property
    def kv_indptr(self) -> torch.Tensor | None: ...
    @property
    def kv_page_indices(self) -> torch.Tensor | None: ...
    @property
    def kv_last_page_len(self) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class PageTable:
    """The page table of one batch."""

    block_table: torch.Tensor | None = None
    kv_indptr: torch.Tensor | None = None
    kv_page_indices: torch.Tensor | None = None
    kv_last_page_len: torch.Tensor | None = None


def block_table(placed: Placed, padding: str, device: torch.device | str) -> torch.Tensor:
    """int32 [num_seqs, max_pages].

    `padding`: poison_page pads with a page of poison, two columns beyond the longest row; out_of_range with ids far
    outside the pool, above and below; exact ends each row with the longest one and pads the shorter with the page of
    poison.
    """
    longest = max((len(pages) for pages in placed.pages), default=0)
    width = max(longest, 1) if padding == "exact" else longest + 2
    rows = [[*pages, *_fill(placed, padding, len(pages), width)] for pages in placed.pages]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(len(rows), width)


def kv_indices(
    placed: Placed, seq_lens: Sequence[int], page_size: int, padding: str, device: torch.device | str
) -> PageTable:
    """The same pages as one list; `padding`: INDEX_PADDING entries of the same kinds, or exact: none."""
    pages = [page for owned in placed.pages for page in owned]
    end = max(len(pages), 1) if padding == "exact" else len(pages) + INDEX_PADDING
    starts = [*accumulate((len(owned) for owned in placed.pages), initial=0)]
    last = [(n - 1) % page_size + 1 if n > 0 else 0 for n in seq_lens]

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return PageTable(None, int32(starts), int32([*pages, *_fill(placed, padding, len(pages), end)]), int32(last))


def page_ids(table: Tables, seq: int, count: int) -> torch.Tensor:
    """The first `count` entries of sequence `seq`, read as a kernel reads them: int [count], fewer where it ends."""
    if table.block_table is not None:
        return table.block_table[seq, :count]
    assert table.kv_indptr is not None
    assert table.kv_page_indices is not None
    first = int(table.kv_indptr[seq])
    return table.kv_page_indices[first : first + count]


def table_name(table: Tables) -> str:
    """The argument that page ids are read from."""
    return "kv_page_indices" if table.block_table is None else "block_table"


def _fill(placed: Placed, padding: str, first: int, end: int) -> list[int]:
    """Entries number `first` to `end` that no sequence needs."""
    if padding == "out_of_range":
        return [_FAR + entry if entry % 2 else -_FAR - entry for entry in range(first, end)]
    return [placed.dead] * (end - first)
