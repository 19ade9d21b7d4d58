"""Tier 2 of a whole case: a fault below the tolerance of every element fails, is named, and reads well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.case import Case, Rows
from harness.kernel.numerics import NumericsProfile
from harness.oracle.gains import HEAD_MODULO, K_DESCALE, V_DESCALE, Gain, GainFindings, HullFindings
from harness.run.outcome import Outcome
from harness.run.run_case import Options, run_case
from harness.triage.gains import gain_summary, tell_gains, tell_hull
from tests.run.test_twin import contract

TIGHT = NumericsProfile(kv_dequant="exact", p_dtype="bf16", mma="mma_sync")
CASE = Case(
    "m", "drift", Rows("mix", (64, 1), (192, 300)), dtype="bf16", num_q_heads=8, gqa_ratio=4, head_size=64, page_size=64
)
QUANTISED = replace(CASE, kv_dtype="fp8_e4m3")


def test_what_only_tier_2_sees_fails() -> None:
    verdict = run_case(CASE, replace(contract("one_page"), numerics=TIGHT), Options(device="cpu"))
    assert verdict.err_over_tol is not None
    assert verdict.err_over_tol < 1
    assert verdict.z is not None
    assert verdict.z > 7
    assert verdict.outcome is Outcome.FAIL
    assert verdict.explanation is not None
    rows = verdict.explanation["rows"]
    assert "wrong" not in rows
    assert rows["token/page"][0].startswith("V of page ")
    assert "(slot 1), sequence 0, kv head 1: x1.00" in rows["token/page"][0]
    assert rows["looks like"] == ["a wrong gain on V of that page, or other tokens in their place"]
    assert verdict.reason == rows["token/page"][0]
    assert verdict.explanation["gains"]["found"][0]["slot"] == 1


def test_an_honest_kernel_passes_both() -> None:
    verdict = run_case(CASE, replace(contract("honest"), numerics=TIGHT), Options(device="cpu"))
    assert verdict.outcome is Outcome.PASS
    assert verdict.z is not None
    assert verdict.z < 5


@pytest.mark.parametrize("data", ["uniform", "needle"])
def test_structured_data_have_no_tier_2(data: str) -> None:
    verdict = run_case(replace(CASE, data=data), contract("honest"), Options(device="cpu"))
    assert verdict.outcome is Outcome.PASS
    assert verdict.z is None


def test_gains_in_words() -> None:
    page = Gain(K_DESCALE, 0.0171, 38.0, kv_head=0, sequence=2, slot=3, page=4097)
    found = GainFindings(z=38.0, num_statistics=10, gains=(page,), num_gains=1)
    assert gain_summary(CASE, found) == "K of page 4097 (slot 3), sequence 2, kv head 0: x1.0171 (z 38)"
    assert tell_gains(QUANTISED, found)["looks like"] == ["a wrong K descale of that page"]
    everywhere = tuple(Gain(K_DESCALE, 0.005, 20.0, kv_head=head) for head in (0, 1))
    found = GainFindings(z=20.0, num_statistics=10, gains=everywhere, num_gains=2)
    assert tell_gains(QUANTISED, found)["looks like"] == ["a wrong softmax scale or K descale"]
    one_head = replace(found, gains=everywhere[:1], num_gains=1)
    assert tell_gains(QUANTISED, one_head)["looks like"] == ["a wrong K descale of that kv head"]
    lost = Gain(V_DESCALE, -1.0, 90.0, kv_head=0, sequence=0, slot=0, page=7)
    assert "are not read" in tell_gains(CASE, replace(found, source=lost))["looks like"][0]
    mapped = Gain(HEAD_MODULO, 1.0, 900.0, kv_head=1, sequence=0)
    assert tell_gains(CASE, replace(found, source=mapped))["looks like"] == [
        "kv head = q head % num_kv_heads, instead of q head // gqa_ratio"
    ]
    assert tell_gains(CASE, GainFindings()) == {}


@pytest.mark.parametrize("kind", [K_DESCALE, V_DESCALE])
@pytest.mark.parametrize("slot", [None, 3])
@pytest.mark.parametrize("heads", [(0,), (0, 1)])
def test_a_cache_without_descales_has_no_wrong_one(kind: str, slot: int | None, heads: tuple[int, ...]) -> None:
    told = tuple(Gain(kind, 0.5, 20.0, kv_head=head, slot=slot, page=slot) for head in heads)
    for case, named in ((CASE, False), (QUANTISED, True)):
        assert ("descale" in tell_gains(case, GainFindings(gains=told))["looks like"][0]) is named


def test_the_hull_in_words() -> None:
    assert tell_hull(HullFindings(num_elements=9)) == []
    told = tell_hull(HullFindings(2, 9, 4, 3, 7, 40.0, -1.5, 2.25))
    assert told[0] == "2 elements outside the range of the values attended to"
    assert told[1] == "token 4, head 3, dim 7: got 40, the values lie within -1.5 to 2.25"
