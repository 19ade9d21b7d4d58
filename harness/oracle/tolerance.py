"""Tolerance tiers 1 and L: the largest errors of out and LSE that the roundings a kernel declares can explain.

Invariant: derived from the reference's moments and the declared roundings alone; nothing is fitted to a kernel's output
except TRUNCATION, a property of the matrix units. No element may exceed its tolerance.

    tol = E + half ulp of the output at |o| + E
    E   = min(lambda sqrt(r (C^2 + S^2 + R^2)), C' + S' + R') + biases

    C, C'  P rounded to nearest: half ulps A_j; C = sqrt(sum A_j^2 v_j^2), C' = sum A_j |v_j|
    S, S'  errors b_j of the logits and of exp move the output by sum p_j b_j (v_j - o);
           S = b sqrt(sum p_j^2 (v_j - o)^2) where they are independent of v_j - o, S' = sum p_j b_j (|v_j| + |o|)
    R, R'  sums of n terms in float32: R^2 = n u^2 (WALK sum p_j^2 v_j^2 + 2 o^2), R' = n u sum p_j |v_j|
    r      number of keys whose errors are equal instead of independent: repeated keys and equal probabilities

The first bound is sub-Gaussian: a sum of independent errors, uniform within +-A_j, exceeds lambda sqrt(sum A_j^2) with
probability FALSE_ALARM at most. The second is certain. Biases are errors of one sign, added as they are: P flushed to
zero, accumulators that truncate, ALiBi distances and sinks, partial outputs in 16 bit, underflow of float32.
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
HOEFFDING = math.sqrt(3)  # A of a uniform error that bounds any zero-mean error within +-1 as well
U32 = element_type("fp32").unit_roundoff
EXP_ULPS = 8  # float32 roundings in scale, subtraction, exp and log, relative to 1 + |logit|
SUM_FACTOR = 4  # standard deviations in the sqrt(n) u growth of a float32 sum of n terms rounded to nearest
DOT_FACTOR = 2  # the same in q . k, in units of sqrt(head_size) u
EXP_ERROR = 4  # two units in the last place of exp, in units of u
LOGIT_ERROR = 1 + 2**2 + 2**2 + (2.2 * math.sqrt(3)) ** 2  # squares: product with the scale; subtraction of the
# maximum and product with log2(e), of values up to twice the largest logit; what the constants are off for all keys
MEAN_SQUARE_ULP = 3 / (8 * math.log(2))  # of half the spacing at x over u x, as x runs through a binade
# Partial sums of n independent terms are a random walk: they and their rounding errors are both random, and what the
# two make together exceeds t with probability exp(-t). So lambda sqrt(WALK / MEAN_SQUARE_ULP) must reach
# ln(1 / FALSE_ALARM) 2 / pi / sqrt(3): 2 / pi relates the root mean square of an extreme walk to its end.
WALK = MEAN_SQUARE_ULP * (math.log(1 / FALSE_ALARM) * 2 / math.pi / math.sqrt(3) / SUB_GAUSSIAN) ** 2
TRUNCATION = 2.5  # bias of truncating accumulators in ulps (2^-23) per matrix instruction; measured on an H200
MATRIX_DEPTH = {"fp16": 16, "bf16": 16, "fp8_e4m3": 32, "fp8_e5m2": 32, "tf32": 8}  # products per matrix instruction
UNDERFLOW = 2.0**-126  # below it float32 is subnormal, which fast exponentials and matrix units flush
FP8_WGMMA_BITS = 13  # 8-bit warp-group instructions keep about 13 bits of the accumulator
AT_ONCE = 1 << 22  # elements of a temporary, where one token has no more
EQUAL_WITHIN = 8  # probabilities that differ by fewer units in the last place may round alike


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |got - want|; float64, on the device of the reference."""

    out: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    lse: torch.Tensor  # [num_tokens, num_q_heads] in natural units; 0 where the LSE must be -inf
    largest: float = math.inf  # outputs saturate here: the reference is clamped to it
    out_scale: float = 1.0  # what a stored output is multiplied by to get the value
    lse_unit: float = 1.0  # what a stored LSE is multiplied by to get natural units


@dataclass(frozen=True)
class _Product:
    """How one operand type takes part in a product with float32 accumulation."""

    unit_roundoff: float
    half_subnormal: float
    truncated: bool  # rounded toward zero: errors of one sign, up to unit_roundoff
    depth: int | None  # products per matrix instruction; None on scalar units
    accumulator_ulp: float  # relative spacing of the accumulator where it keeps less than float32, else 0


