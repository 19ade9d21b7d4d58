"""Sink tokens of whole cases: faults of the kernel fail and are named, one of the set-up stops before the launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Case, Rows
from harness.run.observe import Demand
from harness.run.outcome import Outcome
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case
from tests.access.faulty import KERNELS, faulty

CASE = Case(
    "m", "unified_paged", Rows("mix", (20, 1), (60, 90)), num_q_heads=4, gqa_ratio=2, head_size=32, sliding_window=16,
    sink_tokens=4,
)  # fmt: skip
SEEN = "CAUSAL, sink_tokens)"
FAULTS = {
    "dropped": (SEEN, "CAUSAL, 0)", "the leading tokens that a window must not hide (sink_tokens) are not read"),
    "one more": (SEEN, "CAUSAL, sink_tokens + 1)", "one key too many is read behind the sink tokens"),
    "one less": (SEEN, "CAUSAL, sink_tokens - 1)", ""),
    "beyond the causal edge": (f"{SEEN}\n", f"{SEEN} | (key[None, :] < sink_tokens)\n", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_kernel_fails_and_is_named(tmp_path: Path, fault: str) -> None:
    old, new, cause = FAULTS[fault]
    rows = Rows("early", (3, 1), (0, 90)) if fault == "beyond the causal edge" else CASE.rows
    options = Options(device="cpu", demand=Demand(("sink_tokens", "causal_edge")), access_trace=False)
    assert run_case(replace(CASE, rows=rows), KERNELS["unified_paged"], options).outcome is Outcome.PASS
    verdict = run_case(replace(CASE, rows=rows), faulty("unified_paged", tmp_path, old, new), options)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.explanation is not None
    if cause:
        assert verdict.explanation["rows"]["looks like"] == [cause]


@pytest.mark.parametrize("data", ["probe", "needle_edges", "bar_codes"])
def test_honest_kernels_pass_on_every_law_and_see_the_fault(data: str, tmp_path: Path) -> None:
    for kernel in ("unified_paged", "torch_sdpa_paged"):
        case = replace(CASE, kernel=kernel, data=data)
        assert run_case(case, KERNELS[kernel], Options(device="cpu")).outcome is Outcome.PASS
    dropped = faulty("unified_paged", tmp_path, *FAULTS["dropped"][:2])
    verdict = run_case(replace(CASE, data=data), dropped, Options(device="cpu", access_trace=False))
    assert verdict.outcome is Outcome.FAIL


def test_bar_codes_name_the_token_that_was_dropped(tmp_path: Path) -> None:
    one_less = faulty("unified_paged", tmp_path, *FAULTS["one less"][:2])
    case = replace(CASE, rows=Rows("decode", (1,), (90,)), data="bar_codes", head_size=64)
    verdict = run_case(case, one_less, Options(device="cpu", access_trace=False))
    assert verdict.explanation is not None
    assert any("the last sink token attended 0 times" in line for line in verdict.explanation["rows"]["attended"])


def test_another_number_than_that_of_the_case_is_a_test_bug() -> None:
    plant = replace(NO_PLANT, arguments=lambda args: replace(args, sink_tokens=5))
    verdict = run_case(CASE, KERNELS["unified_paged"], Options(device="cpu", plant=plant))
    assert verdict.outcome is Outcome.TEST_BUG
    assert "sink_tokens: expected 4, as the case says, got 5" in verdict.reason


def test_a_kernel_without_the_feature_does_not_run_the_case() -> None:
    verdict = run_case(replace(CASE, kernel="prefix_prefill"), KERNELS["prefix_prefill"], Options(device="cpu"))
    assert verdict.outcome is Outcome.UNSUPPORTED
    assert verdict.reason.startswith("sink_tokens (")


def test_a_case_on_which_sink_tokens_weigh_nothing_is_blind() -> None:
    demand = Demand(("sink_tokens",))
    case = replace(CASE, data="rising", rows=Rows("decode", (1,), (200,)), dtype="bf16")
    verdict = run_case(case, KERNELS["unified_paged"], Options(device="cpu", demand=demand))
    assert verdict.outcome is Outcome.BLIND
    assert "sink_tokens" in verdict.reason
