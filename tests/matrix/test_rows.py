"""Row mixes: arithmetic and draws resolve to the lengths they say, the same ones every time."""

from __future__ import annotations

import pytest

from harness.case import Rows
from harness.matrix.rows import Drawn, RowMix, parse_mixes
from harness.matrix.source import Source


def mix(text: str) -> RowMix:
    source = Source("here", f"m: {text}")
    mixes = parse_mixes(source, source.root(), "row_mixes")
    source.finish()
    return mixes["m"]


@pytest.mark.parametrize("page_size", [1, 16, 24, 544])
def test_arithmetic_puts_lengths_at_page_edges(page_size: int) -> None:
    rows = mix(
        "{query_lens: [1, 6, 3], context_lens: [9*page_size - query_len, 9*page_size - 1 - query_len, page_size // 2]}"
    ).resolve(page_size, None, 0)
    assert rows is not None
    assert rows.seq_lens[0] % page_size == 0
    assert (rows.seq_lens[1] + 1) % page_size == 0
    assert rows.context_lens[2] == page_size // 2


def test_a_window_edge_has_no_meaning_without_a_window() -> None:
    edge = mix("{query_lens: [1], context_lens: [sliding_window - query_len]}")
    assert edge.resolve(16, 8, 0) == Rows("m", (1,), (7,))
    assert edge.resolve(16, None, 0) is None


def test_negative_contexts_go_down_to_no_key_at_all_and_no_further() -> None:
    assert mix("{query_lens: [4, 1], context_lens: [-2, -1]}").resolve(16, None, 0) == Rows("m", (4, 1), (-2, -1))
    assert mix("{query_lens: [4], context_lens: [-5]}").resolve(16, None, 0) is None
    assert mix("{query_lens: [page_size - 1], context_lens: [0]}").resolve(1, None, 0) is None


def test_a_draw_is_stable_and_keeps_its_ranges_and_decode_rows() -> None:
    drawn = mix("{num_seqs: 10, query_lens: 16..1024, context_lens: 16..1024, first: decode, last: decode}")
    assert drawn.drawn == Drawn(10, (16, 1024), (16, 1024), (0, -1))
    rows = drawn.resolve(16, None, 0)
    assert rows == drawn.resolve(544, 7, 0), "only the geometry seed matters"
    assert rows != drawn.resolve(16, None, 1)
    assert rows is not None
    assert rows.query_lens[0] == rows.query_lens[-1] == 1
    assert all(16 <= q <= 1024 for q in rows.query_lens[1:-1])
    assert all(16 <= c <= 1024 for c in rows.context_lens)


def test_the_draw_of_seed_0_is_pinned() -> None:
    """History is keyed on ids, which do not spell drawn lengths: the same id must mean the same lengths for ever."""
    rows = mix("{num_seqs: 3, query_lens: 16..1024, context_lens: 0..9}").resolve(16, None, 0)
    assert rows == Rows("m", (880, 410, 792), (6, 0, 4))
