"""Malformed matrices: each mistake, planted in a good file, is told in one line with its line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.matrix import MatrixError, load

KERNELS = ("alpha", "beta")
BASE = """\
matrix: demo
about: A demonstration.
kernels: [alpha, beta]
fixed: {num_q_heads: 8}
axes:
  gqa_ratio: [1, 8]
  page_size: [16, 32]
  sliding_window: [none, 16]
  data: [normal, probe]
  rows: [two, drawn]
row_mixes:
  two: {query_lens: [1, 5], context_lens: [7, 2*page_size - 1]}
  drawn: {num_seqs: 3, query_lens: 1..9, context_lens: 0..9, last: decode}
constraints:
  - page_size != 32 or kernel != 'alpha'
must_see: [newest_token]
tiers:
  smoke: {cover: 2}
  nightly: full
expect:
  - {where: page_size == 16, outcome: FAIL, because: rounding, issue: 'https://example.org/1', until: 2027-03-01}
"""

MISTAKES = [
    *(
        pytest.param(
            "page_size != 32 or kernel != 'alpha'",
            never,
            [f"15:5: the constraint excludes every case of tier 'smoke': {never}"],
            id=never,
        )
        for never in ("1 == 2", "steps == 3")
    ),
    pytest.param(
        "about:",
        "abuot:",
        ["1:1: the matrix has no 'about'", "2:1: unknown key 'abuot'. Did you mean 'about'?"],
        id="unknown_key",
    ),
    pytest.param(
        "kernels: [alpha, beta]\n",
        "\n",
        ["1:1: the matrix has no 'kernels'"],
        id="missing_key",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, layout: linear_3d}",
        [
            "4:33: linear_3d: a page is one token, not 16 (in every combination of tier 'smoke')",
        ],
        id="layout_page_size",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, layout: vectorized, head_size: 20}",
        ["4:33: vectorized: head_size 20 is no multiple of 8, a vector of fp16 (in every combination of tier 'smoke')"],
        id="layout_head_size",
    ),
    pytest.param(
        "  page_size:",
        "  page_sise:",
        ["7:3: unknown axis 'page_sise'. Did you mean 'page_size'?"],
        id="unknown_axis",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, num_q_heads: 4}",
        ["4:25: duplicate key 'num_q_heads' (first on line 4)"],
        id="dup_key",
    ),
    pytest.param(
        "must_see: [newest_token]",
        "about: again",
        ["16:1: duplicate key 'about' (first on line 2)"],
        id="dup_top",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: [16, large]",
        ["7:19: page_size is a whole number of at least 1, not 'large'"],
        id="wrong_type",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: [16, 1e-2]",
        ["7:19: page_size is a whole number of at least 1, not '1e-2'"],
        id="1e_2_for_int",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: [16, 017]",
        ["7:19: page_size is a whole number of at least 1, not '017'"],
        id="leading_zero",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: [16, 0]",
        ["7:19: page_size is a whole number of at least 1, not 0"],
        id="below",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: 16",
        ["7:14: axes.page_size is a list, not '16'. Write [16]"],
        id="scalar_for_list",
    ),
    pytest.param(
        "num_q_heads: 8}",
        "num_q_heads: [8]}",
        ["4:22: num_q_heads is one value here, not a list"],
        id="list_for_scalar",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: []",
        ["7:14: axes.page_size is an empty list"],
        id="empty_list",
    ),
    pytest.param(
        "num_q_heads: 8}",
        "num_q_heads: }",
        ["4:21: num_q_heads is empty"],
        id="empty_val",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: [16, 32, 16]",
        ["7:23: axes.page_size lists 16 twice"],
        id="twice",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, causal: no}",
        ["4:33: causal is true or false, not 'no'"],
        id="no_is_not_false",
    ),
    pytest.param(
        "data: [normal, probe]",
        "data: [normal, prob]",
        ["9:18: unknown data law 'prob'. Did you mean 'probe'?"],
        id="law",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, dtype: fp17}",
        ["4:32: unknown dtype 'fp17'. Did you mean 'fp16'?"],
        id="dtype",
    ),
    pytest.param(
        "sliding_window: [none, 16]",
        "sliding_window: [0, 16]",
        ["8:20: sliding_window is a whole number of at least 1 or none, not 0"],
        id="window_0",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, logits_soft_cap: 0}",
        ["4:42: logits_soft_cap is a number above 0 or none, not 0"],
        id="cap",
    ),
    pytest.param(
        "kernels: [alpha, beta]",
        "kernels: [alpha, betta]",
        ["3:18: unknown kernel 'betta'. Did you mean 'beta'?"],
        id="kernel",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, kernel: alpha}",
        ["4:25: the kernels of a matrix go under 'kernels'"],
        id="kernel_axis",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, page_size: 16}",
        ["7:3: axis 'page_size' already has values elsewhere"],
        id="fixed_and_axes",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, seed: 1, data_seed: 2}",
        ["4:34: axis 'data_seed' already has values elsewhere"],
        id="alias_twice",
    ),
    pytest.param(
        "  nightly: full",
        "  nigthly: full",
        ["19:3: unknown tier 'nigthly'. Did you mean 'nightly'?"],
        id="tier_name",
    ),
    pytest.param(
        "  nightly: full",
        "  nightly: fulll",
        ["19:12: a tier is full or a mapping such as {cover: 2}, not 'fulll'"],
        id="tier_value",
    ),
    pytest.param(
        "{cover: 2}",
        "{cover: 7}",
        ["18:18: cover is 2 or 3, not '7'"],
        id="cover_7",
    ),
    pytest.param(
        "{cover: 2}",
        "{cover: 2, full: true}",
        ["18:3: tier 'smoke' needs one of cover, full and list; it has cover and full"],
        id="cover_and_full",
    ),
    pytest.param(
        "{cover: 2}",
        "{shrink: {num_q_heads: 8}}",
        ["18:3: tier 'smoke' needs one of cover, full and list; it has none of them"],
        id="nothing",
    ),
    pytest.param(
        "{cover: 2}",
        "{cover: 2, shrnk: {num_q_heads: 8}}",
        ["18:21: unknown tier key 'shrnk'. Did you mean 'shrink'?"],
        id="tier_key",
    ),
    pytest.param(
        "gqa_ratio: [1, 8]",
        "gqa_ratio: [1, 3]",
        ["6:18: gqa_ratio 3 does not divide num_q_heads 8 of tier 'smoke'"],
        id="gqa_never",
    ),
    pytest.param(
        "{cover: 2}",
        "{cover: 2, shrink: {num_q_heads: 4}}",
        ["6:18: gqa_ratio 8 does not divide num_q_heads 4 of tier 'smoke'"],
        id="gqa_shrink",
    ),
    pytest.param(
        "{cover: 2}",
        "{cover: 2, also: [{num_q_heads: 4, gqa_ratio: 3}]}",
        ["18:28: gqa_ratio 3 does not divide num_q_heads 4 of the entry on line 18"],
        id="gqa_entry",
    ),
    pytest.param(
        "  - page_size != 32 or kernel != 'alpha'",
        "  - page_size == 64",
        ["15:5: the constraint excludes every case of tier 'smoke': page_size == 64"],
        id="impossible_constraint",
    ),
    pytest.param(
        "  - page_size != 32 or kernel != 'alpha'",
        "  - page_size == 16\n  - page_size == 32",
        [
            "19:3: tier 'smoke' selects no case: the constraints together exclude every combination",
            "20:3: tier 'nightly' selects no case: the constraints together exclude every combination",
        ],
        id="together",
    ),
    pytest.param(
        "  - page_size != 32 or kernel != 'alpha'",
        "  - page_size != 32 or gqa_ratio > 8",
        [
            "7:19: no case of tier 'smoke' has page_size 32: excluded by the constraint "
            "page_size != 32 or gqa_ratio > 8 (line 15)"
        ],
        id="emptied_value",
    ),
    pytest.param(
        "  - page_size != 32 or kernel != 'alpha'",
        "  - kernel == 'beta'",
        ["3:11: no case of tier 'smoke' has kernel alpha: excluded by the constraint kernel == 'beta' (line 15)"],
        id="emptied_kernel",
    ),
    pytest.param(
        "  - page_size != 32 or kernel != 'alpha'",
        "  - page_size != 32 or data == 'probe'\n  - page_size != 32 or data == 'normal'",
        ["7:19: no case of tier 'smoke' has page_size 32: the constraints together exclude it"],
        id="emptied_together",
    ),
    pytest.param(
        "  rows: [two, drawn]\n",
        "  rows: [two]\n  num_pages: [50]\n  placement: [{name: far, pages: [[9], [10, 11, 99]]}]\n",
        [
            "12:15: placement 'far': page 99 lies beyond a pool of 50 pages (num_pages) "
            "(in every combination of tier 'smoke')"
        ],
        id="placement_beyond",
    ),
    pytest.param(
        "fixed: {num_q_heads: 8}",
        "fixed: {num_q_heads: 8, pool: sparse}",
        ["4:31: unknown pool 'sparse'. Known: aliased, auto, dense"],
        id="pool",
    ),
    pytest.param(
        "data: [normal, probe]\n",
        "data: [normal, needle]\n  logits_soft_cap: [30, 50.5]\n",
        [
            "9:18: needle: a soft cap of 30 bounds the score gap that a needle needs (in every combination of tier 'smoke')"  # noqa: E501
        ],
        id="needle_cap2",
    ),
    pytest.param(
        "must_see: [newest_token]",
        "must_see: [newest_tokn]",
        ["16:12: unknown fault 'newest_tokn'. Did you mean 'newest_token'?"],
        id="fault",
    ),
    pytest.param(
        ", issue: 'https://example.org/1'",
        "",
        ["21:5: the expectation has no issue"],
        id="expect_missing",
    ),
    pytest.param(
        "'https://example.org/1'",
        "soon",
        ["21:71: issue is a link (https://...), not 'soon'"],
        id="expect_issue",
    ),
    pytest.param(
        "2027-03-01",
        "next week",
        ["21:103: until is a date such as 2027-03-01, not 'next week'"],
        id="expect_until",
    ),
    pytest.param(
        "outcome: FAIL",
        "outcome: TEST_BUG",
        [
            "21:39: unknown outcome to expect 'TEST_BUG'. Known: BLIND, CRASH, FAIL, NONDETERMINISTIC, OUT_OF_MEMORY, TIMEOUT"  # noqa: E501
        ],
        id="expect_outcome",
    ),
    pytest.param(
        "where: page_size == 16",
        "where: page == 16",
        ["21:13: unknown name 'page'. Did you mean 'page_size'?"],
        id="expect_where",
    ),
    pytest.param(
        "matrix: demo",
        "matrix: My Demo",
        ["1:9: matrix is a name of a-z, 0-9 and _, not 'My Demo'"],
        id="matrix_name",
    ),
    pytest.param(
        "  page_size: [16, 32]",
        "\tpage_size: [16, 32]",
        ["7:1: not valid YAML: found character '\\t' that cannot start any token"],
        id="tab",
    ),
    pytest.param(
        "page_size: [16, 32]",
        "page_size: [16, 32",
        ["8:17: not valid YAML: expected ',' or ']', but got ':'"],
        id="unclosed",
    ),
    pytest.param(
        BASE,
        "- a\n- b\n",
        ["1:1: a matrix is a mapping (key: value), not a list"],
        id="root",
    ),
    pytest.param(
        BASE,
        "# nothing\n",
        ["1:1: the file is empty"],
        id="empty",
    ),
    pytest.param(
        "page_size != 32 or",
        "page_size % geometry_seed == 0 or",
        ["15:5: 'page_size % geometry_seed' divides by zero"],
        id="divides_by_zero",
    ),
    pytest.param(
        "must_see: [newest_token]",
        "must_see: newest_token",
        ["16:11: must_see is a list, not 'newest_token'. Write [newest_token]"],
        id="must_see_no_list",
    ),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "demo.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def headlines(error: MatrixError) -> list[str]:
    """Without the path, which differs from run to run."""
    return [line.removeprefix(f"{error.path}:") for line in error.headlines]


def test_the_file_the_mistakes_are_planted_in_is_good(tmp_path: Path) -> None:
    assert load(write(tmp_path, BASE), kernel_names=KERNELS).name == "demo"


@pytest.mark.parametrize(("good", "bad", "expected"), MISTAKES)
def test_mistake_is_told_with_its_place(tmp_path: Path, good: str, bad: str, expected: list[str]) -> None:
    assert BASE.count(good) >= 1, "the mistake was not planted"
    with pytest.raises(MatrixError) as caught:
        load(write(tmp_path, BASE.replace(good, bad, 1)), kernel_names=KERNELS)
    assert headlines(caught.value) == expected


def test_a_mistake_is_shown_with_its_line_and_underlined(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("  page_size:", "  page_sise:"))
    with pytest.raises(MatrixError) as caught:
        load(path, kernel_names=KERNELS)
    assert str(caught.value) == (
        f"{path}:7:3: unknown axis 'page_sise'. Did you mean 'page_size'?\n"
        "    7 |   page_sise: [16, 32]\n"
        "      |   ^^^^^^^^^"
    )


def test_all_mistakes_of_a_file_come_together_sorted_by_line(tmp_path: Path) -> None:
    text = BASE.replace("newest_token", "newest_tokn").replace("probe]", "prob]").replace("cover: 2", "cover: 7")
    with pytest.raises(MatrixError) as caught:
        load(write(tmp_path, text.replace("kernels: [alpha", "kernels: [alhpa")), kernel_names=KERNELS)
    assert headlines(caught.value) == [
        "3:11: unknown kernel 'alhpa'. Did you mean 'alpha'?",
        "9:18: unknown data law 'prob'. Did you mean 'probe'?",
        "16:12: unknown fault 'newest_tokn'. Did you mean 'newest_token'?",
        "18:18: cover is 2 or 3, not '7'",
    ]


def test_mistakes_in_shared_rows_name_that_file(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("broken: {query_lens: [1]}\n", encoding="utf-8")
    with pytest.raises(MatrixError) as caught:
        load(write(tmp_path, BASE), kernel_names=KERNELS)
    assert caught.value.headlines == (f"{tmp_path / 'rows.yaml'}:1:9: row mix 'broken' has no context_lens",)


def test_a_mix_that_is_also_shared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("two: {query_lens: [1], context_lens: [4]}\n", encoding="utf-8")
    with pytest.raises(MatrixError) as caught:
        load(write(tmp_path, BASE), kernel_names=KERNELS)
    assert headlines(caught.value) == ["11:1: row mix 'two' is also in rows.yaml"]


def test_kernel_names_are_not_checked_where_none_are_given(tmp_path: Path) -> None:
    text = BASE.replace("[alpha, beta]", "[alpha, anything]")
    assert load(write(tmp_path, text)).kernels == ("alpha", "anything")