def rounding_of(profile: NumericsProfile, q_dtype: str) -> Rounding:
    """How a kernel of `profile` rounds P, for `references.attention.attend`."""
    new, cached = (_p_rounding(profile, q_dtype, place) for place in (False, True))
    return new if new == cached else Rounding(new.unit_roundoff, new.half_subnormal, new.row_sums, cached=cached)


def tolerance(
    reference: AttentionReference,
    profile: NumericsProfile,
    q_dtype: str,
    head_size: int,
    *,
    structured: bool = False,
) -> Tolerance:
    """Tolerances of a kernel of `profile` on the case behind `reference`.

    `structured` says that rounding errors may be equal rather than independent beyond what repeated keys and equal
    probabilities show (they are found here): only the certain bounds are used. Raises UsageError where the reference
    was computed for another rounding of P.
    """
    if reference.rounding != rounding_of(profile, q_dtype):
        raise UsageError(f"tolerance: the reference was computed for {reference.rounding}, not for this profile's P")
    products = [_p_product(profile, q_dtype, place) for place in (False, True)]
    out_type = element_type(profile.out_type(q_dtype))
    equal = _equal_errors(reference, max(p.unit_roundoff for p in products), structured)
    bound, independent = _logit_errors(reference, profile, q_dtype, head_size, equal)
    out = torch.empty_like(reference.out)
    num_tokens, *sizes = out.shape
    step = max(AT_ONCE // max(math.prod(sizes), 1), 1)
    for rows in (slice(start, start + step) for start in range(0, num_tokens, step)):
        part = reference.part(rows)
        error = _output_error(part, profile, products, equal[rows], bound[rows], independent[rows])
        torch.add(error, _half_ulp(part.out.abs().add_(error), out_type, profile.out_scale), out=out[rows])
    return Tolerance(
        out=out,
        lse=_lse_tolerance(reference, profile, equal, bound),
        largest=out_type.largest * profile.out_scale if out_type.size == 1 else math.inf,
        out_scale=profile.out_scale,
        lse_unit=math.log(2) if profile.lse_base == "2" else 1.0,
    )


def _output_error(
    reference: AttentionReference,
    profile: NumericsProfile,
    products: list[_Product],
    equal: torch.Tensor,
    logit_bound: torch.Tensor,
    logit_independent: torch.Tensor,
) -> torch.Tensor:
    """E [num_tokens, num_q_heads, head_size_v]: all errors but the rounding of the output."""
    n = reference.num_visible[:, None, None]  # [num_tokens, 1, 1]
    coarsest, finest = (pick(p.unit_roundoff for p in products) for pick in (max, min))
    truncated = any(p.truncated for p in products)
    abs_out = reference.out.abs()
    cast = reference.cast_square.sqrt()  # C
    cast_bound, flushed = reference.cast_sum, reference.flush_sum
    spread = cast / finest  # >= sqrt(sum p^2 v^2)
    if coarsest > finest:  # keys rounded differently: no more than max p |v| times sum p |v|
        largest = reference.peak * reference.max_abs_v  # [num_tokens, num_q_heads]
        spread = torch.minimum(spread, (largest[..., None] * reference.abs_pv).sqrt())
    if profile.sum_after_cast:  # sum A^2 (v - o)^2 <= (sqrt(sum A^2 v^2) + |o| sqrt(sum A^2))^2
        cast = cast + abs_out * reference.row_cast_square.sqrt()[..., None]
        cast_bound = cast_bound + abs_out * reference.row_cast_sum[..., None]
        flushed = flushed + abs_out * reference.row_flush_sum[..., None]
    about_out = spread + abs_out * reference.row_square.sqrt()[..., None]  # >= sqrt(sum p^2 (v - o)^2)

    square = (cast * (HOEFFDING / 2) if truncated else cast).square_()  # one-sided errors spread over half as much
    square += about_out.mul_(logit_independent[..., None]).square_()
    square += (n * U32**2) * (WALK * spread.square() + 2 * abs_out.square())
    root_equal = equal.sqrt()[..., None]  # [num_tokens, num_q_heads, 1]
    error = square.sqrt_().mul_(SUB_GAUSSIAN * root_equal)
    if truncated:
        error += coarsest / 2 * abs_out
    shared = logit_bound[..., None]
    certain = cast_bound + (shared + n * U32) * reference.abs_pv + shared * abs_out
    error = torch.minimum(error, certain)
    if profile.sum_after_cast:  # the quotient of two perturbed sums
        error /= 1 - _row_sum_error(reference, equal)[..., None]
    error += flushed

    offset = (EXP_ULPS * U32 * reference.offset)[..., None]  # sum p |bias| |v| <= max |v| sum p |bias|
    error += offset * (abs_out + reference.max_abs_v[..., None])
    error += torch.stack([_truncation(reference, profile, p, abs_out, spread * root_equal) for p in products]).amax(0)
    if profile.split_partial_dtype != "fp32":
        partial = element_type(profile.split_partial_dtype)
        error += partial.unit_roundoff * reference.abs_pv + partial.half_subnormal
    return error.add_(UNDERFLOW * (1 + n * reference.max_abs_v[..., None]))


def _truncation(
    reference: AttentionReference,
    profile: NumericsProfile,
    product: _Product,
    abs_out: torch.Tensor,
    spread: torch.Tensor,
) -> torch.Tensor:
    """Bias of P V accumulated by units that drop what lies below the last bit of their accumulator."""
    if product.depth is None:
        return torch.zeros_like(abs_out)
    n = reference.num_visible[:, None, None]
    if product.accumulator_ulp:  # every product of an instruction is cut at the accumulator's exponent, four at a time
        keys = n if profile.promote_every is None else n.clamp(max=profile.promote_every)
        ulps = keys / product.depth * (product.depth / 4 + 1) * product.accumulator_ulp
        drift = abs_out  # products below the last bit are lost whole, so the loss grows faster than the sum
    else:
        ulps = TRUNCATION * (n / product.depth) * (2 * U32)
        drift = abs_out / 2
    return ulps * torch.minimum(drift + SUB_GAUSSIAN * spread, reference.abs_pv)


def _logit_errors(
    reference: AttentionReference, profile: NumericsProfile, q_dtype: str, head_size: int, equal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors b_j of the logits but for bias and sink, both [num_tokens, num_q_heads].

    A certain bound on each: errors of a dot product through |q| |k| (Cauchy-Schwarz), those of scale and exp through
    the logit itself, which is no larger; tanh through exp has an absolute error in proportion to the cap. And the A of
    an independent uniform error: partial sums of a dot product are a random walk to q . k, so their squares add up to
    d/2 sum q_t^2 k_t^2 + d/3 (q . k)^2 on average over keys; twice the first allows for few keys. (A row with a single
    key has v = o.) A factor that is slightly off for all keys acts like Hoeffding's bound, as v - o has either sign.
    """
    largest, products = reference.largest_logit, reference.dot_bound
    u_dot = element_type(profile.dot_reduce).unit_roundoff
    u_logit = element_type(profile.s_dtype).unit_roundoff if profile.s_dtype != "fp32" else 0.0
    cap = 1 + reference.logits_soft_cap
    q_product = _q_product(profile, q_dtype)

    bound = (DOT_FACTOR * math.sqrt(head_size) * u_dot + EXP_ULPS * U32) * reference.logit_bound
    square = u_dot**2 * MEAN_SQUARE_ULP * head_size * (products.square() + largest.square() / 3)
    square += U32**2 * (EXP_ERROR**2 + LOGIT_ERROR * largest.square())
    if reference.logits_soft_cap:
        square += (EXP_ULPS * U32 * reference.logits_soft_cap) ** 2
    if u_logit:
        bound += u_logit * largest
        square += (u_logit * largest).square()
    if q_product.depth:
        steps = head_size / q_product.depth
        if q_product.accumulator_ulp:
            cut = steps * (q_product.depth / 4 + 1) * q_product.accumulator_ulp
            bound += cut * reference.logit_bound
            cut /= 2  # a truncation loses half a unit on average
        else:
            cut = TRUNCATION * steps * U32
        square += (HOEFFDING * cut) ** 2 * (products.square() + largest.square())
    bound += EXP_ULPS * U32 * cap
    independent = square.sqrt_()
    # Errors of logits act through exp: (exp(2 b) - 1) / 2 per unit of p, where no logit errs by more than b.
    reach = 2 * torch.minimum(bound, SUB_GAUSSIAN * independent * equal.sqrt())
    stretch = torch.expm1(reach) / reach
    return bound * stretch, independent * stretch


def _lse_tolerance(
    reference: AttentionReference, profile: NumericsProfile, equal: torch.Tensor, logit_bound: torch.Tensor
) -> torch.Tensor:
    """[num_tokens, num_q_heads]. P's rounding enters only where the row sum adds rounded values."""
    n = reference.num_visible[:, None]  # [num_tokens, 1]
    error = logit_bound + EXP_ULPS * U32 * (reference.offset + reference.lse.abs() + 1)
    error += torch.minimum(SUM_FACTOR * U32 * (n * equal).sqrt(), n * U32)
    if profile.sum_after_cast:
        error -= torch.log1p(-_row_sum_error(reference, equal))
    return error.masked_fill_(reference.lse == -math.inf, 0)


def _row_sum_error(reference: AttentionReference, equal: torch.Tensor) -> torch.Tensor:
    """Largest relative error of a row sum over rounded values [num_tokens, num_q_heads], less than 1."""
    deviation = SUB_GAUSSIAN * (equal * reference.row_cast_square).sqrt()
    error = torch.minimum(deviation, reference.row_cast_sum) + reference.row_flush_sum
    return error.clamp_(max=1 - 2.0**-10)


def _equal_errors(reference: AttentionReference, unit_roundoff: float, structured: bool) -> torch.Tensor:
    """Largest number of keys whose probabilities round alike [num_tokens, num_q_heads].

    Equal keys have equal probabilities: as many as the most repeated key occurs. Probabilities that are all equal
    within a few units of their last place (n sum p^2 = (sum p)^2 means no spread at all) may all round alike. With all
    n keys alike, lambda sqrt(n sum A_j^2 v_j^2) >= sum A_j |v_j|: the certain bound takes over by itself.
    """
    n = reference.num_visible[:, None].expand_as(reference.lse)  # [num_tokens, num_q_heads]
    if structured:
        return n.clamp(min=1)
    mass = reference.row_mass.square()
    level = n * reference.row_square - mass <= (EQUAL_WITHIN * unit_roundoff) ** 2 * mass
    return torch.where(level, n, torch.minimum(reference.key_repeats, n)).clamp_(min=1)


def _half_ulp(magnitude: torch.Tensor, out_type: ElementType, scale: float) -> torch.Tensor:
    """Half the spacing of `out_type` at values up to `magnitude`, times `scale`; overwrites magnitude (float64)."""
    if scale != 1.0:
        magnitude /= scale
    power_of_two = magnitude.view(torch.int64).bitwise_and_(0x7FF0 << 48).view(torch.float64)
    return power_of_two.mul_(out_type.unit_roundoff).clamp_(min=out_type.half_subnormal).mul_(scale)


def _p_rounding(profile: NumericsProfile, q_dtype: str, cached: bool) -> Rounding:
    p = _p_product(profile, q_dtype, cached)
    return Rounding(p.unit_roundoff, p.half_subnormal / profile.p_scale, row_sums=profile.sum_after_cast)


def _p_product(profile: NumericsProfile, q_dtype: str, cached: bool) -> _Product:
    return _product(profile, q_dtype, profile.p_type(q_dtype, cached))


def _q_product(profile: NumericsProfile, q_dtype: str) -> _Product:
    """The coarser of the products of q with cached and with new keys; 8-bit products need 8-bit keys on both sides."""
    kinds = [_product(profile, q_dtype, profile.q_type(q_dtype, place)) for place in (False, True)]
    return max(kinds, key=lambda kind: kind.accumulator_ulp)


def _product(profile: NumericsProfile, q_dtype: str, operand: str) -> _Product:
    """float32 operands are multiplied by scalar units, unless they are cut to TF32."""
    kind = element_type(operand)
    cut = profile.tf32(q_dtype) if operand == "fp32" else None
    name = "tf32" if cut else operand
    depth = None if profile.mma == "simt" else profile.mma_k or MATRIX_DEPTH.get(name)
    bits = profile.acc_bits or (FP8_WGMMA_BITS if profile.mma == "wgmma" and kind.size == 1 else 24)
    unit_roundoff = {"tf32_rz": 2.0**-10, "tf32_rna": 2.0**-11}[cut] if cut else kind.unit_roundoff
    return _Product(unit_roundoff, kind.half_subnormal, cut == "tf32_rz", depth, 2.0**-bits if bits < 24 else 0.0)
