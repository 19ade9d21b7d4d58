"""Placement: which physical pages each sequence gets.

Invariant: no two sequences share a page except by a shared prefix, and what has a page twice in one sequence has the
same tokens there; page 0 (the null page) is used by explicit placement
only; the pool has spare pages, so that an id off by a little, or a padded table entry, leads to poison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.case import Case
from harness.errors import PlacementError
from harness.problem import random
from harness.problem.admission import pages_needed, placement_refusal, shared_prefix_len
from harness.problem.boundary import cache_geometry


@dataclass(frozen=True)
class Placed:
    pages: tuple[tuple[int, ...], ...]  # per sequence, in order
    num_pages: int  # of the pool

    @property
    def dead(self) -> int:
        """The page in the middle of those no sequence has, page 0 aside; a pool may have too many to list."""
        used = sorted({page for pages in self.pages for page in pages} - {0})
        page = 1 + (self.num_pages - 1 - len(used)) // 2
        for other in used:
            page += other <= page
        return page


def place(case: Case) -> Placed:
    """Pages for every sequence of `case`. Raises PlacementError where the placement does not fit the lengths."""
    if reason := placement_refusal(case):
        raise PlacementError(reason)
    needed = pages_needed(case)
    if at := cache_geometry(case):
        return Placed(at.pages(needed), at.num_pages)
    spare = max(3, sum(needed) // 8)
    if case.placement.kind == "explicit":
        highest = max((page for pages in case.placement.pages for page in pages), default=0)
        return Placed(case.placement.pages, case.num_pages or highest + 1 + spare)
    shared = shared_prefix_len(case) // case.page_size
    context_lens = case.rows.context_lens
    own = [count - (shared if context > 0 else 0) for count, context in zip(needed, context_lens, strict=True)]
    if case.num_pages is not None:
        spare = case.num_pages - 1 - shared - sum(own)
    ids = _order(case, shared + sum(own), spare)
    prefix, start, pages = tuple(ids[:shared]), shared, []
    for count, context in zip(own, context_lens, strict=True):
        pages.append((prefix if context > 0 else ()) + tuple(ids[start : start + count]))
        start += count
    return Placed(tuple(pages), 1 + len(ids) + spare)


def _order(case: Case, count: int, spare: int) -> Sequence[int]:
    """`count` page ids in the order they are given out, all in [1, count + spare]."""
    in_order = range(1 + spare // 2, 1 + spare // 2 + count)
    if case.placement.kind == "sequential":
        return in_order
    if case.placement.kind == "reversed":
        return in_order[::-1]
    return [1 + page for page in random.permutation(case.geometry_seed, "pages", count + spare)[:count]]
