"""Steps between pages in a large pool: honest kernels are green in megabytes, and the wrong page is red and named."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.case import Case, Rows
from harness.matrix.loading import load
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import PLANTS
from harness.run.run_case import Options, run_case
from harness.session import PROJECT
from tests.run.boundary_faults import KERNELS, mutated

CPU = Options(device="cpu")
PAGE = "page = tl.load(table_row + key // page_size, mask=cached, other=0)"
DESCALE = "_descale = page.to(tl.int64)"  # of K and of V
FIRST = "tl.load(table_row + key * 0, mask=cached, other=0)"


@functools.cache
def shipped() -> dict[str, Case]:
    """Cases of the ci tier by the name of their placement."""
    matrix = load(PROJECT / "cases" / "page_transitions.yaml", kernel_names=KERNELS)
    return {case.placement.name: case for case in matrix.expand("ci", supported=lambda case: None).cases}


def small(placement: str) -> Case:
    """The same with pages of 64 tokens."""
    rows = Rows("small", (8,), (64 * len(shipped()[placement].placement.pages[0]) - 8,))
    return replace(shipped()[placement], rows=rows, page_size=64, head_size=64, num_q_heads=2)


class Wrong(NamedTuple):
    old: str
    new: str
    seen: dict[str, str]  # by placement: what the report says
    unseen: tuple[str, ...] = ()  # placements on which it changes nothing


WRONG = {
    "the next page": Wrong(
        PAGE,
        f"{PAGE} + 1",
        {"on_4096_4097": "unused page: K and V of page 4098", "on_4096_4096": "unused page: K and V of page 4097"},
    ),
    "the first page again": Wrong(
        PAGE,
        f"page = {FIRST}",
        {"on_4096_4097": "(page 4097, slot 0)", "on_4096_4098": "(page 4098, slot 0)"},
        ("on_4096_4096", "on_4096"),
    ),
    "the descales of the neighbour": Wrong(
        DESCALE,
        "_descale = (page ^ 1).to(tl.int64)",
        {
            "on_4096_4097": "1,024 elements",
            "on_4095_4096": "descales of page 4094",
            "on_4096_4096": "descales of page 4097",
        },
    ),
    "the descales of the first page": Wrong(
        DESCALE, f"_descale = {FIRST}.to(tl.int64)", {"on_4097_4098": "(page 4098)"}, ("on_4096_4096",)
    ),
}


def told(verdict: Verdict) -> str:
    return " | ".join([verdict.reason, *(verdict.explanation or {}).get("rows", {}).get("accesses", [])])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_page_is_red_and_named(name: str, tmp_path: Path) -> None:
    old, new, seen, unseen = WRONG[name]
    faulty = mutated(KERNELS["unified_paged"], old, new, tmp_path)
    for placement in (*seen, *unseen):
        verdict = run_case(small(placement), faulty, CPU)
        assert verdict.outcome is (Outcome.PASS if placement in unseen else Outcome.FAIL), told(verdict)
        assert seen.get(placement, "") in told(verdict)


@pytest.mark.parametrize(
    "new", ["(page * stride_page.to(tl.int32)).to(tl.int64)", "(page.to(tl.uint32) * stride_page.to(tl.uint32))"]
)
def test_an_offset_that_wraps_at_page_4096_reads_page_0(new: str, tmp_path: Path) -> None:
    case = replace(shipped()["on_4096"], rows=Rows("decode", (1,), (1023,)))
    honest = run_case(case, KERNELS["unified_paged"], CPU)
    assert (honest.outcome, honest.reason) == (Outcome.PASS, "")
    assert honest.memory is not None
    assert honest.memory["pool"] == "aliased"
    assert honest.memory["address_bytes"] > 9 << 30
    assert honest.memory["physical_bytes"] < 32 << 20
    faulty = mutated(KERNELS["unified_paged"], "page.to(tl.int64) * stride_page", new, tmp_path)
    verdict = run_case(case, faulty, CPU)
    assert verdict.outcome is Outcome.FAIL
    assert "unused page: K and V of page 0" in told(verdict)


@pytest.mark.parametrize("placement", ["on_4096_4096", "on_4095_4096"])
def test_dense_and_aliased_pools_give_the_same_verdict(placement: str) -> None:
    case = small(placement)
    for pool in ("dense", "aliased"):
        verdict = run_case(replace(case, pool=pool), KERNELS[case.kernel], CPU)
        assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")
        assert verdict.memory is not None
        assert verdict.memory["pool"] == pool


def test_a_second_launch_and_a_twin_take_a_page_held_twice() -> None:
    case = replace(small("on_4096_4096"), num_splits=2)
    verdict = run_case(case, KERNELS[case.kernel], replace(CPU, twice=True, noise_floor="fail"))
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")


def test_a_pool_of_zeros_is_a_fault_of_the_set_up() -> None:
    case = small("on_4096_4097")
    verdict = run_case(case, KERNELS[case.kernel], replace(CPU, plant=PLANTS["zero-pool"]))
    assert verdict.outcome is Outcome.TEST_BUG
