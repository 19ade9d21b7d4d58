"""Page tables of both forms, and whole caches read back through them by arithmetic that is written here once more."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.page_table import INDEX_PADDING, PageTable, block_table, kv_indices, page_ids
from harness.cache.placement import place
from harness.cache.quantise import bits_of
from harness.case import Case, Placement, Rows
from harness.layout import LAYOUTS
from harness.problem.admission import layout_refusal, pages_needed
from harness.problem.problem import Problem, build_problem

PADDINGS = ("poison_page", "out_of_range", "exact")
ROWS = Rows("r", (4, 1, 1, 3, 1), (60, 99, -1, 0, 32))  # 64, 100, 0, 3 and 33 tokens
CASE = Case("m", "k", ROWS, page_size=16)


@pytest.mark.parametrize("padding", PADDINGS)
def test_block_table(padding: str) -> None:
    got = place(CASE)
    table = block_table(got, padding, "cpu")
    assert table.dtype == torch.int32
    assert table.shape == (5, 7 if padding == "exact" else 9)
    for row, pages in zip(table.tolist(), got.pages, strict=True):
        assert tuple(row[: len(pages)]) == pages
        for page in row[len(pages) :]:
            assert abs(page) >= 1 << 30 if padding == "out_of_range" else page == got.dead
    if padding == "out_of_range":
        assert len({entry > 0 for entry in table[2].tolist()}) == 2


@pytest.mark.parametrize("padding", PADDINGS)
def test_kv_indices(padding: str) -> None:
    got = place(CASE)
    table = kv_indices(got, ROWS.seq_lens, 16, padding, "cpu")
    starts, pages, last = table.kv_indptr, table.kv_page_indices, table.kv_last_page_len
    assert starts is not None
    assert pages is not None
    assert last is not None
    assert {starts.dtype, pages.dtype, last.dtype} == {torch.int32}
    assert starts.tolist() == [0, 4, 11, 11, 12, 15]
    assert last.tolist() == [16, 4, 0, 3, 1]
    assert pages[:15].tolist() == [page for owned in got.pages for page in owned]
    assert len(pages) == 15 + (0 if padding == "exact" else INDEX_PADDING)
    assert pages.untyped_storage().nbytes() == 4 * len(pages)
    for page in pages[15:].tolist():
        assert abs(page) >= 1 << 30 if padding == "out_of_range" else page == got.dead


def test_a_batch_without_keys_has_tables() -> None:
    case = Case("m", "k", Rows("empty", (1, 1), (-1, -1)))
    assert block_table(place(case), "exact", "cpu").shape == (2, 1)
    table = kv_indices(place(case), (0, 0), 16, "exact", "cpu")
    assert table.kv_indptr is not None
    assert table.kv_page_indices is not None
    assert table.kv_indptr.tolist() == [0, 0, 0]
    assert len(table.kv_page_indices) == 1


@settings(deadline=None, derandomize=True, max_examples=30, database=None)
@given(
    lens=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 16, 24]),
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 99),
)
def test_both_forms_say_the_same_and_either_gives_the_other(
    lens: list[int], page_size: int, padding: str, seed: int
) -> None:
    case = Case("m", "k", Rows("r", (1,) * len(lens), tuple(n - 1 for n in lens)), page_size=page_size)
    case = Case(**{**vars(case), "geometry_seed": seed})
    got, needed = place(case), pages_needed(case)
    wide = PageTable(block_table(got, padding, "cpu"))
    long = kv_indices(got, case.rows.seq_lens, page_size, padding, "cpu")
    listed = [page_ids(long, seq, count).tolist() for seq, count in enumerate(needed)]
    assert listed == [page_ids(wide, seq, count).tolist() for seq, count in enumerate(needed)]
    assert [tuple(pages) for pages in listed] == list(got.pages)
    assert long.kv_indptr is not None
    assert long.kv_last_page_len is not None
    for seq, n in enumerate(lens):  # the lengths follow from the list alone
        count = int(long.kv_indptr[seq + 1] - long.kv_indptr[seq])
        assert (count - 1) * page_size + int(long.kv_last_page_len[seq]) == n if n else count == 0


def bits_at(flat: list[int], cache: torch.Tensor, case: Case, which: str, index: tuple[int, int, int, int]) -> int:
    """The element (page, slot, head, dim) by the documented shape of the layout and the strides of `cache` alone."""
    page, slot, head, d = index
    x = cache.shape[-1]
    shapes = {
        "linear_nhd": (page, slot, head, d),
        "linear_3d": (page, head, d),
        "hnd": (page, head, slot, d),
        "vllm_classic": (page, head, d // x, slot, d % x) if which == "k" else (page, head, d, slot),
        "vectorized": (page, head, d // x, slot, d % x) if which == "k" else (page, head, slot // x, d, slot % x),
    }
    steps = zip(shapes[case.layout], cache.stride(), strict=True)
    return flat[int(cache.storage_offset()) + sum(i * stride for i, stride in steps)]


def page_of(cache: KVCache, seq: int, column: int) -> int:
    if cache.block_table is not None:
        assert cache.kv_indptr is cache.kv_page_indices is cache.kv_last_page_len is None
        return int(cache.block_table[seq, column])
    assert cache.kv_indptr is not None
    assert cache.kv_page_indices is not None
    return int(cache.kv_page_indices[int(cache.kv_indptr[seq]) + column])


@settings(deadline=None, derandomize=True, max_examples=120, database=None)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    form=st.sampled_from(["block_table", "kv_indices"]),
    padding=st.sampled_from(PADDINGS),
    page_size=st.sampled_from([1, 16, 64, 544, 1024]),
    stored=st.sampled_from([("fp32", "auto"), ("fp16", "auto"), ("bf16", "auto"), ("fp16", "fp8_e4m3")]),
    strides=st.sampled_from(["compact", "cache"]),
    kind=st.sampled_from(["shuffled", "reversed"]),
    head_size_v=st.sampled_from([None, 8]),
    seed=st.integers(0, 99),
)
def test_every_token_is_found_where_the_documents_say(
    layout: str, form: str, padding: str, page_size: int, stored: tuple[str, str], strides: str, kind: str,
    head_size_v: int | None, seed: int,
) -> None:  # fmt: skip
    case = Case(
        "m", "k", Rows("r", (2, 1, 1), (33, 17, -1)), dtype=stored[0], kv_dtype=stored[1], num_q_heads=2,
        head_size=16, head_size_v=head_size_v, page_size=page_size, layout=layout, strides=strides, page_table=form,
        table_padding=padding, placement=Placement(kind, kind), geometry_seed=seed, data_seed=seed,
    )  # fmt: skip
    assume(layout_refusal(case) is None)
    problem: Problem = build_problem(case, "cpu")
    cache = build_cache(problem, Content.ALL)
    for which, tensor, payload in (("k", cache.k, cache.key_payload), ("v", cache.v, cache.value_payload)):
        size = tensor.element_size()
        flat = bits_of(tensor).as_strided((tensor.untyped_storage().nbytes() // size,), (1,), 0).tolist()
        wanted = bits_of(payload).tolist()  # [num_keys][heads][dim]
        for seq, seq_len in enumerate(case.rows.seq_lens):
            for pos in range(0, seq_len, 3):
                page, token = page_of(cache, seq, pos // page_size), wanted[problem.key_start[seq] + pos]
                for head, d in itertools.product(range(2), range(0, len(token[0]), 5)):
                    assert bits_at(flat, tensor, case, which, (page, pos % page_size, head, d)) == token[head][d]


@pytest.mark.parametrize("layout", ["linear_nhd", "vectorized"])
def test_pages_of_2048_tokens(layout: str) -> None:
    case = Case("m", "k", Rows("r", (1, 5), (2050, 100)), page_size=2048, layout=layout, head_size=32, num_q_heads=2)
    problem = build_problem(case, "cpu")
    cache = build_cache(problem, Content.ALL)
    flat = bits_of(cache.v).flatten().tolist()
    for pos in (0, 7, 8, 2047, 2048, 2050):
        index = (page_of(cache, 0, pos // 2048), pos % 2048, 1, 31)
        assert bits_at(flat, cache.v, case, "v", index) == int(bits_of(cache.value_payload)[pos, 1, 31])
