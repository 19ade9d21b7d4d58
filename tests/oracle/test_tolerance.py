"""The tolerance against its formulas written densely, honest kernels, and kernels of another profile."""

from __future__ import annotations

import math
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
            assert worst > (0.02 if all_fp32 else 0.25), "the tolerance is too loose to test anything"


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


def test_equal_errors_need_the_structured_bound() -> None:
    """Eight distinct keys, each many times over, round alike: the independent bound is exceeded, the other never."""
    over = 0.0
    for seed in range(4):
        inputs = make_case("structured", "fp32", lengths=((8,), (4000,)), seed=seed, causal=False)
        profile = NumericsProfile(p_dtype="bf16")
        out, lse = run_emulated(inputs, profile, "fp32")
        over = max(over, ratios(judged(inputs, out, lse, profile, "fp32"))["out"])
        assert ratios(judged(inputs, out, lse, profile, "fp32", structured=True))["out"] < 1
    assert over > 1


def test_truncating_accumulators_are_allowed_for_matrix_units_only() -> None:
    """Positive values summed by units that drop what lies below the last bit end up low in proportion to n."""
    n = 8192
    inputs = make_case("normal", "fp32", lengths=((4,), (n,)), causal=False)
    inputs = replace(inputs, v=inputs.v * 0.1 + 1)
    reference = attend(inputs, rounding_of(NumericsProfile(), "fp32"))
    low = (reference.out * (1 - 0.1 * n * 2.0**-24)).float()  # -0.1 n u: what such units measure
    by_units = {}
    for mma in ("wgmma", "simt"):
        profile = NumericsProfile(mma=mma, p_dtype="fp16", out_dtype="fp32")
        allowed = tolerance(attend(inputs, rounding_of(profile, "fp32")), profile, "fp32", 64)
        without_cast = allowed.out - tolerance_of_cast(inputs, profile)
        by_units[mma] = float(((low.double() - reference.out).abs() / without_cast).max())
    assert by_units["wgmma"] < 1 < by_units["simt"]


def tolerance_of_cast(inputs: AttentionInputs, profile: NumericsProfile) -> torch.Tensor:
    """The part of the tolerance that is due to P's rounding, from its definition."""
    r = attend(inputs, rounding_of(profile, "fp32"))
    lam = math.sqrt(2 * math.log(2e15) / 3)
    return (1 + 2.0**-24) * (torch.minimum(lam * r.cast_square.sqrt(), r.cast_sum) + r.flush_sum)


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


def dense_tolerance(
    inputs: AttentionInputs, profile: NumericsProfile, q_dtype: str, structured: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head, one sequence, causal, soft cap only: (out [rows, d], lse [rows])."""
    q, k, v = inputs.q[:, 0].double(), inputs.k[:, 0].double(), inputs.v[:, 0].double()
    rows, n, d = len(q), len(k), q.shape[1]
    cap = inputs.logits_soft_cap or math.inf
    s = cap * torch.tanh(inputs.softmax_scale * (q @ k.T) / cap)
    hidden = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    s = s.masked_fill(hidden, -math.inf)
    p, lse = s.softmax(-1), s.logsumexp(-1)
    o, length = p @ v, torch.exp(lse - s.amax(-1))[:, None]
    u32, lam = 2.0**-24, math.sqrt(2 * math.log(2 / 1e-15) / 3)
    p_type, out_type = element_type(profile.p_type(q_dtype)), element_type(profile.out_type(q_dtype))

    eta = p_type.half_subnormal / profile.p_scale / length
    a = torch.maximum(p_type.unit_roundoff * p, torch.minimum(p, eta))
    kept, flushed = a.masked_fill(p < 2 * eta, 0), a.masked_fill(p >= 2 * eta, 0)
    variance, bound, flush = (kept**2) @ v**2, kept @ v.abs(), flushed @ v.abs()
    raw_variance = variance
    if profile.sum_after_cast:
        about_mean = ((kept**2)[:, :, None] * (v[None] - o[:, None]) ** 2).sum(1)
        variance = torch.maximum(variance, about_mean)
        bound = bound + o.abs() * kept.sum(-1, keepdim=True)
        flush = flush + o.abs() * flushed.sum(-1, keepdim=True)
    cast = (bound if structured else torch.minimum(lam * variance.sqrt(), bound)) + flush
    row_error = torch.zeros(rows, dtype=torch.float64)
    if profile.sum_after_cast:
        row_error = kept.sum(-1) if structured else torch.minimum(lam * (kept**2).sum(-1).sqrt(), kept.sum(-1))
        row_error = row_error + flushed.sum(-1)

    products = inputs.softmax_scale * (q.abs() @ k.abs().T)
    finite = s.masked_fill(hidden, 0)
    b = 2 * math.sqrt(d) * u32 * products + 8 * u32 * (1 + cap + finite.abs())
    logit = (p * b) @ v.abs() + o.abs() * (p * b).sum(-1, keepdim=True)

    seen = (~hidden).sum(-1, keepdim=True).double()
    depth = {"fp16": 16, "bf16": 16, "fp8_e4m3": 32}.get(p_type.name)
    truncation = 2.5 * seen / depth * 2.0**-23 if depth and profile.mma != "simt" else 0 * seen
    limit = torch.maximum(seen * u32, truncation) * (p @ v.abs())
    spread = lam * raw_variance.sqrt() / p_type.unit_roundoff
    accumulate = truncation * (o.abs() / 2 + spread) + 4 * seen.sqrt() * u32 * (o.abs() + spread)
    accumulate = limit if structured else torch.minimum(accumulate, limit)
    if profile.split_partial_dtype != "fp32":
        accumulate = accumulate + element_type(profile.split_partial_dtype).unit_roundoff * (p @ v.abs())

    u_out = out_type.unit_roundoff
    out = (
        (1 + u_out) * (cast / (1 - row_error)[:, None] + logit + accumulate) + u_out * o.abs() + out_type.half_subnormal
    )
    lse_allowed = (p * b).sum(-1) + 8 * u32 * (lse.abs() + 1) + 4 * u32 * seen[:, 0].sqrt()
    lse_allowed -= torch.log1p(-row_error)
    return out, lse_allowed


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
