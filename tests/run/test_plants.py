"""Planted set-up faults get the verdict they deserve; without them the same cases pass."""

from __future__ import annotations

import pytest

from harness.case import Case, Rows
from harness.errors import UsageError
from harness.kernel.registry import find_kernels
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT, PLANTS, Plant, find_plant
from harness.run.run_case import Options, run_case

KERNELS = find_kernels()
LISTED = ("indptr-stale", "last-page-len", "indices-exchanged")  # faults of a list of pages
MIXED = Rows("mixed", (5, 1, 3), (20, 33, 0))
DECODE = Rows("decode", (1, 1), (20, 33))


def case(kernel: str, kv_dtype: str = "auto", **axes: object) -> Case:
    rows, contract = DECODE if kernel == "paged_decode" else MIXED, KERNELS[kernel]
    values: dict[str, object] = {"num_q_heads": 4, "gqa_ratio": 2, "head_size": 32}
    values["layout"] = "vllm_classic" if "vllm_classic" in contract.layouts else "linear_nhd"
    if contract.q_as_kv and kv_dtype != "auto":
        values |= {"dtype": "bf16", "q_dtype": kv_dtype}
    return Case("plants", kernel, rows, kv_dtype=kv_dtype, **(values | axes))  # type: ignore[arg-type]


def run(kernel: str, plant: Plant = NO_PLANT, *, checks: bool = True, **axes: object) -> Verdict:
    options = Options(device="cpu", contract_checks=checks, plant=plant)
    return run_case(case(kernel, **axes), KERNELS[kernel], options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_without_a_plant_every_kernel_passes(kernel: str, kv_dtype: str) -> None:
    verdict = run(kernel, kv_dtype=kv_dtype)
    known = Outcome.PASS if kv_dtype in KERNELS[kernel].kv_dtypes else Outcome.UNSUPPORTED
    assert verdict.outcome is known, verdict.reason


OF_WRITERS = ("slot-", "table-")  # tests/run/test_writing.py, test_serving.py


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [name for name in PLANTS if not name.startswith(OF_WRITERS)])
def test_every_plant_gets_the_outcome_it_names(name: str, kernel: str) -> None:
    plant, axes = PLANTS[name], {"kv_dtype": "fp8_e4m3"}
    if name in LISTED and "kv_indices" in KERNELS[kernel].page_tables:
        axes["page_table"] = "kv_indices"
    planted = case(kernel, **axes)  # type: ignore[arg-type]
    if not plant.applies(planted, KERNELS[kernel].content):  # one finds no new token in the cache, others take no list
        assert (name, kernel) == ("decode-token-missing", "prefix_prefill") or (name in LISTED and len(axes) == 1)
        return
    verdict = run(kernel, plant, **axes)
    assert verdict.outcome.value == plant.expected, verdict.reason


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "decode-token-missing",
            ("before launch", "decode row, sequence 1", "positions 0..33", "position 33 is poison"),
        ),
        ("index-int64", ("block_table", "int32", "chunked_prefill_paged_decode", "got int64")),
        ("cumsum-int64", ("query_start_loc", "int32", "got int64", "cumsum", "cast after it")),
        ("zero-pool", ("position 20 is zero", "hold poison so that a read shows")),
        ("scale-one", ("k_descale", "v_descale", "is 1")),
        ("identity-table", ("page_mapping",)),
    ],
)
def test_the_verdict_says_what_is_wrong(name: str, words: tuple[str, ...]) -> None:
    reason = run("chunked_prefill_paged_decode", PLANTS[name], kv_dtype="fp8_e4m3").reason
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("indptr-stale", "kv_indptr: expected 2 at [1], got 1"),
        ("last-page-len", "kv_last_page_len: expected 9 at [0], got 8"),
        ("indices-exchanged", "kv_page_indices: expected the values that were built for this case"),
        ("index-int64", "kv_indptr: expected int32 (the contract of unified_paged), got int64"),
    ],
)
def test_a_fault_of_a_list_of_pages_is_a_test_bug_and_unchecked_a_failure(name: str, words: str) -> None:
    assert words in run("unified_paged", PLANTS[name], page_table="kv_indices").reason
    unchecked = run("unified_paged", PLANTS[name], checks=False, page_table="kv_indices")
    assert unchecked.outcome is (Outcome.PASS if name == "index-int64" else Outcome.FAIL)


def test_unchecked_a_missing_decode_token_fails_in_exactly_the_decode_row() -> None:
    verdict = run("chunked_prefill_paged_decode", PLANTS["decode-token-missing"], checks=False)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.explanation is not None
    (wrong, where, *_) = verdict.explanation["rows"]["wrong"]
    assert wrong == "128 of 1,152 elements = 1 token x 4 heads x 32 dims"
    assert where == "sequence 1, decode row, position 33 (query_len 1, context 33)"


@pytest.mark.parametrize("name", ["index-int64", "cumsum-int64"])
def test_unchecked_a_kernel_that_reads_any_integer_is_not_blamed(name: str) -> None:
    """Ours read int64 rightly; without the check the fault would have gone unseen, which is why there is one."""
    assert run("chunked_prefill_paged_decode", PLANTS[name], checks=False).outcome is Outcome.PASS


def test_an_unknown_plant_is_one_message() -> None:
    with pytest.raises(UsageError, match="Did you mean 'zero-pool'"):
        find_plant("zero-pol")


def test_a_plant_that_changes_nothing_does_not_apply() -> None:
    assert not PLANTS["scale-one"].applies(case("unified_paged"), KERNELS["unified_paged"].content)
    prefill_only = Case("plants", "unified_paged", Rows("prefill", (5,), (7,)))
    assert not PLANTS["decode-token-missing"].applies(prefill_only, KERNELS["unified_paged"].content)
