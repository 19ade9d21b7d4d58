"""The judge: every planted fault is seen on data of ordinary size, the honest kernel stays clean, counts are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from harness.oracle.findings import TensorFindings
from harness.oracle.judge import judge
from harness.oracle.tolerance import rounding_of, tolerance
from references.attention import AttentionInputs, attend
from tests.oracle.cases import FEATURES, judged, make_case, ratios
from tests.oracle.emulated_kernel import run_emulated

PROFILE = NumericsProfile()
Change = Callable[[AttentionInputs], AttentionInputs]


def _swapped_page(inputs: AttentionInputs) -> AttentionInputs:
    """One page of 16 tokens of the first sequence is read from the second."""
    k, v = inputs.k.clone(), inputs.v.clone()
    second = inputs.seq_lens[0]
    k[32:48], v[32:48] = inputs.k[second : second + 16], inputs.v[second : second + 16]
    return replace(inputs, k=k, v=v)


def _zero_newest(inputs: AttentionInputs) -> AttentionInputs:
    """The newest token of every sequence is zeros, as in a zero-filled cache that lacks it."""
    newest = torch.tensor(inputs.seq_lens).cumsum(0) - 1
    return replace(inputs, k=inputs.k.index_fill(0, newest, 0.0), v=inputs.v.index_fill(0, newest, 0.0))


def _modulo_heads(inputs: AttentionInputs) -> AttentionInputs:
    """kv_head = q_head % num_kv_heads instead of q_head // gqa_ratio."""
    heads = torch.arange(inputs.q.shape[1]) % inputs.k.shape[1]
    return replace(inputs, k=inputs.k[:, heads], v=inputs.v[:, heads])


def _head_dim_tail(inputs: AttentionInputs) -> AttentionInputs:
    """Dimensions beyond the last multiple of 32 of a head size of 40 take no part in q . k."""
    q = inputs.q.clone()
    q[..., 32:] = 0
    return replace(inputs, q=q)


FAULTS: dict[str, tuple[dict[str, Any], Change, dict[str, Any]]] = {  # features, fault in the inputs, in the mask
    "newest token dropped": ({}, lambda i: i, {"dropped_keys": 1}),
    "newest token zero": ({}, _zero_newest, {}),
    "window one wider": ({"sliding_window": 37}, lambda i: replace(i, sliding_window=38), {}),
    "window one narrower": ({"sliding_window": 37}, lambda i: replace(i, sliding_window=36), {}),
    "causal off by one": ({}, lambda i: i, {"causal_shift": 1}),
    "causal off by minus one": ({"lengths": ((48, 1), (300, 257))}, lambda i: i, {"causal_shift": -1}),
    "scale 2 % too large": ({}, lambda i: replace(i, softmax_scale=1.02 * i.softmax_scale), {}),
    "page of another sequence": ({}, _swapped_page, {}),
    "gqa modulo": ({}, _modulo_heads, {}),
    "head_size tail ignored": ({"size": 40}, _head_dim_tail, {}),
    "soft cap ignored": ({"logits_soft_cap": 2.0}, lambda i: replace(i, logits_soft_cap=None), {}),
    "alibi ignored": ({"alibi": True}, lambda i: replace(i, alibi_slopes=None), {}),
    "alibi slopes of other heads": (
        {"alibi": True},
        lambda i: replace(i, alibi_slopes=2.0 ** -torch.arange(4.0, 0, -1)),
        {},
    ),
    "sinks ignored": ({"sinks": True}, lambda i: replace(i, sinks=None), {}),
    "sink of another head": ({"sinks": True}, lambda i: replace(i, sinks=torch.linspace(6.0, 2.0, 4)), {}),
    "v head swapped": ({}, lambda i: replace(i, v=i.v.flip(1)), {}),
    "v 2 % too large": ({}, lambda i: replace(i, v=1.02 * i.v), {}),
}


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_exceed_the_tolerance(fault: str, q_dtype: str) -> None:
    features, change, in_mask = FAULTS[fault]
    inputs = make_case("normal", q_dtype, **dict(features))
    honest_out, honest_lse = run_emulated(inputs, PROFILE, q_dtype)
    assert judged(inputs, honest_out, honest_lse, PROFILE, q_dtype).clean
    out, lse = run_emulated(change(inputs), PROFILE, q_dtype, **in_mask)
    findings = judged(inputs, out, lse, PROFILE, q_dtype)
    assert ratios(findings)["out"] > 2
    if not fault.startswith("v "):
        assert ratios(findings)["lse"] > 10


