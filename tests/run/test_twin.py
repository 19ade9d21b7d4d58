"""The noise floor: a paging fault that every tolerance lets pass is elevated over the twin, an honest kernel is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.cache.content import Content
from harness.case import Case, Placement, Rows
from harness.kernel.contract import Contract
from harness.kernel.numerics import NumericsProfile
from harness.run.outcome import Outcome
from harness.run.run_case import Options, run_case
from harness.run.twin import ELEVATED, noise_floor, twin_case

ROWS = Rows("mix", (8, 1, 20), (40, 60, 0))
CASE = Case("m", "drift", ROWS, dtype="fp32", num_q_heads=4, gqa_ratio=2, head_size=32, page_size=16)


def contract(function: str, page_sizes: frozenset[int] | None = None) -> Contract:
    """Far too loose a profile, as one declares who does not know: P in bfloat16."""
    return Contract(
        name="drift",
        about="attention in float32",
        entry=f"tests.run.drifting:{function}",
        content=Content.ALL,
        features=frozenset({"prefill", "softmax_scale"}),
        layouts=frozenset({"linear_nhd"}),
        page_sizes=page_sizes,
        returns_lse=False,
        numerics=NumericsProfile(kv_dequant="exact", p_dtype="bf16", mma="mma_sync"),
    )


@pytest.mark.parametrize(
    ("floor", "outcome"), [("off", Outcome.PASS), ("report", Outcome.ELEVATED), ("fail", Outcome.FAIL)]
)
def test_a_small_fault_at_page_transitions_is_elevated(floor: str, outcome: Outcome) -> None:
    verdict = run_case(CASE, contract("drifting"), Options(device="cpu", noise_floor=floor))
    assert verdict.outcome is outcome
    assert verdict.err_over_tol is not None
    assert verdict.err_over_tol < 1  # within tier 1
    assert verdict.z is not None
    assert verdict.z < 7  # and tier 2
    if floor != "off":
        assert "of the twin with one page per sequence" in verdict.reason
        assert verdict.explanation is not None
        assert verdict.explanation["rows"]["elevated"] == [verdict.reason]
    assert verdict.outcome.is_failure is (floor == "fail")


@pytest.mark.parametrize("seed", range(4))
def test_an_honest_kernel_is_not_elevated(seed: int) -> None:
    case = replace(CASE, data_seed=seed, geometry_seed=seed)
    verdict = run_case(case, contract("honest"), Options(device="cpu", noise_floor="fail"))
    assert verdict.outcome is Outcome.PASS
    assert verdict.explanation is None


@pytest.mark.parametrize("data", ["normal", "outliers", "probe"])
@pytest.mark.parametrize("descales_per", ["tensor", "page"])
def test_in_tree_kernels_are_not_elevated(data: str, descales_per: str) -> None:
    from harness.kernel.registry import find_kernels

    case = replace(CASE, kernel="torch_sdpa_paged", dtype="bf16", kv_dtype="fp8_e4m3")
    case = replace(case, descales_per=descales_per, data=data)
    verdict = run_case(case, find_kernels()["torch_sdpa_paged"], Options(device="cpu", noise_floor="fail"))
    assert verdict.outcome is Outcome.PASS
    assert verdict.explanation is None
    assert verdict.seconds is not None
    assert "twin" in verdict.seconds


def test_a_twin_that_fails_is_a_failure() -> None:
    verdict = run_case(CASE, contract("broken_on_one_page"), Options(device="cpu", noise_floor="report"))
    assert verdict.outcome is Outcome.FAIL
    assert "twin with page_size 64 fails" in verdict.reason


@pytest.mark.parametrize(
    ("case", "sizes", "why"),
    [
        (CASE, frozenset({16, 32}), "no page_size that drift admits holds 61 tokens"),
        (replace(CASE, page_size=64), None, "every sequence has one page already"),
        (replace(CASE, data="uniform"), None, "errors of structured data repeat"),
    ],
)
def test_what_has_no_twin_says_so(case: Case, sizes: frozenset[int] | None, why: str) -> None:
    verdict = run_case(case, contract("drifting", sizes), Options(device="cpu", noise_floor="fail"))
    assert verdict.outcome is Outcome.PASS
    assert verdict.explanation is not None
    assert verdict.explanation["rows"]["noise floor"] == [f"not measured: {why}"]


def test_twins_differ_in_paging_alone() -> None:
    case = replace(CASE, placement=Placement("explicit", "mine", ((3, 4, 5), (6, 7, 8, 9), (1, 2))))
    twin = twin_case(case, contract("honest"))
    assert not isinstance(twin, str)
    assert twin == replace(case, page_size=64, placement=Placement())


def test_the_rise_is_that_of_means_and_needs_a_floor() -> None:
    g = torch.Generator().manual_seed(0)
    floor = torch.randn(29, 4, 32, generator=g).square()
    assert noise_floor(CASE, floor * 0, floor * 0) is None
    honest = noise_floor(CASE, torch.randn(29, 4, 32, generator=g).square(), floor)
    assert honest is not None
    assert 0.8 < honest.ratio < 1.25
    one_wild_element = floor.clone()
    one_wild_element[12, 1, 3] = 30.0
    found = noise_floor(CASE, one_wild_element, floor)
    assert found is not None
    assert found.ratio < ELEVATED
    raised = floor.clone()
    raised[9:, 2:] *= 16.0  # sequence 2, kv head 1
    found = noise_floor(CASE, raised, floor)
    assert found is not None
    assert (found.sequence, found.kv_head) == (2, 1)
    assert found.ratio == pytest.approx(4.0)
