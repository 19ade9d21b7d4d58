"""An engine of many steps: right kernels pass, and the first wrong step is told with its request, position and page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.registry import find_kernels
from harness.run.audit import Job, audit_case
from harness.run.observe import Demand
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT, PLANTS, Plant
from harness.run.run_case import Options, run_case
from harness.run.serving import make_engine, serve

KERNELS = find_kernels([Path(__file__).parent / "writers"])
SEEN = ("output_zero", "newest_token", "causal_edge", "page_swap")
CASE = Case(
    "serving",
    "torch_sdpa_paged",
    Rows("three", (8, 5, 3), (20, 5, 30)),
    kv_dtype="fp8_e4m3",
    num_q_heads=4,
    gqa_ratio=2,
    head_size=16,
    page_size=8,
    writer="torch_writer",
    steps=20,
)
TRITON = replace(CASE, kernel="unified_paged", writer="cache_writer", steps=8)


def run(case: Case, plant: Plant = NO_PLANT, *, checks: bool = True, demand: Demand | None = None) -> Verdict:
    options = Options(device="cpu", plant=plant, contract_checks=checks, demand=demand or Demand())
    return run_case(case, KERNELS[case.kernel], options)


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"kv_dtype": "auto", "dtype": "bf16", "strides": "all", "tail": "loud", "page_table": "kv_indices"},
        {"layout": "vllm_classic", "descales_per": "page", "data": "probe", "sliding_window": 11},
        {"layout": "vectorized", "page_size": 16, "data": "needle", "table_padding": "out_of_range"},
        {"num_pages": 15, "alibi": True, "sinks": True, "geometry_seed": 3},
    ],
)
def test_right_kernels_serve_twenty_steps(axes: dict[str, object]) -> None:
    verdict = run(replace(CASE, **axes), demand=Demand(SEEN[:1]))  # type: ignore[arg-type]
    assert verdict.outcome is Outcome.PASS, verdict.reason
    assert verdict.ran == ("torch_writer", "torch_sdpa_paged")
    assert verdict.err_over_tol is not None


def test_the_kernels_of_the_tree_serve_with_their_accesses_traced() -> None:
    verdict = run(TRITON, demand=Demand(SEEN))
    assert verdict.outcome is Outcome.PASS, verdict.reason
    assert verdict.ran == ("cache_writer_kernel", "unified_paged_kernel")
    assert verdict.access == "traced"


TABLES = {
    "table-stale": ("block_table is that of step 12", "stale page: positions 0..7 of request 4", "from page 2 (freed)"),
    "table-reused": ("stale page: positions 0..7 of request 3", "from page 11 (reused by request 5)"),
}


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("name", TABLES)
def test_a_stale_page_is_named_with_all_who_had_it(name: str, checks: bool) -> None:
    verdict = run(CASE, PLANTS[name], checks=checks)
    assert verdict.outcome is (Outcome.TEST_BUG if checks else Outcome.FAIL), verdict.reason
    assert verdict.reason.startswith("step 1")
    assert all(word in verdict.reason for word in TABLES[name]), verdict.reason
    assert "'s in steps" in verdict.reason
    assert verdict.explanation is not None
    assert verdict.explanation["rows"]["step"][0] in ("step 11 of 20", "step 13 of 20")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slot-of-another", ("step 11 of 20", "(sequence 0, position 28)", "page 3, offset 4", "holds the token of")),
        ("slot-skipped", ("step 11 of 20", "(sequence 2, position ", "was not stored")),
        ("slot-off-by-one", ("step 11 of 20", "(sequence 0, position 28)", "was not stored")),
    ],
)
def test_a_wrong_write_is_named_with_its_step_and_whose_the_page_was(name: str, words: tuple[str, ...]) -> None:
    checked = run(CASE, PLANTS[name])
    assert checked.outcome is Outcome.TEST_BUG
    assert "step 11 of 20: before launch: slot_mapping: expected" in checked.reason
    verdict = run(CASE, PLANTS[name], checks=False)
    assert verdict.outcome is Outcome.FAIL
    assert all(word in verdict.reason for word in words), verdict.reason
    assert verdict.explanation is not None
    rows = verdict.explanation["rows"]
    assert rows["step"][1] == "sequence 0 is request 3, decodes: query_len 1, context 28"
    assert any("then request" in line for line in rows["pages"])


@pytest.mark.parametrize("name", ["index-int64", "cumsum-int64", "zero-pool", "scale-one", "slot-int32"])
def test_the_other_plants_get_what_they_name(name: str) -> None:
    verdict = run(CASE, PLANTS[name])
    assert verdict.outcome.value == PLANTS[name].expected, verdict.reason


@pytest.mark.parametrize("writer", ["token_skipped", "next_slot", "slots_exchanged", "no_saturation"])
def test_a_wrong_writer_fails_in_the_first_step_that_it_spoils(writer: str) -> None:
    verdict = run(replace(CASE, writer=writer))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.reason.startswith(f"step 1 of 20: writer {writer}: ")


def test_a_fault_that_no_step_shows_is_blind_and_so_says_the_audit() -> None:
    case = replace(CASE, data="tiny", kv_dtype="auto", dtype="bf16", steps=3)
    demand = Demand(("newest_token", "output_zero"), margin=1e9)
    verdict = run(case, demand=demand)
    assert verdict.outcome is Outcome.BLIND
    assert "newest_token" in verdict.reason
    row = audit_case(Job(case, KERNELS[case.kernel], demand))
    assert row.blind
    assert set(row.unseen) == {"newest_token", "output_zero"}
    assert not audit_case(Job(CASE, KERNELS[CASE.kernel], Demand(SEEN))).blind


@pytest.mark.parametrize("later", [Outcome.PASS, Outcome.FAIL])
def test_an_elevated_step_hides_no_later_one(later: Outcome) -> None:
    engine = make_engine(replace(CASE, steps=4), KERNELS[CASE.kernel], NO_PLANT, torch.device("cpu"), checked=False)
    outcomes = iter((Outcome.PASS, Outcome.ELEVATED, later, Outcome.PASS))
    verdict = serve(engine, Demand(), lambda contract, setup: Verdict(next(outcomes), "said"))
    expected = (Outcome.ELEVATED, "step 2 of 4: said") if later is Outcome.PASS else (later, "step 3 of 4: said")
    assert (verdict.outcome, verdict.reason) == expected


def test_a_blind_step_says_why_in_its_report() -> None:
    verdict = run(replace(CASE, descales_per="page", descales="equal", steps=2))
    assert verdict.outcome is Outcome.BLIND
    assert verdict.explanation is not None
    assert "all descales are equal" in verdict.explanation["rows"]["reason"][0]