@pytest.mark.parametrize("feature", FEATURES)
def test_zeros_are_not_an_output(feature: str) -> None:
    inputs = make_case("normal", "bf16", **dict(FEATURES[feature]))
    out, lse = run_emulated(inputs, PROFILE, "bf16")
    found = judged(inputs, torch.zeros_like(out), lse, PROFILE, "bf16").tensors[0]
    assert found.num_mismatched > found.num_elements // 2
    assert found.num_zero == found.num_mismatched
    halved = judged(inputs, out / 2, lse, PROFILE, "bf16").tensors[0]
    assert halved.num_mismatched > halved.num_zero  # of halves only those of zeros are zero


def test_zeros_are_right_where_nothing_is_seen_or_all_values_are_zero() -> None:
    inputs = make_case(lengths=((3, 2), (3, 0)))
    inputs = replace(inputs, v=torch.zeros_like(inputs.v))
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    findings = judged(inputs, out, lse, PROFILE, "fp16")
    assert findings.clean
    assert findings.err_over_tol < 1
    reference = attend(inputs, rounding_of(NumericsProfile(p_dtype="fp32", out_dtype="fp32"), "fp16"))
    allowed = tolerance(reference, NumericsProfile(p_dtype="fp32", out_dtype="fp32"), "fp16", 64)
    assert allowed.out.max() <= 2.0**-125  # nothing but underflow
    allowed = replace(allowed, out=torch.zeros_like(allowed.out))  # 0 / 0 happens
    assert judge(out.float(), lse, reference, allowed).tensors[0].err_over_tol == 0


def spoiled(position: tuple[int, ...], value: float, which: str = "out") -> TensorFindings:
    """Findings on the tensor called `which` after one element of an honest output was overwritten."""
    inputs = make_case(lengths=((4, 2), (9, 0)))  # tokens 4 and 5 see nothing
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    (out if which == "out" else lse)[position] = value
    findings = judged(inputs, out, lse, PROFILE, "fp16")
    other = next(t for t in findings.tensors if t.name != which)
    assert other.num_mismatched == 0
    return next(t for t in findings.tensors if t.name == which)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("which", "position"), [("out", (2, 3, 7)), ("lse", (2, 3)), ("out", (5, 0, 0))])
def test_one_non_finite_element_is_found(which: str, position: tuple[int, ...], value: float) -> None:
    found = spoiled(position, value, which)
    assert found.num_mismatched == 1
    assert bool(found.mismatched[position])
    assert found.err_over_tol == math.inf
    assert (found.num_nan, found.num_inf) == ((1, 0) if math.isnan(value) else (0, 1))
    assert found.num_unwritten == found.num_nan  # the caller said that NaN is what was handed out
    assert found.worst is not None
    assert (found.worst.token, found.worst.head, found.worst.dim) == (*position, -1)[:3]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1e30])
def test_an_lse_of_minus_infinity_is_exact(value: float) -> None:
    found = spoiled((4, 1), value, "lse")
    assert found.num_mismatched == 1
    assert found.err_over_tol == math.inf
    assert found.worst is not None
    assert found.worst.want == -math.inf
    assert found.num_inf == 0  # infinite where the reference is finite


def test_an_unwritten_output_is_counted_and_everything_mismatches() -> None:
    inputs = make_case()
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    out[:5] = math.nan
    found = judged(inputs, out, lse, PROFILE, "fp16").tensors[0]
    assert found.num_unwritten == found.num_mismatched == found.num_nan == 5 * out.shape[1] * out.shape[2]
    assert bool(found.mismatched[:5].all())
    assert not bool(found.mismatched[5:].any())


