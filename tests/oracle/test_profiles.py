"""Every field of a profile: a kernel that rounds so passes as declared, and fails declared as the nearest other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile, PerKey, Prescale
from harness.oracle.emulate import emulate, round_to_tf32
from harness.oracle.judge import judge
from harness.oracle.tolerance import rounding_of, tolerance
from references.attention import AttentionInputs, attend
from tests.oracle.dense_tolerance import dense_tolerance
from tests.oracle.rounding_kernel import Raw, rounding_kernel

PLAIN = NumericsProfile(mma="mma_sync")
FLEX = (Prescale("softmax_scale", "q"), Prescale("log2e", "q"))
FP8_PREFIX = replace(
    PLAIN, kv_dequant="exact", q_round=PerKey("fp8_e4m3", "q"), p_dtype=PerKey("fp8_e4m3", "q"), mma="wgmma"
)
FOLDED = replace(PLAIN, kv_dequant="exact", p_fold_v=True)
FP8_P = replace(PLAIN, p_dtype="fp8_e4m3", p_scale=256.0)
TF32_RZ, TF32_RNA = replace(PLAIN, in32="tf32_rz"), replace(PLAIN, in32="tf32_rna")

# name: (dtype of q, what the kernel does, what it must not be taken for, law)
FIELDS: dict[str, tuple[str, NumericsProfile, tuple[NumericsProfile, ...], str]] = {
    "kv_dequant exact": ("bf16", replace(PLAIN, kv_dequant="exact"), (PLAIN,), "fp8"),
    "kv_dequant rounded": ("bf16", PLAIN, (replace(PLAIN, kv_dequant="exact"),), "fp8"),
    "q_prescale": (
        "bf16",
        replace(PLAIN, q_prescale=FLEX),
        (PLAIN, replace(PLAIN, q_prescale=FLEX[:1]), replace(PLAIN, q_prescale=(FLEX[0], Prescale("log2e")))),
        "normal",
    ),
    "q_round and P per key": (
        "bf16",
        FP8_PREFIX,
        (replace(FP8_PREFIX, q_round="q"), replace(FP8_PREFIX, p_dtype="q")),
        "fp8",
    ),
    "tf32 truncated": ("fp32", TF32_RZ, (PLAIN, TF32_RNA), "normal"),
    "tf32 to nearest": ("fp32", TF32_RNA, (PLAIN, TF32_RZ), "normal"),
    "dot_reduce bf16": ("bf16", replace(PLAIN, dot_reduce="bf16"), (PLAIN,), "normal"),
    "dot_reduce fp16": ("fp16", replace(PLAIN, dot_reduce="fp16"), (PLAIN,), "normal"),
    "s_dtype": ("bf16", replace(PLAIN, s_dtype="bf16", p_dtype="fp32"), (replace(PLAIN, p_dtype="fp32"),), "normal"),
    "p_dtype": ("bf16", FP8_P, (PLAIN, replace(FP8_P, p_dtype="fp16")), "normal"),
    "p_scale": ("bf16", replace(FP8_P, p_scale=1.0), (FP8_P,), "sink"),
    "p_fold_v": ("fp16", FOLDED, (replace(FOLDED, p_fold_v=False),), "small scales"),
    "8-bit accumulators": ("bf16", replace(FP8_P, mma="wgmma"), (FP8_P,), "positive"),
    "8-bit accumulators, promoted": (
        "bf16",
        replace(FP8_P, mma="wgmma", promote_every=1024),
        (FP8_P,),
        "positive",
    ),
    "sum_after_cast": ("bf16", replace(PLAIN, sum_after_cast=True), (PLAIN,), "normal"),
    "split_partial_dtype": ("fp16", replace(PLAIN, split_partial_dtype="bf16"), (PLAIN,), "normal"),
    "out_dtype": ("bf16", replace(PLAIN, out_dtype="fp8_e4m3", out_scale=0.01), (PLAIN,), "normal"),
}


def draw(q_dtype: str, law: str, seed: int) -> Raw:
    g = torch.Generator().manual_seed(seed)
    dtype, n, d = element_type(q_dtype).torch, 1500 if law != "positive" else 3000, 64
    q, k, v = (torch.randn(m, d, generator=g) for m in (24, n, n))
    if law == "positive":
        v = v.abs() + 1
    q = ((2.5 if law == "small scales" else 1) * q).to(dtype)
    if law == "sink":  # one key has half of the mass, what the others have is small beside it
        q[:, 0], k[:, 0], k[0] = 8.0, 0.0, 8.5 * torch.eye(d)[0]
    v = 0.005 * v if law == "small scales" else v
    k, v, cached, descale = k.to(dtype).float(), v.to(dtype).float(), n, torch.ones(n)
    if law in ("fp8", "small scales"):
        cached = n - 200
        descale[:cached] = 2.0**-14 * 1.37 if law == "small scales" else 0.0137
        for x, scale in ((k, 0.0173), (v, float(descale[0]))):
            payload = (x[:cached] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            x[:cached] = payload * torch.tensor(scale)
    return Raw(q, k, v, descale, cached, d**-0.5)


def seen_by(raw: Raw, profile: NumericsProfile, q_dtype: str) -> AttentionInputs:
    """What the reference starts from, as a run of a case builds it."""
    operands = emulate(raw.q[:, None], raw.k[:, None], raw.v[:, None], profile, q_dtype, raw.scale)
    return AttentionInputs(
        q=operands.q,
        k=operands.k,
        v=operands.v,
        query_lens=(len(raw.q),),
        seq_lens=(len(raw.k),),
        softmax_scale=raw.scale,
        q_cached=operands.q_cached,
        cached_lens=(raw.cached,),
        weight_scale=raw.v_descale[:, None] if profile.p_fold_v else None,
    )


def errors(
    out: torch.Tensor, lse: torch.Tensor, raw: Raw, profile: NumericsProfile, q_dtype: str
) -> tuple[float, float]:
    """Worst error of out and of the LSE over their tolerances under `profile`."""
    reference = attend(seen_by(raw, profile, q_dtype), rounding_of(profile, q_dtype))
    allowed = tolerance(reference, profile, q_dtype, raw.q.shape[1])
    found = judge(out[:, None], lse[:, None], reference, allowed)
    return found.tensors[0].err_over_tol, found.tensors[1].err_over_tol


@pytest.mark.parametrize("name", FIELDS)
def test_a_kernel_passes_as_it_is_and_fails_as_anything_else(name: str) -> None:
    q_dtype, profile, others, law = FIELDS[name]
    worst, mistaken = 0.0, [0.0] * len(others)
    for seed in range(2):
        raw = draw(q_dtype, law, seed)
        out, lse = rounding_kernel(raw, profile, q_dtype)
        honest = errors(out, lse, raw, profile, q_dtype)
        assert max(honest) < 1, honest
        worst = max(worst, *honest)
        for i, other in enumerate(others):
            mistaken[i] = max(mistaken[i], *errors(out, lse, raw, other, q_dtype))
    assert min(mistaken) > 1, mistaken


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_agrees_with_the_formulas_written_densely(name: str) -> None:
    q_dtype, profile, _, law = FIELDS[name]
    raw = draw(q_dtype, law, 0)
    inputs = seen_by(raw, profile, q_dtype)
    allowed = tolerance(attend(inputs, rounding_of(profile, q_dtype)), profile, q_dtype, 64)
    dense, dense_lse = dense_tolerance(inputs, profile, q_dtype)
    ratio = allowed.out[:, 0] / dense
    assert float(ratio.min()) > 1 - 1e-9
    assert float(ratio.mean()) < 4  # logit errors are bounded through norms and the largest logit of a row
    assert float((allowed.lse[:, 0] / dense_lse).min()) > 1 - 1e-9


def test_tf32_keeps_ten_bits_of_the_mantissa() -> None:
    x = torch.tensor([1 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-10, 1 + 2.0**-12, 3.0, 0.0])
    assert torch.equal(round_to_tf32(x, "tf32_rz"), torch.tensor([1.0, -1.0, 1 + 2.0**-10, 1.0, 3.0, 0.0]))
    up = 1 + 2.0**-10  # ties go away from zero
    assert torch.equal(round_to_tf32(x, "tf32_rna"), torch.tensor([up, -up, up, 1.0, 3.0, 0.0]))


def test_an_undeclared_profile_changes_nothing() -> None:
    raw = draw("bf16", "normal", 0)
    operands = emulate(raw.q[:, None], raw.k[:, None], raw.v[:, None], NumericsProfile(), "bf16", raw.scale)
    assert torch.equal(operands.q, raw.q[:, None])
    assert torch.equal(operands.k, raw.k[:, None])
    assert torch.equal(operands.v, raw.v[:, None])
    assert operands.q_cached is None
