"""Batch prefill: each likely fault of V2, of V3's pipeline and of the choice between them fails a small case."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.case import Case, Rows
from harness.dispatch.batch_prefill import BatchPrefillFacts
from harness.dispatch.predicate import ALL_HOLD
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels, load_entry
from harness.matrix import load
from harness.run.outcome import Outcome, Verdict
from harness.run.run_case import Options, run_case
from harness.session import PROJECT
from tests.access.faulty import faulty

KERNELS = find_kernels()
FP8 = {"dtype": "bf16", "kv_dtype": "fp8_e4m3", "q_dtype": "fp8_e4m3"}
PAGES = {"descales_per": "page"}
ONE_DIMENSIONAL = {"page_table": "kv_indices"}
MIXED = Rows("mixed", (5, 1, 20), (40, 63, 0))
DRAFTS = Rows("drafts", (4, 2), (60, 33))
TWO_PAGES = Rows("two_pages", (40,), (1160,))  # tiles of 64 keys: the last three lie in the second page of 1024


def case(kernel: str, rows: Rows = MIXED, **axes: Any) -> Case:
    sizes = {"dtype": "bf16", "num_q_heads": 4, "gqa_ratio": 2, "head_size": 64} | axes
    return Case("m", kernel, rows, **sizes)


def run(contract: Contract, one: Case) -> Verdict:
    return run_case(one, contract, Options(device="cpu"))


@functools.cache
def honest(one: Case) -> Verdict:
    return run(KERNELS[one.kernel], one)


def v2(rows: Rows = MIXED, **axes: Any) -> Case:
    return case("batch_prefill_v2", rows, **axes)


def v3(rows: Rows = MIXED, **axes: Any) -> Case:
    return case("batch_prefill_v3", rows, **(FP8 | axes))


class Fault(NamedTuple):
    old: str
    new: str
    case: Case
    file: str = ""


TABLE = "../_shared/page_table.py"
SLOTS = "v_strides.page, v_strides.slot, v_strides.head, v_strides.dim, v_strides.slot_lane"
FAULTS_OF_V2 = {
    "descale of q dropped": Fault("logit_scale * tl.load(q_descale_ptr)", "logit_scale", v2(**FP8)),
    "descale of K dropped": Fault("logit_scale * tl.load(k_scale_ptr)", "logit_scale", v2(**FP8)),
    "descale of V dropped": Fault("acc *= tl.load(v_scale_ptr)", "acc *= 1.0", v2(**FP8)),
    "descale of K for V": Fault("acc *= tl.load(v_scale_ptr)", "acc *= tl.load(k_scale_ptr)", v2(**FP8)),
    "descale of the first head": Fault(
        "+ kv_head * descale_stride_head", "+ 0 * descale_stride_head", v2(**FP8, **PAGES)
    ),
    "descale of the logical page": Fault(
        "page.to(tl.int64) * descale_stride_page", "(key // page_size) * descale_stride_page", v2(**FP8, **PAGES)
    ),
    "descale of K by page for V": Fault("descale + descale_stride_kind, mask", "descale, mask", v2(**FP8, **PAGES)),
    "length of the last page ignored": Fault(
        "tl.load(kv_last_page_len_ptr + seq)", "page_size", v2(**ONE_DIMENSIONAL, causal=False), TABLE
    ),
    "indptr off by one": Fault(
        "pages = kv_page_indices_ptr + first", "pages = kv_page_indices_ptr + first + 1", v2(**ONE_DIMENSIONAL), TABLE
    ),
    "page indices read behind the end": Fault(
        "tl.load(table + key // page_size, mask=cached",
        "tl.load(table + key // page_size, mask=key < seq_len + page_size",
        v2(**ONE_DIMENSIONAL, table_padding="exact"),
    ),
    "slot and lane of V exchanged": Fault(
        SLOTS,
        "v_strides.page, v_strides.slot_lane, v_strides.head, v_strides.dim, v_strides.slot",
        v2(layout="vectorized"),
    ),
    "sink of the KV head": Fault(
        "initial_max_and_sum(sinks_ptr, head, present", "initial_max_and_sum(sinks_ptr, head * 0 + kv_head, present",
        v2(sinks=True),
    ),
    "sink in every tile": Fault(
        "row_sum = row_sum * alpha + tl.sum(p, 1)",
        "row_sum = row_sum * alpha + tl.sum(p, 1)\n        if sinks_ptr is not None and tile_start > 0:\n"
        "            row_sum += tl.exp(tl.load(sinks_ptr + head, mask=present, other=0.0) - new_max)",
        v2(Rows("r", (5, 1), (100, 140)), sinks=True),
    ),
    "soft cap after the mask": Fault(
        'scores = tl.where(seen, scores, float("-inf"))',
        'scores = soft_cap(tl.where(seen, scores, float("-inf")), cap)',
        v2(logits_soft_cap=30.0),
    ),
    "causal top-left": Fault("query_pos = context_len + query", "query_pos = query", v2()),
    "no mask among drafts": Fault("query_pos = context_len + query", "query_pos = seq_len - 1 + query * 0", v2(DRAFTS)),
    "window of one key more": Fault("seq_len, window, CAUSAL", "seq_len, window + 1, CAUSAL", v2(sliding_window=16)),
    "V of 128 dims as of 192": Fault(
        "(dim_v < head_size_v)[None, :], other=0.0)\n        acc",
        "(dim_v < head_size_v - 1)[None, :], other=0.0)\n        acc",
        v2(DRAFTS, head_size=192, head_size_v=128),
    ),
    "ALiBi of the KV head": Fault(
        "tl.load(alibi_slopes_ptr + head,", "tl.load(alibi_slopes_ptr + head // gqa_ratio,", v2(alibi=True)
    ),
}  # fmt: skip

DEEP = {"page_size": 1024, **PAGES}
FAULTS_OF_V3 = {
    "stale descales of K and V, slot a": Fault(
        "q, k_a, page_a, start, k_descale_a, v_descale_a,",
        "q, k_a, page_a, start, k_descale_next, v_descale_next,",
        v3(TWO_PAGES, **DEEP),
    ),
    "stale descale of K, slot a": Fault("start, k_descale_a,", "start, k_descale_next,", v3(TWO_PAGES, **DEEP)),
    "stale descale of K, slot b": Fault(
        "start + BLOCK_N, k_descale_b,", "start + BLOCK_N, k_descale_next,", v3(TWO_PAGES, **DEEP)
    ),
    "stale descale of K, quiet": Fault(
        "start, k_descale_a,", "start, k_descale_next,", v3(TWO_PAGES, **DEEP, descales="quiet")
    ),
    "unit of the accumulator not moved": Fault("        unit = v_descale_a\n", "", v3(TWO_PAGES, **DEEP)),
    "ratio of V descales inverted": Fault("unit / v_descale)", "v_descale / unit)", v3(TWO_PAGES, **DEEP)),
    "descale of V dropped": Fault("acc * unit,", "acc,", v3()),
    "descale of K not in the maximum": Fault("tl.max(products, 1) * factor", "tl.max(products, 1) * logit_scale", v3()),
    "descale of the first head": Fault("+ kv_head * stride_head\n", "+ 0 * stride_head\n", v3(TWO_PAGES, **DEEP)),
    "descale of q dropped": Fault("softmax_scale_log2 * tl.load(q_descale_ptr)", "softmax_scale_log2", v3()),
    "P not lifted into the range of fp8": Fault("* factor - SHIFT)", "* factor)", v3(data="probe")),
    "LSE in base 2": Fault("row_max * LN2", "row_max", v3()),
    "pages of the other slot": Fault("q, k_a, page_a, start", "q, k_a, page_b, start", v3()),
    "odd last tile lost": Fault("range(0, end_key, 2 * BLOCK_N)", "range(0, end_key - BLOCK_N, 2 * BLOCK_N)", v3()),
    "next tile loaded early": Fault(
        "table, start + 2 * BLOCK_N, end_key, page_size, kv_head, dim,",
        "table, start + BLOCK_N, end_key, page_size, kv_head, dim,",
        v3(TWO_PAGES, page_size=16),
    ),
    "causal top-left": Fault("query_pos = context_len + query", "query_pos = query", v3()),
    "V behind the last token": Fault("mask=(key < end_key)[:, None] &", "mask=(key < end_key + 1)[:, None] &", v3()),
}


@pytest.mark.parametrize("fault", [*FAULTS_OF_V2.values(), *FAULTS_OF_V3.values()], ids=[
    *(f"v2, {name}" for name in FAULTS_OF_V2), *(f"v3, {name}" for name in FAULTS_OF_V3)
])  # fmt: skip
def test_planted_fault_fails(tmp_path: Path, fault: Fault) -> None:
    assert honest(fault.case).outcome is Outcome.PASS, honest(fault.case).reason
    wrong = run(faulty(fault.case.kernel, tmp_path, fault.old, fault.new, fault.file), fault.case)
    assert wrong.outcome is Outcome.FAIL, wrong.reason
    assert not (wrong.reason or "").startswith("the kernel raised"), wrong.reason


@pytest.mark.parametrize(("one", "kernel"), [
    (case("batch_prefill", DRAFTS, **FP8), "batch_prefill_v3_kernel"),
    (case("batch_prefill", DRAFTS, **FP8, sliding_window=16), "batch_prefill_v2_kernel"),
    (case("batch_prefill", DRAFTS, **FP8, **PAGES), "batch_prefill_v2_kernel"),
    (case("batch_prefill", DRAFTS), "batch_prefill_v2_kernel"),
])  # fmt: skip
def test_the_dispatcher_takes_what_its_contract_says(one: Case, kernel: str) -> None:
    verdict = honest(one)
    assert (verdict.outcome, verdict.ran) == (Outcome.PASS, (kernel,)), verdict.reason


@pytest.mark.parametrize(("old", "new", "one", "missing"), [
    ("V3_KERNEL in decision.kernels", "False", case("batch_prefill", DRAFTS, **FP8), "batch_prefill_v3_kernel"),
    ("V3_KERNEL in decision.kernels", "True", case("batch_prefill", DRAFTS, **FP8, sinks=True),
     "batch_prefill_v2_kernel"),
])  # fmt: skip
def test_a_silent_fallback_fails(tmp_path: Path, old: str, new: str, one: Case, missing: str) -> None:
    verdict = run(faulty("batch_prefill", tmp_path, old, new), one)
    assert verdict.outcome is Outcome.FAIL
    assert f"did not launch {missing}" in verdict.reason


def test_the_rounding_of_folded_descales_is_no_gain() -> None:
    """V2 folds V descales of pages into P: the largest P of each row is the descale itself, which rounds alike in all
    rows. A profile that does not say so takes it for a wrong descale.
    """
    one = v2(
        Rows("mixed5", (5, 1, 33, 2, 1), (40, 63, 0, 17, 100)), **FP8, num_q_heads=8, gqa_ratio=4, page_size=1024,
        head_size=192, head_size_v=128, sliding_window=16, sink_tokens=4, logits_soft_cap=30.0, causal=False, **PAGES,
    )  # fmt: skip
    contract = KERNELS["batch_prefill_v2"]
    silent = replace(contract, numerics=replace(contract.numerics, p_fold_v=False))
    assert [run(each, one).outcome for each in (contract, silent)] == [Outcome.PASS, Outcome.FAIL]


def transitions() -> list[tuple[Case, bool]]:
    """The smoke tier of page_transitions_v3: cases, and whether descales change within a sequence."""
    matrix = load(PROJECT / "cases" / "page_transitions_v3.yaml", kernel_names=KERNELS)
    expansion = matrix.expand("smoke", supported=lambda one: KERNELS[one.kernel].unsupported(one))
    return [(one, len(set(one.placement.pages[0])) > 1) for one in expansion.cases]


@pytest.mark.parametrize(("one", "steps"), transitions(), ids=[one.placement.name for one, _ in transitions()])
def test_a_stale_descale_within_2_percent_fails_at_every_step(tmp_path: Path, one: Case, steps: bool) -> None:
    """The K descale of the tile that is being loaded, used for the tile that is being consumed."""
    stale = faulty("batch_prefill_v3", tmp_path, "start, k_descale_a,", "start, k_descale_next,")
    assert run(stale, one).outcome is (Outcome.FAIL if steps else Outcome.PASS)


def test_v3_takes_what_the_dispatcher_gives_it() -> None:
    """One change at a time to a request that V3 takes: contract, predicate and dispatcher say the same."""
    load_entry(KERNELS["batch_prefill"])
    conditions = importlib.import_module("_attnreg_kernels.batch_prefill.v3_conditions")
    base = v3()
    taken: dict[str, Any] = {"page_size": (1, 16, 1024), "causal": (False,), "layout": ("linear_nhd",)}
    refused: dict[str, Any] = {
        "kv_dtype": ("auto", "fp8_e4m3fnuz"), "page_size": (8, 64, 2048), "layout": ("hnd", "vectorized"),
        "sliding_window": (16,), "logits_soft_cap": (30.0,), "alibi": (True,), "sinks": (True,), "sink_tokens": (2,),
        "descales_per": ("page",),
    }  # fmt: skip
    for expected, changes in ((True, taken), (False, refused)):
        for axis, values in changes.items():
            for value in values:
                one = replace(base, **{axis: value})
                if axis == "kv_dtype":
                    one = replace(one, q_dtype=value)
                facts = conditions.facts_of(one)
                assert isinstance(facts, BatchPrefillFacts)
                assert (conditions.V3_CONDITIONS.decide(facts).branch == ALL_HOLD) is expected, one
                assert (KERNELS["batch_prefill_v3"].unsupported(one) is None) is expected, one
                assert KERNELS["batch_prefill"].unsupported(one) is None


@pytest.mark.parametrize(("axes", "words"), [
    ({"kv_dtype": "fp8_e4m3", "q_dtype": "auto"}, "q is stored as the cache is"),
    (FP8 | {"dtype": "fp16"}, "fp8 inputs give bf16"),
    ({"head_size": 264}, "at most 256"),
    ({"head_size": 72, **FP8}, "whole vectors"),
])  # fmt: skip
def test_what_batch_prefill_does_not_take_is_said(axes: dict[str, Any], words: str) -> None:
    for name in ("batch_prefill_v2", "batch_prefill"):
        assert words in str(KERNELS[name].unsupported(case(name, **axes)))
