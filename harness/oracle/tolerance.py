"""Tolerance tier 1: the largest error per element that the roundings a kernel declares can explain.

Invariant: derived from the reference's moments and the declared roundings alone; nothing is fitted to a kernel's output
except TRUNCATION, a property of the matrix units. No element may exceed its tolerance.

    tol = (1 + u_out) (T_P + T_F + T_S + T_A + T_M + T_U) + u_out |o| + eta_out

    T_P  P rounded to nearest: independent errors, uniform within half ulps A_j, sum to a sub-Gaussian error
         lambda sqrt(sum A_j^2 v_j^2); never more than sum A_j |v_j|, which also serves structured data
    T_F  P flushed to zero: biased, so sum A_j |v_j| over the flushed keys
    T_S  errors of the logits and of exp: move the output by at most sum p_j b_j |v_j| + |o| sum p_j b_j
    T_A  accumulation of P V in float32, where matrix units truncate
    T_M  partial outputs of a split stored in 16 bit
    T_U  exp, P V and the output may be flushed to zero below the smallest normal float32
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.dtypes import ElementType, element_type
from harness.errors import UsageError
from harness.kernel.numerics import NumericsProfile
from references.attention import AttentionReference, Rounding

FALSE_ALARM = 1e-15  # probability per element that honest roundings exceed the sub-Gaussian bound
SUB_GAUSSIAN = math.sqrt(2 * math.log(2 / FALSE_ALARM) / 3)  # lambda; a uniform error has variance A^2 / 3
U32 = element_type("fp32").unit_roundoff
EXP_ULPS = 8  # float32 roundings in scale, subtraction, exp and log, relative to 1 + |logit|
SUM_FACTOR = 4  # standard deviations in the sqrt(n) u growth of a float32 sum of n terms rounded to nearest
DOT_FACTOR = 2  # the same in q . k, in units of sqrt(head_size) u
TRUNCATION = 2.5  # bias of truncating accumulators in ulps (2^-23) per matrix instruction; measured on an H200
MATRIX_DEPTH = {"fp16": 16, "bf16": 16, "fp8_e4m3": 32, "fp8_e5m2": 32}  # products summed per matrix instruction
UNDERFLOW = 2.0**-126  # below it float32 is subnormal, which fast exponentials and matrix units flush
FP8_WGMMA_ULP = 2.0**-13  # fp8 warp-group instructions keep about 13 bits of the accumulator
FP8_WGMMA_TERMS = 32 / 4 + 1  # truncations at the accumulator's exponent per instruction


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |got - want|; float64, on the device of the reference."""

    out: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    lse: torch.Tensor  # [num_tokens, num_q_heads] in natural units; 0 where the LSE must be -inf
    largest: float = math.inf  # outputs saturate here: the reference is clamped to it
    out_scale: float = 1.0  # what a stored output is multiplied by to get the value
    lse_unit: float = 1.0  # what a stored LSE is multiplied by to get natural units


def rounding_of(profile: NumericsProfile, q_dtype: str) -> Rounding:
    """How a kernel of `profile` rounds P, for `references.attention.attend`."""
    p = element_type(profile.p_type(q_dtype))
    return Rounding(p.unit_roundoff, p.half_subnormal / profile.p_scale, row_sums=profile.sum_after_cast)


def tolerance(
    reference: AttentionReference,
    profile: NumericsProfile,
    q_dtype: str,
    head_size: int,
    *,
    structured: bool = False,
) -> Tolerance:
    """Tolerances of a kernel of `profile` on the case behind `reference`.

    `structured` says that rounding errors may be equal rather than independent (repeated keys or values): only the
    deterministic bounds are used. Raises UsageError where the reference was computed for another rounding of P.
    """
    if reference.rounding != rounding_of(profile, q_dtype):
        raise UsageError(f"tolerance: the reference was computed for {reference.rounding}, not for this profile's P")
    p_type = element_type(profile.p_type(q_dtype))
    out_type = element_type(profile.out_type(q_dtype))
    abs_out = reference.out.abs()  # [num_tokens, num_q_heads, head_size_v]

    error = _cast_error(reference, abs_out, profile, structured)
    error += _logit_error(reference, abs_out, head_size)
    error += _accumulation_error(reference, abs_out, profile, p_type, structured)
    if profile.split_partial_dtype != "fp32":
        error += element_type(profile.split_partial_dtype).unit_roundoff * reference.abs_pv
    error += UNDERFLOW * (1 + reference.num_visible[:, None, None] * reference.max_abs_v[..., None])
    error *= 1 + out_type.unit_roundoff
    error += out_type.unit_roundoff * abs_out
    error += out_type.half_subnormal * profile.out_scale
    return Tolerance(
        out=error,
        lse=_lse_tolerance(reference, profile, head_size, structured),
        largest=out_type.largest * profile.out_scale if out_type.size == 1 else math.inf,
        out_scale=profile.out_scale,
        lse_unit=math.log(2) if profile.lse_base == "2" else 1.0,
    )


