"""Pages that left the sliding window: no row of their sequence sees any token of them.

Invariant: decided by lengths and mask alone. Where a contract calls such pages dead, they hold poison although the page
table still names them, as an allocator leaves it that has given them to somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.cache.content import Content
from harness.case import Case
from harness.problem.masks import visible_range


def dead_columns(case: Case, content: Content, window_pages: str) -> tuple[range, ...]:
    """By sequence: the columns of its row of the page table whose pages are dead; none where they are "live".

    They begin behind the pages of sink tokens, and end where the window does.
    """
    rows, page, found = case.rows, case.page_size, []
    for query_len, context_len in zip(rows.query_lens, rows.context_lens, strict=True):
        first = sinks = 0
        if window_pages == "dead":
            query_pos, seq_len = torch.arange(context_len, context_len + query_len), context_len + query_len
            seen = visible_range(query_pos, seq_len, case.causal, case.sliding_window, case.sink_tokens)
            first = min([*seen.first.tolist(), content.cached_len(query_len, context_len)])
            sinks = int(seen.sinks.max())
        found.append(range(min(-(-sinks // page), first // page), first // page))
    return tuple(found)


def dead_pages(columns: Sequence[range], pages: Sequence[Sequence[int]]) -> frozenset[int]:
    """Of `pages`, each sequence's own in order, those that are dead to all sequences that have them.

    columns: by sequence, from dead_columns.
    """
    owned = [
        (page, column in gone) for gone, own in zip(columns, pages, strict=True) for column, page in enumerate(own)
    ]
    return frozenset(page for page, dead in owned if dead) - {page for page, dead in owned if not dead}
