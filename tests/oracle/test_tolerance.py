"""The tolerance against its formulas written densely, honest kernels, and kernels of another profile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from harness.dtypes import element_type
from harness.errors import UsageError
from harness.kernel.numerics import NumericsProfile
from harness.oracle.judge import judge
from harness.oracle.tolerance import rounding_of, tolerance
from references.attention import AttentionInputs, attend
from tests.oracle.cases import FEATURES, judged, make_case, ratios
from tests.oracle.dense_tolerance import dense_tolerance
from tests.oracle.emulated_kernel import Schedule, run_emulated

PROFILES = {
    "simt": NumericsProfile(mma="simt"),
    "tensor_cores": NumericsProfile(),
    "fp32_out": NumericsProfile(out_dtype="fp32"),
    "fp32_p": NumericsProfile(p_dtype="fp32"),
    "sum_after_cast": NumericsProfile(sum_after_cast=True),
    "scaled_fp8_p": NumericsProfile(p_dtype="fp8_e4m3", p_scale=256.0, mma="mma_sync"),
    "fp8_p_summed": NumericsProfile(p_dtype="fp8_e4m3", sum_after_cast=True, mma="mma_sync"),
    "fp16_partials": NumericsProfile(split_partial_dtype="fp16"),
    "fp8_out": NumericsProfile(out_dtype="fp8_e4m3", out_scale=0.01),
}
SCHEDULES = (Schedule(), Schedule(tile=16, reverse=True), Schedule(tile=32, splits=3))


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", PROFILES)
def test_honest_kernels_pass_on_every_law_and_are_not_far_below_on_normal(name: str, q_dtype: str) -> None:
    profile = PROFILES[name]
    for law in ("normal", "outliers", "structured"):
        worst = 0.0
        for seed, schedule in enumerate(SCHEDULES):
            inputs = make_case(law, q_dtype, seed=seed)
            out, lse = run_emulated(inputs, profile, q_dtype, schedule)
            got = ratios(judged(inputs, out, lse, profile, q_dtype, structured=law == "structured"))
            assert got["out"] < 1, (law, schedule)
            assert got["lse"] < 1, (law, schedule)
            worst = max(worst, got["out"])
        all_fp32 = q_dtype == "fp32" and element_type(profile.p_type(q_dtype)).size == 4
        if law == "normal":
            assert worst > (0.1 if all_fp32 else 0.25), "the tolerance is too loose to test anything"


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("feature", FEATURES)
def test_honest_kernels_pass_with_every_feature(feature: str, q_dtype: str) -> None:
    for seed, schedule in enumerate(SCHEDULES):
        for law in ("normal", "outliers"):
            inputs = make_case(law, q_dtype, seed=seed, **dict(FEATURES[feature]))
            out, lse = run_emulated(inputs, NumericsProfile(), q_dtype, schedule)
            findings = judged(inputs, out, lse, NumericsProfile(), q_dtype)
            assert findings.clean, (law, schedule, ratios(findings))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["flash", "math"])
@pytest.mark.parametrize("q_dtype", ["fp16", "bf16"])
def test_torch_attention_passes(q_dtype: str, backend: SDPBackend) -> None:
    for law in ("normal", "outliers"):
        inputs = make_case(law, q_dtype, lengths=((400,), (400,)), group=1, causal=True)
        dtype = element_type(q_dtype).torch
        q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.softmax_scale)[0].transpose(0, 1)
        profile = NumericsProfile(mma="simt", p_dtype="q" if backend == SDPBackend.FLASH_ATTENTION else "fp32")
        worst = ratios(judged(inputs, out, None, profile, q_dtype))["out"]
        assert worst < 1
        assert worst > 0.1 or law != "normal"


@pytest.mark.parametrize(
    ("runs", "declares"), [("bf16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp8_e4m3", "bf16")], ids="-as-".join
)
def test_a_kernel_that_rounds_more_coarsely_than_declared_fails(runs: str, declares: str) -> None:
    inputs = make_case("normal", "fp32", lengths=((64,), (2000,)))
    honest = NumericsProfile(p_dtype=runs, mma="mma_sync")
    out, lse = run_emulated(inputs, honest, "fp32")
    assert ratios(judged(inputs, out, lse, honest, "fp32"))["out"] < 1
    assert ratios(judged(inputs, out, lse, replace(honest, p_dtype=declares), "fp32"))["out"] > 1


def test_repeated_keys_round_alike_and_are_found() -> None:
    """Eight distinct keys, each many times over: the independent bound is exceeded, what repeats allow for never."""
    over = 0.0
    profile = NumericsProfile(p_dtype="bf16")
    for seed in range(4):
        inputs = make_case("structured", "fp32", lengths=((8,), (4000,)), seed=seed, causal=False)
        out, lse = run_emulated(inputs, profile, "fp32")
        assert ratios(judged(inputs, out, lse, profile, "fp32"))["out"] < 1
        assert ratios(judged(inputs, out, lse, profile, "fp32", structured=True))["out"] < 1
        reference = attend(inputs, rounding_of(profile, "fp32"))
        assert float(reference.key_repeats.min()) == 500
        unaware = replace(reference, key_repeats=torch.ones_like(reference.key_repeats))
        found = judge(out, lse, reference, tolerance(unaware, profile, "fp32", 64))
        over = max(over, found.tensors[0].err_over_tol)
    assert over > 1


@pytest.mark.parametrize("sinks", [False, True])
def test_equal_probabilities_round_alike_and_are_found(sinks: bool) -> None:
    """No key repeats, but queries are so small that all probabilities round to the same number."""
    profile = NumericsProfile(p_dtype="bf16")
    inputs = make_case("normal", "fp32", lengths=((8,), (3000,)), causal=False, sinks=sinks)
    inputs = replace(inputs, q=inputs.q * 4e-4, v=inputs.v + 1)
    out, lse = run_emulated(inputs, profile, "fp32")
    reference = attend(inputs, rounding_of(profile, "fp32"))
    assert float(reference.key_repeats.max()) == 1
    assert judge(out, lse, reference, tolerance(reference, profile, "fp32", 64)).clean
    unaware = replace(reference, row_square=reference.row_square * 2)
    assert judge(out, lse, reference, tolerance(unaware, profile, "fp32", 64)).err_over_tol > 2


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
def test_ordinary_data_are_not_taken_for_structured(q_dtype: str) -> None:
    inputs = make_case("normal", q_dtype, lengths=((40,), (600,)))
    profile = NumericsProfile()
    reference = attend(inputs, rounding_of(profile, q_dtype))
    free, certain = (tolerance(reference, profile, q_dtype, 64, structured=s).out for s in (False, True))
    assert float((free / certain).mean()) < 0.75


def test_truncating_accumulators_are_allowed_for_matrix_units_only() -> None:
    """Positive values summed by units that drop what lies below the last bit end up low in proportion to n."""
    n = 8192
    inputs = make_case("normal", "fp32", lengths=((4,), (n,)), causal=False)
    inputs = replace(inputs, v=inputs.v * 0.1 + 1)
    low = 0.1 * n * 2.0**-24  # relative: what such units measure
    scalar, matrix = (NumericsProfile(mma=mma, p_dtype="fp16", out_dtype="fp32") for mma in ("simt", "wgmma"))
    reference = attend(inputs, rounding_of(scalar, "fp32"))
    extra = tolerance(reference, matrix, "fp32", 64).out - tolerance(reference, scalar, "fp32", 64).out
    assert bool((extra > low * reference.out).all())
    exact = NumericsProfile(mma="simt", p_dtype="fp32", out_dtype="fp32")
    reference = attend(inputs, rounding_of(exact, "fp32"))
    assert bool((tolerance(reference, exact, "fp32", 64).out < low * reference.out).all())


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in PROFILES if name != "fp8_out"])
def test_agrees_with_the_formulas_written_densely(name: str, q_dtype: str, structured: bool) -> None:
    """Per key and without Cauchy-Schwarz: ours is never below, and above by little where P or the output is 16 bit."""
    profile = PROFILES[name]
    inputs = make_case("normal", q_dtype, lengths=((64,), (300,)), kv_heads=1, group=1, logits_soft_cap=20.0)
    allowed = tolerance(attend(inputs, rounding_of(profile, q_dtype)), profile, q_dtype, 64, structured=structured)
    dense_out, dense_lse = dense_tolerance(inputs, profile, q_dtype, structured)
    ratio, lse_ratio = allowed.out[:, 0] / dense_out, allowed.lse[:, 0] / dense_lse
    assert float(ratio.min()) > 1 - 1e-9
    all_fp32 = "fp32" in (profile.p_type(q_dtype), profile.out_type(q_dtype)) and q_dtype == "fp32"
    assert float(ratio.mean()) < (2.5 if all_fp32 or name == "fp32_p" else 1.1)
    assert 1 - 1e-9 < float(lse_ratio.min()) <= float(lse_ratio.max()) < 2.5


def test_the_reference_must_be_of_the_same_rounding() -> None:
    reference = attend(make_case(), rounding_of(NumericsProfile(), "bf16"))
    with pytest.raises(UsageError, match="not for this profile"):
        tolerance(reference, NumericsProfile(), "fp16", 64)


def test_what_float32_flushes_to_zero_is_no_error_and_what_it_keeps_is() -> None:
    """A needle beside a key whose share lies below the smallest float32: the output may be 0, but not 1e-30."""
    q = torch.tensor([[[300.0, 0.0]]])  # [1, 1, 2]
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])  # [2, 1, 2]
    v = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]])  # [2, 1, 2]
    profile = NumericsProfile(p_dtype="fp32", out_dtype="fp32", mma="simt")
    inputs = AttentionInputs(q, k, v, (1,), (2,), softmax_scale=1.0)
    reference = attend(inputs, rounding_of(profile, "fp32"))
    allowed = tolerance(reference, profile, "fp32", 2)
    assert 0 < float(reference.out[0, 0, 0]) < 2.0**-149
    flushed = torch.tensor([[[0.0, 1.0]]])
    assert judge(flushed, None, reference, allowed).clean
    assert not judge(flushed + torch.tensor([1e-30, 0.0]), None, reference, allowed).clean


def test_tokens_judged_some_at_a_time_have_the_same_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_case("outliers", "fp16", sinks=True)
    profile = NumericsProfile(sum_after_cast=True)
    reference = attend(inputs, rounding_of(profile, "fp16"))
    whole = tolerance(reference, profile, "fp16", 64).out
    monkeypatch.setattr("harness.oracle.tolerance.AT_ONCE", 7 * whole[0].numel())
    assert torch.equal(tolerance(reference, profile, "fp16", 64).out, whole)
