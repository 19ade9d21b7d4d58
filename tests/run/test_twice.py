"""A second launch in another order of programs: other bits are seen, equal ones raise no alarm."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.registry import find_kernels
from harness.run.outcome import Outcome
from harness.run.run_case import Options, run_case
from harness.run.twice import bit_difference
from tests.plugin.test_session import KERNELS

CASE = Case(
    matrix="twice", kernel="toy_honest", rows=Rows("mix", (3, 1), (5, 20)), dtype="fp32", num_q_heads=4, gqa_ratio=2,
    head_size=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "twice", "outcome"),
    [
        ("toy_honest", True, Outcome.PASS),
        ("toy_wavering", True, Outcome.NONDETERMINISTIC),
        ("toy_wavering", False, Outcome.PASS),  # within its tolerance both times
    ],
)
def test_other_bits_are_seen(kernel: str, twice: bool, outcome: Outcome) -> None:
    contract = find_kernels([KERNELS])[kernel]
    verdict = run_case(dataclasses.replace(CASE, kernel=kernel), contract, Options(device="cpu", twice=twice))
    assert verdict.outcome is outcome
    if outcome is Outcome.NONDETERMINISTIC:
        assert "out: 1 of 128 elements differ, the first at token 1, head 2, dim 3" in verdict.reason


@pytest.mark.parametrize("kernel", ["unified_paged", "prefix_prefill"])
def test_honest_kernels_give_the_same_bits_in_any_order(kernel: str) -> None:
    case = dataclasses.replace(CASE, kernel=kernel, dtype="bf16", head_size=16, kv_dtype="fp8_e4m3", num_splits=None)
    verdict = run_case(case, find_kernels()[kernel], Options(device="cpu", twice=True))
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")
    assert verdict.seconds is not None
    assert "again" in verdict.seconds


def test_bits_are_compared_not_values() -> None:
    zeros, nan = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    assert bit_difference(nan, nan.clone()) is None
    assert bit_difference(zeros, -zeros) == "6 of 6 elements differ, the first at token 0, head 0: 0 and -0"
