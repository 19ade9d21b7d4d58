from dataclasses import replace
from typing import Any

import pytest

from harness.cache.placement import Placed, place
from harness.case import Case, Placement, Rows
from harness.errors import PlacementError

ROWS = Rows("r", (4, 1, 1, 3, 1), (60, 99, -1, 0, 32))
CASE = Case("m", "k", ROWS, page_size=16)
NEEDED = [4, 7, 0, 1, 3]


def placed(kind: str, **changes: Any) -> Placed:
    return place(replace(CASE, placement=Placement(kind, kind), **changes))


@pytest.mark.parametrize("kind", ["shuffled", "sequential", "reversed", "shared_prefix"])
def test_every_sequence_gets_pages_of_its_own_and_spare_pages_stay(kind: str) -> None:
    got = placed(kind)
    assert [len(pages) for pages in got.pages] == NEEDED
    shared = 2 if kind == "shared_prefix" else 0
    ids = [page for seq, pages in enumerate(got.pages) for page in pages[0 if seq in (0, 2, 3) else shared :]]
    assert len(ids) == len(set(ids))
    assert all(1 <= page < got.num_pages for page in ids)
    unused = [page for page in range(1, got.num_pages) if page not in ids]
    assert len(unused) >= 3
    assert got.dead == unused[len(unused) // 2]


def test_orders() -> None:
    in_order = [page for pages in placed("sequential").pages for page in pages]
    assert in_order == list(range(in_order[0], in_order[0] + 15))
    assert in_order[0] > 1
    assert [page for pages in placed("reversed").pages for page in pages] == in_order[::-1]
    shuffled = placed("shuffled").pages
    assert shuffled == placed("shuffled").pages
    assert shuffled != placed("shuffled", geometry_seed=1).pages
    assert sorted(shuffled[1]) != list(shuffled[1])


def test_shared_prefix_shares_whole_pages_of_rows_with_context() -> None:
    got = placed("shared_prefix")
    assert got.pages[0][:2] == got.pages[1][:2] == got.pages[4][:2]
    assert len({got.pages[0][2], got.pages[1][2], got.pages[4][2], got.pages[3][0], *got.pages[0][:2]}) == 6


def test_explicit_pages_are_taken_as_given_page_0_included() -> None:
    pages = ((3, 0, 9, 1), (10, 11, 12, 13, 14, 15, 16), (), (2,), (4, 5, 7))
    got = place(replace(CASE, placement=Placement("explicit", "mine", pages)))
    assert got.pages == pages
    assert got.num_pages >= 17 + 3


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (((1,),), "1 page lists for 5 sequences"),
        (((1, 2, 3), (), (), (), ()), "sequence 0 needs 4 pages, 3 are given"),
        (((1, 2, 3, 4), tuple(range(4, 11)), (), (20,), (21, 22, 23)), "page 4 is given to two sequences"),
        (((-1, 2, 3, 4), tuple(range(5, 12)), (), (20,), (21, 22, 23)), "must not be negative"),
    ],
)
def test_explicit_pages_that_do_not_fit(pages: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        place(replace(CASE, placement=Placement("explicit", "mine", pages)))
    with pytest.raises(PlacementError, match="unknown placement 'random'"):
        placed("random")


def test_a_batch_without_keys_has_a_pool() -> None:
    got = place(replace(CASE, rows=Rows("empty", (1, 1), (-1, -1))))
    assert got.pages == ((), ())
    assert got.num_pages >= 4
