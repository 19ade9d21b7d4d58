"""The shipped matrices: sizes of tiers, what they sweep, and that kernels for every case meet every feature."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.case import Case
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels, writers_of
from harness.matrix import SHARED_ROWS, Expansion, case_id, load
from harness.problem.admission import law_refusal, placement_refusal

ROOT = Path(__file__).parents[2]
MATRICES = sorted(path for path in (ROOT / "cases").glob("*.yaml") if path.name != SHARED_ROWS)
KERNELS = ("chunked_prefill_paged_decode", "paged_decode", "prefix_prefill", "torch_sdpa_paged", "unified_paged")


@functools.cache
def contracts() -> dict[str, Contract]:
    return find_kernels()


@functools.cache
def expansions(tier: str) -> tuple[Expansion, ...]:
    matrices = [load(path, kernel_names=contracts(), writer_names=writers_of(contracts())) for path in MATRICES]
    return tuple(m.expand(tier, supported=lambda case: contracts()[case.kernel].unsupported(case)) for m in matrices)


def cases(tier: str) -> list[Case]:
    return [case for expansion in expansions(tier) for case in expansion.cases]


@pytest.mark.parametrize(
    ("tier", "fewest", "most"), [("smoke", 150, 600), ("ci", 400, 2000), ("nightly", 1500, 10_000)]
)
def test_sizes_of_tiers(tier: str, fewest: int, most: int) -> None:
    assert fewest <= len(cases(tier)) <= most


@pytest.mark.parametrize("tier", ["smoke", "ci", "nightly"])
def test_covers_are_complete_and_everything_selected_can_run(tier: str) -> None:
    for expansion in expansions(tier):
        if expansion.coverage is not None:
            assert expansion.coverage.covered == expansion.coverage.feasible
        assert len({case_id(case) for case in expansion.cases}) == len(expansion.cases)
        assert len(expansion.lines) == len(expansion.cases)
    for case in cases(tier):
        assert contracts()[case.kernel].unsupported(case) is None, case_id(case)
        assert law_refusal(case) is None, case_id(case)
        assert placement_refusal(case) is None, case_id(case)


def test_names_are_those_of_the_files_so_that_ids_differ_between_matrices() -> None:
    assert [e.matrix.name for e in expansions("smoke")] == [path.stem for path in MATRICES]


def test_smoke_is_small_enough_for_an_interpreter() -> None:
    def tiles(case: Case) -> int:
        lens = zip(case.rows.query_lens, case.rows.seq_lens, strict=True)
        return case.num_q_heads * sum(-(-q // 64) * -(-max(s, 1) // 64) for q, s in lens)

    costs = sorted(tiles(case) for case in cases("smoke"))
    assert costs[len(costs) // 2] <= 64
    assert sum(costs) <= 18_000


LOUD_LAWS = ("needle_edges", "rising", "falling", "large", "biased", "bar_codes")
FEATURES: dict[str, Callable[[Case], bool]] = {
    "sliding window": lambda c: c.sliding_window is not None,
    "soft cap": lambda c: c.logits_soft_cap is not None,
    "ALiBi": lambda c: c.alibi,
    "sinks": lambda c: c.sinks,
    "no causal mask": lambda c: not c.causal,
    "fp8 e4m3": lambda c: c.kv_dtype == "fp8_e4m3",
    "fp8 e5m2": lambda c: c.kv_dtype == "fp8_e5m2",
    "bfloat16": lambda c: c.dtype == "bf16",
    "float32": lambda c: c.dtype == "fp32",
    "needles": lambda c: c.data == "needle",
    "probe": lambda c: c.data == "probe",
    "negative scores": lambda c: c.data == "negative",
    "outliers": lambda c: c.data == "outliers",
    "uniform": lambda c: c.data == "uniform",
    **{law: lambda c, law=law: c.data == law for law in LOUD_LAWS},  # type: ignore[misc]
    "strided cache": lambda c: c.strides == "cache",
    "strided everything": lambda c: c.strides == "all",
    "page ids out of range": lambda c: c.table_padding == "out_of_range",
    "exactly sized table": lambda c: c.table_padding == "exact",
    "V of another head size": lambda c: c.head_size_v is not None,
    "rows without keys": lambda c: min(c.rows.context_lens) < 0,
    "vllm_classic": lambda c: c.layout == "vllm_classic",
    **{f"page {size}": lambda c, s=size: c.page_size == s for size in (1, 16, 24, 32, 544)},  # type: ignore[misc]
}
EVERYWHERE = {f"gqa {ratio}": lambda c, r=ratio: c.gqa_ratio == r for ratio in (1, 3, 5, 6, 7, 8, 17, 64)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_meets_every_feature_before_nightly(kernel: str) -> None:
    own = [case for case in cases("smoke") + cases("ci") if case.kernel == kernel]
    missing = [name for name, has in FEATURES.items() if not any(has(case) for case in own)]
    assert missing == []


@pytest.mark.parametrize("descales", ["quiet", "loud"])
def test_kernels_that_take_descales_by_page_get_them_in_smoke(descales: str) -> None:
    takers = {name for name, contract in contracts().items() if "page" in contract.descales_per}
    assert takers == {"torch_sdpa_paged", "unified_paged", "batch_prefill", "batch_prefill_v2", "batch_prefill_v3"}
    by_page = [case for case in cases("smoke") if case.descales_per == "page"]
    assert {case.kernel for case in by_page if case.descales == descales} == takers


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_meets_every_group_size(kernel: str) -> None:
    own = [case for case in cases("smoke") + cases("ci") + cases("nightly") if case.kernel == kernel]
    assert [name for name, has in EVERYWHERE.items() if not any(has(case) for case in own)] == []


def test_the_contexted_kv_sweep_is_there_in_full_and_at_full_size() -> None:
    own = [case for case in cases("nightly") if case.matrix == "contexted_kv"]
    cells = Counter(
        (c.kernel, c.gqa_ratio, c.head_size, c.kv_dtype, c.sliding_window) for c in own if c.num_q_heads == 64
    )
    assert len(cells) == 2 * 2 * 2 * 3 * 3
    assert {case.rows.num_seqs for case in own} == {10}
    assert all(case.rows.query_lens[-1] == 1 and case.page_size == 32 for case in own)
    assert max(max(case.rows.seq_lens) for case in own) > 1500


def test_decisive_values_are_in_edges() -> None:
    own = [case for case in cases("smoke") if case.matrix == "edges"]
    query_lens = {q for case in own for q in case.rows.query_lens}
    assert query_lens >= {1, 2, 127, 128, 129, 193, 261}
    phases = {(s + 1) % c.page_size for c in own if c.page_size > 1 for s in c.rows.seq_lens}
    assert phases >= {0, 1}, "seq_len modulo page_size of -1 and 0"
    assert {case.page_size for case in own} >= {1, 24, 256, 544}
    assert any(case.sliding_window == 1 for case in own)
    assert {case.placement.kind for case in own} >= {"shuffled", "reversed", "shared_prefix", "explicit"}
