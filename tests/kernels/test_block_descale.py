"""Kernels that take descales by page: honest ones pass, and every mix-up of loud descales fails by the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.case import Case, Placement, Rows
from harness.interpreter import prepare
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case
from tests.kernels.paged_problem import with_fault

prepare("cpu")

KERNELS = {name: find_kernels()[name] for name in ("torch_sdpa_paged", "unified_paged")}
ROWS = Rows("r", (5, 1, 7, 1), (40, 60, -3, 100))
CASE = Case("m", "k", ROWS, kv_dtype="fp8_e4m3", descales_per="page", num_q_heads=4, gqa_ratio=2, head_size=24)
Change = Callable[[LaunchArguments], LaunchArguments]


def run(case: Case, contract: Contract, change: Change = lambda args: args, *, checked: bool = True) -> Verdict:
    """The verdict on `contract`'s kernel where it is handed `change(arguments)`, `checked` before the launch or not."""
    plant = replace(NO_PLANT, arguments=change)
    return run_case(case, contract, Options(device="cpu", plant=plant, contract_checks=checked))


@pytest.mark.parametrize("layout", ["linear_nhd", "vllm_classic"])
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_honest_kernels_pass(kernel: str, dtype: str, kv_dtype: str, layout: str) -> None:
    for descales, extra in (
        ("loud", {"strides": "all", "sliding_window": 17}),
        ("quiet", {"page_size": 24, "num_splits": 3 if kernel == "unified_paged" else None}),
    ):
        case = replace(CASE, dtype=dtype, kv_dtype=kv_dtype, layout=layout, descales=descales, **extra)
        verdict = run(case, KERNELS[kernel])
        assert verdict.outcome is Outcome.PASS, verdict.reason


@pytest.mark.parametrize("kernel", KERNELS)
def test_honest_kernels_pass_on_shared_pages_needles_and_pages_of_any_size(kernel: str) -> None:
    for case in (
        replace(CASE, rows=Rows("r", (5, 1, 3), (40, 60, 33)), placement=Placement("shared_prefix", "shared")),
        replace(CASE, data="needle_edges", page_size=1, head_size=64),
        replace(CASE, page_size=544, data="bar_codes", table_padding="out_of_range"),
    ):
        verdict = run(case, KERNELS[kernel])
        assert verdict.outcome is Outcome.PASS, verdict.reason


