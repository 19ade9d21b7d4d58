"""Noise of a linear statistic: what honest roundings add to sum over rows and dims of (out - o) X, per signature X.

Invariant: errors that are independent enter the variance, errors that may all have one sign enter the bias; nothing
enters neither. Rows whose errors are not generic (one key has all the mass, or all keys have the same) are not used.

    variance   sum_j A_j^2 / 3 y_j^2        cast of P: uniform within half an ulp A_j, shared by all dims, y_j = v_j . X
             + sum_c h_c^2 / 3 X_c^2        output: h_c the half ulp of o_c, subnormals included
             + sum_j (b p_j)^2 (y_j - x)^2  logits: b from the float32 dot product and logits rounded, x = o . X
             + accumulation, row sum and 16-bit split partials, rounded to nearest
               all times the number of rows with (nearly) the same output, which round alike; 16-bit partials times
               that of all rows, as those of a split in which one key has the mass are its values in every row
    bias       b' sqrt(sum_j p_j (y_j - x)^2)   exp, scale and truncating products q . k, by Cauchy-Schwarz
             + sum_F A_j |y_j|                  keys that may be flushed to zero, by Cauchy-Schwarz over keys or dims
             + sum_j g_j p_j |y_j|              V descales w folded into P: a P of 1 is w itself, which rounds by
                                                g = |rnd(w) / w - 1| in every row; by Cauchy-Schwarz over keys
             + c (n / k) 2^-24 sum_c |o_c X_c|  truncating accumulators
             + (u_P^2 + u_out^2) |x|            mean of a relative rounding error, of second order
             + sum_c h_c |X_c|                  outputs of 8 bits or near 0, where rounding follows the value
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.dtypes import ElementType, element_type
from harness.kernel.numerics import NumericsProfile
from harness.oracle.emulate import round_to
from harness.oracle.tolerance import (
    DOT_FACTOR,
    EXP_ULPS,
    FP8_WGMMA_BITS,
    MATRIX_DEPTH,
    SUM_FACTOR,
    TRUNCATION,
    U32,
)
from references.moments import product
from references.rows import Rows

GRAM_ELEMENTS = 1 << 26  # of the largest temporary on the way to a Gram matrix
MOST_WEIGHTS = 5  # weight sets of a row
MAX_PARTIALS_ALIKE = 256  # rows that may have the same partial of a split, at least: as many as any part is of
FLUSHES_MUCH = 2.0**-20  # half a subnormal of P, relative to the largest P, above which lost keys need a close bound
BIAS_SLACK = {torch.bfloat16: 1 + 2.0**-6, torch.float32: 1 + 2.0**-18}  # for biases summed from products of a type
SNAP = 8  # in roundoffs: closer than this to 1, P = 1 - p snaps to 1 and an output to the value that is stored
SPREAD = 8  # in roundoffs: logits of a row spread by less give P that round alike
COARSEST = 2.0**-12  # roundoffs below this are taken as this where rows are told apart


@dataclass(frozen=True)
class Moments:
    """Of a set of signatures: energy sum X^2, variance, bias, and sum of x = o . X; each [..., rows, signatures]."""

    energy: torch.Tensor
    variance: torch.Tensor
    bias: torch.Tensor
    along_out: torch.Tensor


@dataclass(frozen=True)
class RowNoise:
    """Roundings of some rows, float32 (1 % would do). L = [num_seqs, num_kv_heads, R * gqa_ratio].

    Values are taken about their mean, so that squares of differences do not cancel.
    """

    values: torch.Tensor  # [num_seqs, num_kv_heads, n, head_size_v] v_j - mean, in the type of matrix products
    mean: torch.Tensor  # [num_seqs, num_kv_heads, 1, head_size_v] of v
    out: torch.Tensor  # [L, head_size_v]
    used: torch.Tensor  # [L] bool
    alike: torch.Tensor  # [L] number of rows that round as this one does, itself included
    weights: dict[str, torch.Tensor]  # [L, n]: cast, logit (squares), mass (p), flushed (A of lost keys), folded (g p)
    logit_of_cast: torch.Tensor  # [L] variance from logits per variance from the cast, where they have no weights
    sum_after_cast: bool
    lost_values: torch.Tensor  # [L] sum_F A_j |v_j|, where flushed keys have no weights; else 0
    coherent: torch.Tensor  # [L] b'
    per_dim: torch.Tensor  # [L, head_size_v] variances of errors that are independent per dim
    row_sum: torch.Tensor  # [L] variance of the relative error of the row sum
    truncation: torch.Tensor  # [L] c (n / k) 2^-24
    accumulator: torch.Tensor | None  # [L] relative error of 8-bit matrix units' short accumulators
    second_order: float  # u_P^2 + u_out^2
    coarse_out: torch.Tensor  # [L, head_size_v] half ulps of outputs whose numbers are too coarse to average

    def moments(self, x: torch.Tensor) -> Moments:
        """Of float32 signatures `x` [L, T, head_size_v]; every result [L, T]."""
        along = (x @ self.out[..., None])[..., 0]  # [L, T] x = o . X
        level = (x @ self.mean.transpose(2, 3)[:, :, None])[..., 0]  # [L, T] mean . X
        sums = self._sums(x)

        def about(name: str, centre: torch.Tensor | float) -> torch.Tensor:
            """sum_j w_j (y_j - centre)^2 [L, T]"""
            square, first, total = sums[name]
            shift = level - centre
            return (square + 2 * shift * first + shift * shift * total).clamp_(min=0)

        cast, around = about("cast", 0.0), about("cast", along)
        variance = about("logit", along) if "logit" in sums else self.logit_of_cast[..., None] * around
        variance += torch.maximum(cast, around) if self.sum_after_cast else cast
        variance += (x * x @ self.per_dim[..., None])[..., 0]
        variance += self.row_sum[..., None] * along * along
        variance *= self.alike[..., None]

        bias = self.coherent[..., None] * about("mass", along).sqrt_()
        if self.accumulator is not None:
            bias += self.accumulator[..., None] * about("mass", 0.0).sqrt_()
        for name in ("flushed", "folded"):
            if name in sums:
                lost = sums[name][2]  # [L, 1]
                bias += (lost * about(name, 0.0)).sqrt_()
                if self.sum_after_cast:
                    bias += lost * along.abs()
        size = x.abs()
        bias += self.truncation[..., None] * (size @ self.out.abs()[..., None])[..., 0]
        bias += (size @ self.coarse_out[..., None])[..., 0]
        energy = (x * x).sum(-1)
        bias += self.lost_values[..., None] * energy.sqrt()
        return Moments(energy, variance, bias.mul_(BIAS_SLACK[self.values.dtype]), along)

    def _sums(self, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """By weight: sums over keys of w (v . x)^2, w v . x [L, T] and w [L, 1]."""
        stacked = torch.stack(list(self.weights.values()), dim=3)  # [L, W, n]
        squares = weighted_squares(x, stacked, self.values)  # [L, T, W]
        moved = product(stacked.flatten(2, 3).flatten(0, 1).to(self.values.dtype), self.values.flatten(0, 1))
        first = x @ moved.view(*stacked.shape[:4], -1).transpose(3, 4)  # [L, T, W]
        total = stacked.sum(-1)[..., None, :]  # [L, 1, W]
        return {name: (squares[..., i], first[..., i], total[..., i]) for i, name in enumerate(self.weights)}


def weighted_squares(x: torch.Tensor, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """sum_j w_j (v_j . x)^2: float32 [B, H, R, T, W] of x [B, H, R, T, d], weights [B, H, R, W, n] and v [B, H, n, d].

    Through y = x V^T, or, where signatures are many, through the Gram matrices sum_j w_j v_j v_j^T of each row, for
    some rows at a time. Products are taken in the type of `v` and added up in float32.
    """
    width, size = weights.shape[3], v.shape[3]
    if not by_gram(x.shape[3], width, size):
        flat = x.flatten(2, 3).flatten(0, 1).to(v.dtype)
        y = product(flat, v.transpose(2, 3).flatten(0, 1)).square_()  # [B * H, R * T, n]
        return torch.matmul(y.view(*x.shape[:4], -1), weights.transpose(3, 4))
    keys_last = v.transpose(2, 3).contiguous()[:, :, None]  # [B, H, 1, d, n]
    at_once = max(GRAM_ELEMENTS // v.numel(), 1)  # rows
    result = x.new_empty(*x.shape[:4], width)
    for start in range(0, x.shape[2], at_once):
        rows = slice(start, start + at_once)
        for i, w in enumerate(weights[:, :, rows].to(v.dtype).unbind(3)):  # [B, H, rows, n]
            weighted = w[:, :, :, None] * keys_last
            gram = product(weighted.flatten(2, 3).flatten(0, 1), v.flatten(0, 1))  # [B * H, rows * d, d]
            part = x[:, :, rows]
            result[:, :, rows, :, i] = ((part @ gram.view(*w.shape[:3], size, size)) * part).sum(-1)
    return result


def by_gram(num_signatures: int, num_weights: int, size: int) -> bool:
    """Whether Gram matrices are the cheaper way to weighted squares: y takes memory traffic, they take products."""
    return 4 * num_signatures > num_weights * size


def row_noise(rows: Rows, profile: NumericsProfile, q_dtype: str, alike: torch.Tensor | None = None) -> RowNoise:
    """The roundings that `profile` declares for `rows`.

    `alike` [num_seqs, num_kv_heads, R * gqa_ratio], where `rows` are a part of those looked at: see rows_alike.
    """
    out_type = element_type(profile.out_type(q_dtype))
    p_types = [element_type(profile.p_type(q_dtype, cached)) for cached in (True, False)]
    p_type = max(p_types, key=lambda kind: kind.unit_roundoff)
    n = rows.visible.sum(-1).double().expand(rows.p.shape[:3])  # [L]
    p, out = rows.p, rows.out
    # p of what x_j = p_j / scale is relative to: the largest key, or the sink, which has what the keys leave
    scale = torch.maximum(p.amax(-1), 1 - p.sum(-1)).clamp_(min=0)[..., None]  # [L, 1]
    cached = rows.cached[:, None, None]  # [num_seqs, 1, 1, n]
    cached_p, new_p = p_types
    roundoff = torch.where(cached, p.new_tensor(cached_p.unit_roundoff), p.new_tensor(new_p.unit_roundoff))
    subnormal = torch.where(cached, p.new_tensor(cached_p.half_subnormal), p.new_tensor(new_p.half_subnormal))
    subnormal = subnormal / profile.p_scale
    lost_below = subnormal * scale if rows.weight is None else subnormal / rows.weight * scale  # [L, n]
    flushed = p < 2 * lost_below  # [L, n]
    half_ulp = torch.maximum(roundoff * p, torch.minimum(p, lost_below))
    cast = half_ulp.masked_fill(flushed, 0.0).square_().div_(3)

    size = rows.scores.masked_fill(~rows.visible, 0.0).abs_()  # [L, n] of the logits
    top = size.amax(-1)  # [L]
    dot = DOT_FACTOR * element_type(profile.dot_reduce).unit_roundoff * rows.dot_bound  # [L]
    weights = {"cast": cast, "mass": p}
    lost, lost_values = half_ulp.masked_fill(~flushed, 0.0), torch.zeros_like(n)  # [L, n], [L]
    if max(kind.half_subnormal for kind in p_types) / profile.p_scale > FLUSHES_MUCH:
        weights["flushed"] = lost
    else:
        lost_values = (lost @ rows.v.norm(dim=-1)[..., None])[..., 0]
        if profile.sum_after_cast:
            lost_values += lost.sum(-1) * out.norm(dim=-1)
    if rows.weight is not None and bool((gain := _own_rounding(rows.weight, p_types)).any()):
        weights["folded"] = gain * p
    if profile.s_dtype != "fp32":
        weights["logit"] = (dot[..., None].square() + (_roundoff(profile.s_dtype) * size).square_() / 3).mul_(p * p)

    depth, bits = _accumulator(profile, p_type)
    short = bits < 24
    keys = n if profile.promote_every is None else n.clamp(max=profile.promote_every)
    truncation = TRUNCATION * (n / depth) * U32 if depth and not short else torch.zeros_like(n)
    accumulator = keys / depth * (depth / 4 + 1) * 2.0**-bits if depth and short else None
    q_type = max((element_type(profile.q_type(q_dtype, c)) for c in (True, False)), key=lambda kind: kind.unit_roundoff)
    q_depth, q_bits = _accumulator(profile, q_type)
    coherent = EXP_ULPS * U32 * (1 + top)  # [L]
    if q_depth and q_bits < 24:
        coherent += rows.head_size / q_depth * (q_depth / 4 + 1) * 2.0**-q_bits * rows.dot_bound * rows.head_size**0.5
    elif q_depth:
        coherent += TRUNCATION * (rows.head_size / q_depth) * U32 * top

    spread = (p * p) @ (rows.v * rows.v)  # [L, head_size_v] sum p^2 v^2
    rounding = (SUM_FACTOR * U32) ** 2 * n  # [L]
    out_ulp = profile.out_scale * _half_ulp(out / profile.out_scale, out_type)  # [L, head_size_v] half of it
    few_steps = out.abs() < SNAP * out_type.half_subnormal * profile.out_scale
    per_dim = out_ulp.square() / 3
    per_dim += ((2 * truncation) ** 2 + rounding)[..., None] * (spread + out * out)
    if profile.split_partial_dtype != "fp32":
        partial = element_type(profile.split_partial_dtype).unit_roundoff * (p @ rows.v.abs())
        per_dim += partial.square_().mul_(max(p.shape[2], MAX_PARTIALS_ALIKE) / 3)
    single = torch.float32
    coarse = max(p_type.unit_roundoff, out_type.unit_roundoff)
    mean = rows.v.mean(2, keepdim=True)  # padded keys count as zeros: any centre is as right
    finest = min(kind.unit_roundoff for kind in p_types)
    return RowNoise(
        values=(rows.v - mean).to(torch.bfloat16 if p.is_cuda else single),
        mean=mean.to(single),
        out=out.to(single),
        used=_generic(rows, coarse, out_type.unit_roundoff),
        alike=(rows_alike(out, profile, q_dtype) if alike is None else alike).to(single),
        weights={name: weight.to(single) for name, weight in weights.items()},
        logit_of_cast=(3 * (dot / finest).square_()).to(single),  # p^2 <= 3 cast / u_P^2 of a key that is not lost
        sum_after_cast=profile.sum_after_cast,
        lost_values=lost_values.to(single),
        coherent=coherent.to(single),
        per_dim=per_dim.to(single),
        row_sum=rounding.to(single),
        truncation=truncation.to(single),
        accumulator=None if accumulator is None else accumulator.to(single),
        second_order=p_type.unit_roundoff**2 + out_type.unit_roundoff**2,
        coarse_out=(out_ulp if out_type.size == 1 else out_ulp.masked_fill(~few_steps, 0.0)).to(single),
    )


def _own_rounding(folded: torch.Tensor, p_types: list[ElementType]) -> torch.Tensor:
    """How far weights `folded` into P are off where P is 1, relative, in the worse of `p_types`: of the same shape."""
    mantissa, _ = torch.frexp(folded)  # in [1/2, 1): P is scaled so that it does not leave the normal numbers
    off = [(round_to(mantissa, kind.name) / mantissa - 1).abs_() for kind in p_types]
    return torch.maximum(*off)


def _roundoff(name: str) -> float:
    """0 for float32, which EXP_ULPS covers."""
    return 0.0 if name == "fp32" else element_type(name).unit_roundoff


def _accumulator(profile: NumericsProfile, operand: ElementType) -> tuple[int | None, int]:
    """Products per matrix instruction, None for scalar units, and bits that its accumulator keeps."""
    depth = None if profile.mma == "simt" else profile.mma_k or MATRIX_DEPTH.get(operand.name)
    return depth, profile.acc_bits or (FP8_WGMMA_BITS if profile.mma == "wgmma" and operand.size == 1 else 24)


def _half_ulp(values: torch.Tensor, kind: ElementType) -> torch.Tensor:
    """Half the distance between neighbours that `kind` can represent, at each value, same shape."""
    exponent = torch.frexp(values).exponent - 1  # |value| in [2^exponent, 2^(exponent + 1))
    return torch.ldexp(torch.full_like(values, kind.unit_roundoff), exponent).clamp_(min=kind.half_subnormal)


def _generic(rows: Rows, coarse: float, out_roundoff: float) -> torch.Tensor:
    """Rows [L] whose roundings are no repetition of one another: no key has all the mass, nor all keys the same.

    What a sink takes is no key's: beside it, one key alone still gives p v, whose dims round alike where V is coarse.
    """
    seen = rows.visible
    count = seen.sum(-1).clamp(min=1)
    scores = rows.scores.masked_fill(~seen, 0.0)
    mean = scores.sum(-1) / count
    deviation = (scores - mean[..., None]).masked_fill_(~seen, 0.0).square_().sum(-1).div_(count).sqrt_()
    real = rows.real.repeat_interleave(rows.group, dim=1)[:, None]
    alone = rows.p.amax(-1) >= (1 - SNAP * max(out_roundoff, COARSEST)) * rows.p.sum(-1)
    return ~alone & (deviation >= SPREAD * coarse) & real


def rows_alike(out: torch.Tensor, profile: NumericsProfile, q_dtype: str) -> torch.Tensor:
    """How many rows of the same sequence and KV head have nearly the same output, each: of `out`, [L] of [L, dv]."""
    roundoff = max(element_type(profile.out_type(q_dtype)).unit_roundoff, COARSEST)
    direction = out / out.norm(dim=-1, keepdim=True).clamp_min_(1e-300)
    count: torch.Tensor = ((direction @ direction.transpose(-1, -2)) > 1 - 8 * roundoff**2).sum(-1).clamp_(min=1)
    return count


def patterns_alike(rows: Rows, profile: NumericsProfile, q_dtype: str) -> torch.Tensor:
    """How many rows of the same sequence and KV head round P as each does, as far as correlations go: [L].

    Logits that differ by d between two rows, but for a constant, of which the steps of P are h apart, have rounding
    errors that correlate by exp(-2 pi^2 var(d) / h^2), on average over such d: the first harmonic of their sawtooth.
    """
    step = 2 * max(element_type(profile.p_type(q_dtype, cached)).unit_roundoff for cached in (True, False))
    seen = rows.visible.expand_as(rows.p).double()  # [L, n]
    logits = rows.scores.masked_fill(~rows.visible, 0.0)
    weight = rows.p.square().mean(2, keepdim=True) * seen
    first, other = weight * logits, seen.transpose(-1, -2)
    common = (weight @ other).clamp_(min=1e-300)  # [L, L'], of the keys that both rows see
    mean = first @ other
    square = (first * logits) @ other
    square = square + square.transpose(-1, -2) - 2 * first @ logits.transpose(-1, -2)
    variance = square / common - ((mean - mean.transpose(-1, -2)) / common).square()
    count: torch.Tensor = (-2 * math.pi**2 / step**2 * variance.clamp(min=0)).exp().sum(-1).clamp_(min=1)
    return count