def test_the_worst_element_and_the_masks_are_exact() -> None:
    inputs = make_case()
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    out[7, 1, 5] += 0.5
    out[30, 2, 9] += 0.125
    found = judged(inputs, out, lse, PROFILE, "fp16").tensors[0]
    assert found.mismatched.nonzero().tolist() == [[7, 1, 5], [30, 2, 9]]
    assert found.worst is not None
    assert (found.worst.token, found.worst.head, found.worst.dim) == (7, 1, 5)
    assert found.worst.got == float(out[7, 1, 5])
    assert found.worst.ratio == pytest.approx(abs(found.worst.got - found.worst.want) / found.worst.tolerance)


def test_clean_masks_have_the_right_shape_and_strided_outputs_are_read_right() -> None:
    inputs = make_case()
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    padded = torch.full((*out.shape[:2], out.shape[2] + 8), math.nan, dtype=out.dtype)
    padded[..., :-8] = out
    findings = judged(inputs, padded[..., :-8], lse, PROFILE, "fp16")
    assert findings.clean
    assert [t.mismatched.shape for t in findings.tensors] == [out.shape, lse.shape]
    assert not any(bool(t.mismatched.any()) for t in findings.tensors)


@pytest.mark.parametrize(("ratio", "clean"), [(0.999, True), (1.001, False), (-0.999, True), (-1.001, False)])
def test_the_limit_is_the_tolerance(ratio: float, clean: bool) -> None:
    inputs = make_case(lengths=((4, 2), (9, 0)))
    reference = attend(inputs, rounding_of(PROFILE, "fp16"))
    allowed = tolerance(reference, PROFILE, "fp16", 64)
    assert bool((allowed.lse[4:] == 0).all())  # rows that see nothing: -inf exactly
    lse = torch.where(reference.lse.isfinite(), reference.lse + ratio * allowed.lse, reference.lse)
    for tensor in judge(reference.out + ratio * allowed.out, lse, reference, allowed).tensors:
        assert (tensor.num_mismatched == 0) == clean
        assert tensor.err_over_tol == pytest.approx(abs(ratio))


def test_a_reference_that_is_not_a_number_passes_nothing() -> None:
    inputs = make_case()
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    reference = attend(inputs, rounding_of(PROFILE, "fp16"))
    allowed = tolerance(reference, PROFILE, "fp16", 64)
    broken = replace(reference, out=torch.full_like(reference.out, math.nan))
    assert judge(out, lse, broken, allowed).tensors[0].num_mismatched == out.numel()


def test_saturating_outputs_are_compared_with_the_saturated_reference() -> None:
    profile = NumericsProfile(out_dtype="fp8_e4m3", out_scale=2.0**-10)  # largest value 0.4375
    inputs = make_case()
    out, lse = run_emulated(inputs, profile, "fp16")
    assert out.dtype == element_type("fp8_e4m3").torch
    assert bool((out.float().abs() == 448).any())
    assert judged(inputs, out, lse, profile, "fp16").clean


def test_an_lse_in_base_2_is_judged_as_declared() -> None:
    inputs = make_case()
    out, lse = run_emulated(inputs, PROFILE, "fp16")
    in_base_2 = NumericsProfile(lse_base="2")
    assert judged(inputs, out, lse / math.log(2), in_base_2, "fp16").clean
    assert not judged(inputs, out, lse / math.log(2), PROFILE, "fp16").clean


def test_shapes_must_agree() -> None:
    inputs = make_case()
    out, _ = run_emulated(inputs, PROFILE, "fp16")
    with pytest.raises(ValueError, match="out: has shape"):
        judged(inputs, out[:-1], None, PROFILE, "fp16")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_exactly_the_rounded_reference_or_nothing(dtype: str) -> None:
    """For needles: an output one ulp off passes within its tolerance, and must not."""
    profile = NumericsProfile(p_dtype="fp32", mma="simt")
    inputs = make_case(lengths=((3, 5), (1, 2)))
    reference = attend(inputs, rounding_of(profile, dtype))
    allowed = tolerance(reference, profile, dtype, inputs.q.shape[2])
    right = reference.out.to(element_type(dtype).torch)
    assert judge(right, None, reference, allowed, exact=True).err_over_tol == 0
    bits = right.view(torch.int32 if dtype == "fp32" else torch.int16).clone()
    bits[0, 0, 0] += 1
    off = bits.view(right.dtype)
    found = judge(off, None, reference, allowed, exact=True).tensors[0]
    assert (found.num_mismatched, found.worst is not None and found.worst.ratio > 1) == (1, True)
