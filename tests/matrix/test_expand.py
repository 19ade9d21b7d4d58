"""From matrices to cases: selection, ids, lines, implied constraints and contracts."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from datetime import date
from pathlib import Path

import pytest

from harness.case import Case, Placement, Rows
from harness.matrix import AXES, Expansion, Matrix, MatrixError, case_id, load

HEAD = """\
matrix: demo
about: A demonstration.
kernels: [alpha, beta]
"""
MIX = "row_mixes: {two: {query_lens: [1, 5], context_lens: [7, 9]}}\n"


def matrix(folder: Path, text: str) -> Matrix:
    path = folder / "demo.yaml"
    path.write_text(HEAD + MIX + text, encoding="utf-8")
    return load(path)


def admit_all(case: Case) -> str | None:
    return None


def ids(expansion: Expansion) -> list[str]:
    return [case_id(case) for case in expansion.cases]


def test_axes_are_the_fields_of_a_case_with_their_defaults() -> None:
    assert set(AXES) == {f.name for f in fields(Case)} - {"matrix"}
    plain = Case("m", "k", Rows("r", (1,), (0,)))
    for name, axis in AXES.items():
        assert axis.required or axis.default == getattr(plain, name)


def test_full_is_the_product_less_constraints_and_keeps_what_contracts_refuse(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "axes: {gqa_ratio: [1, 4], page_size: [16, 32], rows: [two]}\n"
        "constraints: [page_size == 16 or gqa_ratio == 1]\ntiers: {nightly: full}\n",
    )
    expansion = demo.expand("nightly", supported=lambda case: "no" if case.kernel == "beta" else None)
    assert ids(expansion) == [
        f"demo-{kernel}{rest}" for kernel in ("alpha", "beta") for rest in ("-two", "-p32-two", "-gqa4-two")
    ]
    assert expansion.coverage is None
    assert expansion.describe() == "all"
    assert demo.expand("smoke", supported=admit_all).cases == ()


def test_cover_leaves_out_and_counts_what_contracts_refuse(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "axes: {head_size: [64, 128], sinks: [false, true], page_size: [16, 32], rows: [two]}\n"
        "constraints: [not sinks or page_size == 16]\ntiers: {smoke: {cover: 2}}\n",
    )

    def supported(case: Case) -> str | None:
        return "sinks" if case.kernel == "beta" and case.sinks else None

    expansion = demo.expand("smoke", supported=supported)
    coverage = expansion.coverage
    assert coverage is not None
    assert all(supported(case) is None for case in expansion.cases)
    # of 24 pairs: (sinks, p32) by constraint, (beta, sinks) by contract
    assert (coverage.feasible, coverage.covered) == (22, 22)
    assert (coverage.excluded_by_constraint, coverage.excluded_by_contract) == (1, 1)
    assert expansion.describe() == "pairs 100 %"


def test_a_clause_on_two_axes_together_is_respected(tmp_path: Path) -> None:
    """head_size_v may equal head_size by value, so neither axis alone decides."""
    demo = matrix(
        tmp_path, "axes: {head_size: [64, 128], head_size_v: [none, 64], rows: [two]}\ntiers: {smoke: {cover: 2}}\n"
    )
    cases = demo.expand("smoke", supported=lambda c: "v" if c.value_size != c.head_size else None).cases
    assert {(case.head_size, case.head_size_v) for case in cases} == {(64, None), (64, 64), (128, None)}


def test_a_kernel_without_any_admitted_case_takes_no_part(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "fixed: {alibi: true}\naxes: {page_size: [16, 32], head_size: [64, 96], rows: [two]}\n"
        "tiers: {smoke: {cover: 2}}\n",
    )
    cases = demo.expand("smoke", supported=lambda c: "alibi" if c.kernel == "beta" and c.alibi else None).cases
    assert {case.kernel for case in cases} == {"alpha"}
    with pytest.raises(MatrixError) as caught:
        demo.expand("smoke", supported=lambda c: "never")
    assert caught.value.headlines[0].endswith(
        ":7:9: tier 'smoke' selects no case that a contract admits: alpha: never; beta: never"
    )


def test_entries_take_all_kernels_and_first_values_and_know_their_lines(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "axes: {page_size: [32, 16], dtype: [bf16, fp16], rows: [two]}\n"
        "tiers:\n"
        "  smoke:\n"
        "    list:\n"
        "      - {sliding_window: [none, 3]}\n"
        "      - {kernel: beta, page_size: 16}\n"
        "      - {kernel: beta, sliding_window: 3}\n",
    )
    expansion = demo.expand("smoke", supported=lambda c: "kept all the same")
    assert ids(expansion) == [
        "demo-alpha-bf16-p32-two",
        "demo-alpha-bf16-sw3-p32-two",
        "demo-beta-bf16-p32-two",
        "demo-beta-bf16-sw3-p32-two",
        "demo-beta-bf16-two",
    ]
    assert expansion.lines == (9, 9, 9, 9, 10), "a case that two entries name is one case, of the first"
    assert expansion.describe() == "listed"


def test_shrink_replaces_values_and_also_adds_cases(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "fixed: {num_q_heads: 64}\naxes: {gqa_ratio: [1, 64], rows: [two]}\n"
        "tiers:\n"
        "  smoke: {full: true, shrink: {num_q_heads: 8, gqa_ratio: [1, 8]}, also: [{kernel: beta, seed: 3}]}\n",
    )
    expansion = demo.expand("smoke", supported=admit_all)
    assert ids(expansion) == [
        "demo-alpha-two",
        "demo-alpha-gqa8-two",
        "demo-beta-two",
        "demo-beta-gqa8-two",
        "demo-beta-two-s3",
    ]
    assert set(expansion.lines) == {8}


def test_implied_constraints_leave_combinations_out_of_products(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "axes:\n"
        "  num_q_heads: [6, 8]\n"
        "  gqa_ratio: [3, 4]\n"
        "  sliding_window: [none, 4]\n"
        "  logits_soft_cap: [none, 30]\n"
        "  data: [normal, needle]\n"
        "  rows: [{name: edge, query_lens: [1], context_lens: [sliding_window]}, two]\n"
        "tiers: {ci: full}\n",
    )
    cases = demo.expand("ci", supported=admit_all).cases
    assert {(case.num_q_heads, case.gqa_ratio) for case in cases} == {(6, 3), (8, 4)}
    assert {(case.rows.name, case.sliding_window) for case in cases} == {("edge", 4), ("two", None), ("two", 4)}
    assert {(case.data, case.logits_soft_cap) for case in cases} == {
        ("normal", None), ("normal", 30.0), ("needle", None),
    }  # fmt: skip
    assert len(cases) == 2 * 2 * 3 * 3


def test_expanding_twice_gives_the_same_cases_in_the_same_order(tmp_path: Path) -> None:
    axes = "axes: {page_size: [16, 32, 1], head_size: [24, 64, 96], dtype: [fp16, bf16], rows: [two]}\n"
    text = axes + "tiers: {ci: {cover: 2}}\n"
    first = matrix(tmp_path, text).expand("ci", supported=admit_all)
    second = matrix(tmp_path, text).expand("ci", supported=admit_all)
    assert first.cases == second.cases


CASE = Case("contexted_kv", "chunked", Rows("mixed10", (1,), (-1,)))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (CASE, "contexted_kv-chunked-mixed10"),
        (
            replace(
                CASE, gqa_ratio=8, head_size=24, kv_dtype="fp8_e4m3", sliding_window=16, page_size=32, data="probe"
            ),
            "contexted_kv-chunked-gqa8-d24-kvfp8_e4m3-sw16-p32-mixed10-probe",
        ),
        (replace(CASE, causal=False, alibi=True, sinks=True), "contexted_kv-chunked-noncausal-alibi-sinks-mixed10"),
        (replace(CASE, logits_soft_cap=30.0), "contexted_kv-chunked-cap30-mixed10"),
        (replace(CASE, logits_soft_cap=0.5), "contexted_kv-chunked-cap0.5-mixed10"),
        (replace(CASE, logits_soft_cap=1e20), "contexted_kv-chunked-cap1e20-mixed10"),
        (replace(CASE, placement=Placement("explicit", "straddle", ((3,),))), "contexted_kv-chunked-straddle-mixed10"),
        (replace(CASE, geometry_seed=3, data_seed=17), "contexted_kv-chunked-mixed10-g3-s17"),
        (
            replace(CASE, strides="all", table_padding="exact", tail="loud", layout="vllm_classic", num_splits=4),
            "contexted_kv-chunked-vllm_classic-strided_all-pad_exact-tail_loud-splits4-mixed10",
        ),
    ],
)
def test_ids_spell_what_is_not_default_in_a_fixed_order(case: Case, expected: str) -> None:
    assert case_id(case) == expected
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", expected)


def test_expectations_match_by_condition_and_expire_after_their_last_day(tmp_path: Path) -> None:
    demo = matrix(
        tmp_path,
        "fixed: {rows: two}\ntiers: {ci: full}\n"
        "expect:\n"
        "  - {where: kernel == 'beta', outcome: FAIL, because: b, issue: 'https://example.org/2', until: 2020-03-01}\n"
        "  - {where: has_decode, outcome: CRASH, because: d, issue: 'https://example.org/3', until: 2027-03-01}\n",
    )
    alpha, beta = demo.expand("ci", supported=admit_all).cases
    first, second = demo.expectation(beta), demo.expectation(alpha)
    assert first is not None
    assert second is not None
    assert (first.outcome, first.line) == ("FAIL", 8), "the first that matches"
    assert (second.outcome, second.issue) == ("CRASH", "https://example.org/3")
    assert not first.expired(date(2020, 3, 1))
    assert first.expired(date(2020, 3, 2))
    assert demo.expectation(replace(alpha, rows=Rows("p", (2,), (0,)))) is None