def _block(edit: Callable[[torch.Tensor, torch.Tensor], None]) -> Change:
    """Arguments with `edit` (descales [pages, kv_heads, 2], pages of the longest sequence) applied."""

    def change(args: LaunchArguments) -> LaunchArguments:
        assert args.kv_block_descale is not None
        block, seq = args.kv_block_descale.clone(), int(args.seq_lens.argmax())
        edit(block, args.block_table[seq, : int(args.seq_lens[seq]) // 16].long())
        return replace(args, kv_block_descale=block)

    return change


def _neighbour(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages[1]] = block[pages[0]]


def _neighbour_of_k(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages[1:], :, 0] = block[pages[:-1], :, 0]


def _other_head(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages] = block[pages].flip(1)


def _exchanged(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages] = block[pages].flip(2)


def _k_dropped(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages, :, 0] = 1.0


def _v_dropped(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages, :, 1] = 1.0


def _one_page_of_one_head_dropped(block: torch.Tensor, pages: torch.Tensor) -> None:
    block[pages[2], 1, 1] = 1.0


@pytest.mark.parametrize("data", ["normal", "probe"])
@pytest.mark.parametrize(
    "fault",
    [_neighbour, _neighbour_of_k, _other_head, _exchanged, _k_dropped, _v_dropped, _one_page_of_one_head_dropped],
)
def test_mixed_up_descales_exceed_the_tolerance(fault: Callable[[torch.Tensor, torch.Tensor], None], data: str) -> None:
    for dtype in ("fp16", "bf16"):
        for seed in range(3):
            case = replace(CASE, dtype=dtype, data=data, data_seed=seed)
            verdict = run(case, KERNELS["torch_sdpa_paged"], _block(fault), checked=False)
            assert verdict.outcome is Outcome.FAIL
            assert verdict.err_over_tol is not None
            assert verdict.err_over_tol > 8


def test_quiet_descales_nearly_hide_what_loud_ones_show() -> None:
    ratios = {}
    for descales in ("quiet", "loud"):
        verdict = run(replace(CASE, descales=descales), KERNELS["torch_sdpa_paged"], _block(_neighbour), checked=False)
        ratios[descales] = verdict.err_over_tol or 0.0
    assert ratios["loud"] > 10 * ratios["quiet"]


def test_what_is_handed_over_is_checked() -> None:
    contract = KERNELS["unified_paged"]
    for change, words in (
        (
            lambda a: replace(a, kv_block_descale=None),
            "kv_block_descale: expected a tensor, as descales are per page, got None",
        ),
        (lambda a: replace(a, k_scale=torch.ones(1)), "k_scale: expected NaN, as descales come by page"),
        (
            lambda a: replace(a, kv_block_descale=a.kv_block_descale.half()),
            "expected float32 on cpu, got float16 on cpu",
        ),
        (lambda a: replace(a, kv_block_descale=a.kv_block_descale[:-1]), "expected shape ["),
        (_block(lambda block, pages: block[pages[1], 1].fill_(0.0)), "expected a finite descale above 0 for page"),
        (_block(lambda block, pages: block.fill_(torch.nan)), "expected a finite descale above 0 for page"),
        (_block(_neighbour), "kv_block_descale: expected the values that were built for this case"),
    ):
        verdict = run(CASE, contract, change)
        assert verdict.outcome is Outcome.TEST_BUG
        assert words in verdict.reason
    plain = replace(CASE, descales_per="tensor")
    verdict = run(plain, contract, lambda a: replace(a, kv_block_descale=torch.ones(a.k_cache.shape[0], 2, 2)))
    assert "expected None, as descales are per tensor, got a tensor" in verdict.reason


def test_kernels_without_the_argument_do_not_support_descales_by_page() -> None:
    for name, contract in find_kernels().items():
        case = replace(CASE, rows=Rows("r", (1,), (40,)))
        if contract.q_as_kv:
            case = replace(case, dtype="bf16", q_dtype="fp8_e4m3", head_size=64, page_size=1024)
        clause = contract.unsupported(case)
        takes = "page" in contract.descales_per
        assert takes == (name in KERNELS or name.startswith("batch_prefill"))
        assert (clause is None) == takes
        assert takes or "descales_per page" in str(clause)
        assert contract.unsupported(replace(case, descales_per="tensor")) is None


# name: (source, what it becomes)
FAULTS = {
    "stale page's descale": (
        "k_descale = page.to(tl.int64) * k_descale_page",
        "k_descale = tl.load(table_row + tl.maximum(key - BLOCK_N, 0) // page_size, mask=cached, other=0).to("
        "tl.int64) * k_descale_page",
    ),
    "page of the first key of the tile": (
        "k_descale = page.to(tl.int64) * k_descale_page",
        "k_descale = tl.load(table_row + (key * 0 + tile_start) // page_size).to(tl.int64) * k_descale_page",
    ),
    "logical page instead of the physical one": (
        "v_descale = page.to(tl.int64) * v_descale_page",
        "v_descale = (key // page_size).to(tl.int64) * v_descale_page",
    ),
    "query head for KV head": (
        "+ kv_head * v_descale_head\n            v_",
        "+ tl.min(head) % 2 * v_descale_head\n            v_",
    ),
    "K's descale for V": ("v_descale_ptr + v_descale, mask", "k_descale_ptr + v_descale, mask"),
    "contiguous strides": ("k_descale.page, k_descale.slot,", "2 * num_kv_heads, k_descale.slot,"),
    "V not scaled": ("(payload_values(v, CACHE_MANTISSA) * v_scale)", "payload_values(v, CACHE_MANTISSA)"),
}


@pytest.mark.parametrize(("old", "new"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_shows(tmp_path: Path, old: str, new: str) -> None:
    contract = KERNELS["unified_paged"]
    case = replace(CASE, rows=Rows("r", (5, 1), (40, 100)), strides="cache")
    assert run(case, contract).outcome is Outcome.PASS
    with_fault(contract, tmp_path, old, new)
    assert contract.folder is not None
    assert run(case, replace(contract, folder=tmp_path / contract.folder.name)).outcome is Outcome.FAIL