def _cast_error(
    reference: AttentionReference, abs_out: torch.Tensor, profile: NumericsProfile, structured: bool
) -> torch.Tensor:
    """T_P + T_F; a row sum over rounded values moves with them, which adds |o| times the moments without V."""
    bound, flushed = reference.cast_sum, reference.flush_sum
    deviation = reference.cast_square.sqrt()
    if profile.sum_after_cast:  # sum A^2 (v - o)^2 <= (sqrt(sum A^2 v^2) + |o| sqrt(sum A^2))^2
        bound = bound + abs_out * reference.row_cast_sum[..., None]
        flushed = flushed + abs_out * reference.row_flush_sum[..., None]
        deviation += abs_out * reference.row_cast_square.sqrt()[..., None]
    error = bound.clone() if structured else torch.minimum(deviation.mul_(SUB_GAUSSIAN), bound)
    error += flushed
    if profile.sum_after_cast:  # the quotient of two perturbed sums
        error /= 1 - _row_sum_error(reference, structured)[..., None]
    return error


def _row_sum_error(reference: AttentionReference, structured: bool) -> torch.Tensor:
    """Largest relative error of a row sum over rounded values [num_tokens, num_q_heads], less than 1."""
    error = reference.row_cast_sum
    if not structured:
        error = torch.minimum(SUB_GAUSSIAN * reference.row_cast_square.sqrt(), error)
    return (error + reference.row_flush_sum).clamp_(max=1 - 2.0**-10)


def _logit_bound(reference: AttentionReference, head_size: int) -> torch.Tensor:
    """Bound on the logit errors b_j but for bias and sink [num_tokens, num_q_heads].

    Errors of a float32 dot product are bounded through |q| |k| (Cauchy-Schwarz), those of scale and exp through the
    logit itself, which is no larger. tanh through exp has an absolute error in proportion to the cap.
    """
    factor = (DOT_FACTOR * math.sqrt(head_size) + EXP_ULPS) * U32
    return reference.logit_bound * factor + EXP_ULPS * U32 * (1 + reference.logits_soft_cap)


def _logit_error(reference: AttentionReference, abs_out: torch.Tensor, head_size: int) -> torch.Tensor:
    """T_S: all keys but for their bias share one bound; sum p |bias| |v| <= max |v| sum p |bias|."""
    shared = _logit_bound(reference, head_size)[..., None]
    offset = (EXP_ULPS * U32 * reference.offset)[..., None]
    error = shared * reference.abs_pv
    error += (shared + offset) * abs_out
    return error.add_(offset * reference.max_abs_v[..., None])


def _accumulation_error(
    reference: AttentionReference,
    abs_out: torch.Tensor,
    profile: NumericsProfile,
    p_type: ElementType,
    structured: bool,
) -> torch.Tensor:
    """T_A for n visible keys. float32 P is multiplied by scalar units, whose sums round to nearest."""
    n = reference.num_visible[:, None, None]  # [num_tokens, 1, 1]
    depth = MATRIX_DEPTH.get(p_type.name) if profile.mma != "simt" else None
    if profile.mma == "wgmma" and p_type.size == 1:
        return (n / MATRIX_DEPTH[p_type.name]) * (FP8_WGMMA_TERMS * FP8_WGMMA_ULP) * reference.abs_pv
    truncation = TRUNCATION * (n / depth) * (2 * U32) if depth else torch.zeros_like(n)
    limit = torch.maximum(n * U32, truncation) * reference.abs_pv
    if structured:
        return limit
    rounding = SUM_FACTOR * U32 * n.sqrt()
    spread = reference.cast_square.sqrt().mul_(SUB_GAUSSIAN / p_type.unit_roundoff)  # lambda sqrt(sum p^2 v^2)
    error = (truncation + rounding) * spread
    error += (truncation / 2 + rounding) * abs_out
    return torch.minimum(error, limit)


def _lse_tolerance(
    reference: AttentionReference, profile: NumericsProfile, head_size: int, structured: bool
) -> torch.Tensor:
    """[num_tokens, num_q_heads]. P's rounding enters only where the row sum adds rounded values."""
    n = reference.num_visible[:, None]  # [num_tokens, 1]
    error = _logit_bound(reference, head_size) + EXP_ULPS * U32 * (reference.offset + reference.lse.abs() + 1)
    error += SUM_FACTOR * U32 * n.sqrt()
    if profile.sum_after_cast:
        error -= torch.log1p(-_row_sum_error(reference, structured))
    return error.masked_fill_(reference.lse == -math.inf, 0)
