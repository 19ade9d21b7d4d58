"""Twins that differ in where bytes lie give the same bits, or the axis is named; honest kernels raise no alarm."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.cache.content import Content
from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile
from harness.kernel.registry import find_kernels
from harness.layout import LAYOUTS
from harness.matrix.axes import TWIN_AXES
from harness.run.agreement import twin_in
from harness.run.outcome import Outcome, Verdict
from harness.run.run_case import Options, run_case

KERNELS = find_kernels()
CASE = Case("m", "reorders", Rows("mix", (8, 1), (40, 60)), dtype="fp32", num_q_heads=4, gqa_ratio=2, head_size=32)


def contract(function: str) -> Contract:
    return Contract(
        name="reorders",
        about="attention in float32",
        entry=f"tests.run.reordering:{function}",
        content=Content.ALL,
        features=frozenset({"prefill", "softmax_scale", "strided_cache"}),
        layouts=frozenset(LAYOUTS),
        page_tables=frozenset({"block_table", "kv_indices"}),
        page_sizes=frozenset({16}),
        returns_lse=False,
        numerics=NumericsProfile(kv_dequant="exact", p_dtype="fp32", mma="simt"),
    )


def run(case: Case, of: Contract, *axes: str) -> Verdict:
    return run_case(case, of, Options(device="cpu", twins=axes))


@pytest.mark.parametrize(
    ("function", "axis", "said"),
    [
        ("backwards_for_hnd", "layout", "the twin with layout hnd has other bits in out: "),
        ("backwards_for_lists", "page_table", "the twin with page_table kv_indices has other bits in out: "),
        ("backwards_for_padding", "table_padding", "the twin with table_padding exact has other bits in out: "),
        ("backwards_for_gaps", "strides", "the twin with strides cache has other bits in out: "),
    ],
)
def test_another_order_of_sums_is_seen_and_its_axis_named(function: str, axis: str, said: str) -> None:
    case = replace(CASE, table_padding="out_of_range")
    alone = run(case, contract(function))
    assert alone.outcome is Outcome.PASS
    verdict = run(case, contract(function), *TWIN_AXES)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.reason.startswith(said)
    assert "elements differ, the first at token " in verdict.reason
    assert verdict.err_over_tol is not None
    assert verdict.err_over_tol < 1
    assert verdict.explanation is not None
    assert verdict.explanation["rows"]["twins"] == [verdict.reason]
    assert verdict.explanation["shape"] == "twins"
    others = tuple(other for other in TWIN_AXES if other != axis)
    assert run(case, contract(function), *others).outcome is Outcome.PASS


def test_a_twin_that_the_kernel_raises_for_is_named() -> None:
    verdict = run(CASE, contract("refuses_hnd"), "layout")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.reason == "the twin with layout hnd: the kernel raised ValueError: heads first"


def test_what_the_contract_says_to_change_the_arithmetic_is_not_compared() -> None:
    known = replace(contract("backwards_for_hnd"), arithmetic_by=frozenset({"layout"}))
    verdict = run(CASE, known, "layout", "strides")
    assert verdict.outcome is Outcome.PASS
    assert verdict.explanation is not None
    said = ["not compared in layout: it changes the arithmetic of reorders"]
    assert verdict.explanation["rows"]["twins"] == said
    with pytest.raises(ValueError, match="unknown arithmetic_by: dtype; it is a set of layout, page_table"):
        replace(known, arithmetic_by=frozenset({"dtype"}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["unified_paged", "torch_sdpa_paged"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_in_tree_kernels_agree_with_themselves(kernel: str, kv_dtype: str, layout: str) -> None:
    page_size = 1 if layout == "linear_3d" else 16
    case = replace(CASE, kernel=kernel, layout=layout, page_size=page_size, dtype="bf16", kv_dtype=kv_dtype)
    verdict = run(case, KERNELS[kernel], *TWIN_AXES)
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")
    assert verdict.explanation is None  # all of it was compared
    assert verdict.seconds is not None
    assert "twins" in verdict.seconds


def test_twins_take_turns_through_the_values_that_a_kernel_takes() -> None:
    of = contract("honest")
    met, case = [CASE.layout], CASE
    for _ in range(4):
        twin = twin_in("layout", case, of)
        assert isinstance(twin, Case)
        met.append(twin.layout)
        assert replace(twin, layout=CASE.layout) == CASE
        case = twin
    assert met == ["linear_nhd", "hnd", "vllm_classic", "vectorized", "linear_nhd"]  # linear_3d has pages of one token
    assert twin_in("layout", replace(CASE, head_size=6, layout="vllm_classic"), of) == replace(CASE, head_size=6)
    few = replace(of, layouts=frozenset({"linear_nhd"}))
    assert twin_in("layout", CASE, few) == "reorders takes no other one here"
    probe = replace(CASE, boundary="carry", boundary_target="k", rows=Rows("r", (1, 1), (20, 12)))
    assert twin_in("strides", probe, of) == "reorders takes no other one here"


def test_a_twin_that_goes_to_other_device_kernels_is_no_twin() -> None:
    """Of fp8 in whole vectors V3 takes linear layouts only, in another order of sums; that is no fault."""
    common = {"dtype": "bf16", "kv_dtype": "fp8_e4m3", "q_dtype": "fp8_e4m3", "page_size": 16, "head_size": 32}
    case = replace(CASE, kernel="batch_prefill", **common)  # type: ignore[arg-type]
    of = KERNELS["batch_prefill"]
    assert of.must_launch(case) != of.must_launch(replace(case, layout="vectorized"))
    assert twin_in("layout", case, of) == "batch_prefill takes no other one here"
    vectorized = twin_in("layout", replace(case, layout="vectorized"), of)
    assert isinstance(vectorized, Case)
    assert vectorized.layout == "hnd"
