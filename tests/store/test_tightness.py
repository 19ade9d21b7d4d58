"""Tightness of profiles: judged over records, and the finer P dtype that an honest kernel must be seen to exceed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.kernel.numerics import UNKNOWN, NumericsProfile, PerKey, cost, tighter_p
from harness.oracle.finer import finer_tolerance
from harness.oracle.judge import judge
from harness.oracle.tolerance import rounding_of, tolerance
from harness.run.outcome import Outcome
from harness.store.record import Record
from harness.store.tightness import ProfileTightness, not_tight, tightness
from references.attention import attend
from tests.oracle.cases import make_case
from tests.oracle.emulated_kernel import run_emulated


def records(errors: list[float], finer: float | None = 2.0, **changes: object) -> list[Record]:
    """Cases of one kernel that pass on ordinary data."""
    common = {"matrix": "m", "matrix_path": "m.yaml", "line": 1, "tier": "ci", "kernel": "k", "reason": ""}
    values = {**common, "outcome": Outcome.PASS, "case": {"data": "normal", "dtype": "bf16"}} | changes
    return [Record(id=f"{i}", err_over_tol=e, tighter_err_over_tol=finer, **values) for i, e in enumerate(errors)]


@pytest.mark.parametrize(
    ("errors", "finer", "verdict", "reported"),
    [
        ([0.05] * 7 + [0.4], 1.5, "ok", False),
        ([0.05] * 7 + [0.4], None, "ok", False),
        ([0.05] * 7 + [0.09], 3.0, "too loose", True),
        ([0.05] * 7 + [0.09], None, "ok", False),  # P in float32
        ([0.04] * 8, None, "too loose", True),
        ([0.4] * 8, 0.9, "unproven", True),
        ([0.05] * 7, 3.0, "too loose", False),  # too few to hold it against the profile
    ],
)
def test_a_profile_is_judged_by_its_worst_case(
    errors: list[float], finer: float | None, verdict: str, reported: bool
) -> None:
    (one,) = tightness(records(errors, finer))
    assert (one.kernel, one.dtype, one.cases, one.worst, one.finer_worst) == (
        "k",
        "bf16",
        len(errors),
        max(errors),
        finer,
    )
    assert one.verdict == verdict
    assert one.text.startswith(verdict)
    assert [p.verdict for p in not_tight(records(errors, finer))] == ([verdict] if reported else [])


def test_only_ordinary_data_that_pass_count() -> None:
    loose = records([0.01] * 8)
    tight: list[Record] = [
        *records([0.5], case={"data": "probe", "dtype": "bf16"}),
        *records([0.5], outcome=Outcome.FAIL),
        *records([0.5], kernel="other"),
        *records([0.5], case={"data": "normal", "dtype": "fp16"}),
    ]
    assert [p.kernel for p in not_tight(loose + tight)] == ["k"]
    chosen = records([0.5], case={"data": "auto", "dtype": "bf16"}, law="normal")
    assert not_tight(loose + chosen) == []
    assert tightness([]) == []
    assert all(isinstance(p, ProfileTightness) for p in tightness(loose + tight))


FINER = {
    "bf16": (NumericsProfile(), "bf16"),
    "fp16": (NumericsProfile(), "fp16"),
    "fp8": (NumericsProfile(p_dtype="fp8_e4m3", p_scale=256.0, mma="mma_sync"), "bf16"),
    "fp8_unscaled": (NumericsProfile(p_dtype="fp8_e4m3", mma="mma_sync"), "fp16"),
    "summed": (NumericsProfile(sum_after_cast=True), "bf16"),
}


@pytest.mark.parametrize("name", FINER)
def test_the_finer_tolerance_is_exceeded_by_honest_kernels_and_met_by_finer_ones(name: str) -> None:
    profile, q_dtype = FINER[name]
    finer = tighter_p(profile, q_dtype)
    assert finer is not None
    for seed in range(2):
        inputs = make_case("normal", q_dtype, lengths=((32, 1), (400, 1200)), seed=seed)
        reference = attend(inputs, rounding_of(profile, q_dtype))
        bounded = finer_tolerance(reference, profile, q_dtype, 64)
        assert bounded is not None
        exact = tolerance(attend(inputs, rounding_of(finer, q_dtype)), finer, q_dtype, 64)
        assert bool((bounded.out >= exact.out * (1 - 1e-9)).all())
        assert float((bounded.out / exact.out).median()) < 1.6
        out, _ = run_emulated(inputs, profile, q_dtype)
        assert judge(out, None, reference, bounded).err_over_tol > 1
        out, _ = run_emulated(inputs, finer, q_dtype)
        assert judge(out, None, reference, bounded).err_over_tol < 1


def test_a_kernel_finer_than_declared_is_unproven() -> None:
    """P stays in float32 under a profile that declares bf16: no case fails, and tightness says so."""
    declared = NumericsProfile()
    inputs = make_case("normal", "bf16", lengths=((32,), (600,)))
    reference = attend(inputs, rounding_of(declared, "bf16"))
    out, _ = run_emulated(inputs, replace(declared, p_dtype="fp32", out_dtype="bf16"), "bf16")
    assert judge(out, None, reference, tolerance(reference, declared, "bf16", 64)).clean
    bounded = finer_tolerance(reference, declared, "bf16", 64)
    assert bounded is not None
    assert judge(out, None, reference, bounded).err_over_tol <= 1


def test_each_step_is_one_finer_and_float32_is_the_last() -> None:
    steps = [NumericsProfile(p_dtype="fp8_e5m2")]
    while (finer := tighter_p(steps[-1], "bf16")) is not None:
        steps.append(finer)
    assert [p.p_type("bf16") for p in steps] == ["fp8_e5m2", "fp8_e4m3", "bf16", "fp16", "fp32"]
    mixed = tighter_p(NumericsProfile(p_dtype=PerKey("fp8_e4m3", "q")), "bf16")
    assert mixed is not None
    assert mixed.p_dtype == PerKey("bf16", "fp16")
    assert tighter_p(UNKNOWN, "fp32") == replace(UNKNOWN, in32="exact")
    assert tighter_p(NumericsProfile(), "fp32") is None


def test_weights_folded_into_p_leave_a_finer_type_with_subnormals_open() -> None:
    inputs = replace(make_case("normal", "bf16"), weight_scale=torch.full((578, 2), 0.01))
    folded = NumericsProfile(p_fold_v=True)
    assert finer_tolerance(attend(inputs, rounding_of(folded, "bf16")), folded, "bf16", 64) is None


@pytest.mark.parametrize(
    ("profile", "q_dtype", "words"),
    [
        (NumericsProfile(), "bf16", "P in bf16: a fault must be 8 times as large as with P in fp16"),
        (NumericsProfile(p_dtype="fp8_e4m3"), "bf16", "P in fp8_e4m3: a fault must be 16 times"),
        (UNKNOWN, "fp32", "P in TF32"),
        (NumericsProfile(dot_reduce="bf16"), "bf16", "q . k summed in bf16"),
        (NumericsProfile(s_dtype="bf16"), "bf16", "logits in bf16"),
        (NumericsProfile(sum_after_cast=True), "bf16", "sum after the cast"),
        (NumericsProfile(split_partial_dtype="fp16"), "bf16", "partials in fp16"),
    ],
)
def test_the_cost_of_a_profile_is_told(profile: NumericsProfile, q_dtype: str, words: str) -> None:
    assert words in cost(profile, q_dtype)


def test_an_exact_profile_costs_nothing_and_unknown_words_are_refused() -> None:
    assert cost(NumericsProfile(p_dtype="fp32", mma="simt"), "fp32") == ""
    with pytest.raises(ValueError, match="in32 'tf32'; known: exact, tf32_rz, tf32_rna"):
        NumericsProfile(in32="tf32")
