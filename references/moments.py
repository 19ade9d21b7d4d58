"""Moments of the half ulps of P: the sums from which a tolerance follows.

Invariant: every moment is a sum of non-negative terms; in float64 it is exact, in a narrower type it is inflated by
what rounding can have taken away, so it is never too small, but for terms below the smallest float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from references.quantities import Rounding
from references.tile import Softmax

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SUM_UNIT = 2.0**-22  # twice what a term can lose in a float32 sum, truncated or rounded, relative to the sum


@dataclass(frozen=True)
class Magnitudes:
    """|v_j| and v_j^2 of a batch, over the weight folded into P where there is one.

    A further column holds what they are for a value of 1, for moments without V.
    """

    size: torch.Tensor  # [num_seqs * num_kv_heads, num_keys, head_size_v (+ 1)]
    square: torch.Tensor  # [num_seqs * num_kv_heads, num_keys, head_size_v (+ 1)]
    weight: torch.Tensor | None  # [num_seqs * num_kv_heads, num_keys, 1] float64

    def part(self, heads: slice, keys: slice) -> Magnitudes:
        weight = None if self.weight is None else self.weight[heads, keys]
        return Magnitudes(self.size[heads, keys], self.square[heads, keys], weight)


def magnitudes(v: torch.Tensor, weight: torch.Tensor | None, row_sums: bool, dtype: torch.dtype) -> Magnitudes:
    """Of float64 `v` [num_seqs * num_kv_heads, num_keys, head_size_v] and `weight` [..., num_keys, 1], in `dtype`."""
    if row_sums:
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    if weight is not None:
        v = v / weight
    square = torch.mul(v, v, out=torch.empty_like(v, dtype=dtype))  # in one pass, rounded once
    return Magnitudes(v.to(dtype, copy=True).abs_(), square, weight)


def moments(soft: Softmax, v: Magnitudes, rounding: Rounding, cached: int) -> dict[str, torch.Tensor]:
    """abs_pv, cast_square, cast_sum, flush_sum [num_seqs * num_kv_heads, rows * gqa_ratio, head_size_v (+ 1)], float64.

    The first `cached` keys are rounded as `rounding.cached` says. Overwrites soft.p if it has the type of `v`.
    """
    every = slice(None)
    if rounding.cached is None or cached == 0:
        return _moments(soft, soft.p, v, rounding)
    old, new = slice(None, cached), slice(cached, None)
    result = _moments(soft, soft.p[..., old], v.part(every, old), rounding.cached)
    if cached < soft.p.shape[-1]:
        for name, value in _moments(soft, soft.p[..., new], v.part(every, new), rounding).items():
            result[name] = result[name] + value if name in result else value
    return result


def _moments(soft: Softmax, p: torch.Tensor, v: Magnitudes, rounding: Rounding) -> dict[str, torch.Tensor]:
    """Moments over keys that share a rounding."""
    dtype, u = v.size.dtype, rounding.unit_roundoff
    weighted = p if v.weight is None else torch.mul(p, v.weight.transpose(1, 2), out=p if p.dtype == dtype else None)
    subnormal = rounding.half_subnormal > 0
    unit = soft.peak.new_full(soft.peak.shape, u)
    if subnormal:
        unit = rounding.half_subnormal * soft.peak
        if soft.sink_excess is not None:
            unit = unit * soft.sink_excess.exp()
    # y_j = u p_j / unit. With subnormals A_j = max(y_j, 1) unit or, flushed (y_j < 2 u), min(y_j, u) / u unit.
    y = torch.mul(weighted, u / unit, out=weighted if p.dtype == dtype else torch.empty_like(p, dtype=dtype))
    mass = unit if soft.mass is None else unit * soft.mass
    inflate, inflate_square = _inflation(dtype, p.shape[-1])
    linear, square = mass * inflate, mass * mass * inflate_square

    result = {"abs_pv": product(y, v.size) * (linear / u)}
    if subnormal:
        kept = torch.ge(y, 2 * u * (1 + 2 * UNIT_ROUNDOFF.get(dtype, 0.0)), out=torch.empty_like(y))
        flushed = y.clamp(max=u).sub_(kept, alpha=u)  # a kept key gives u - u
        result["flush_sum"] = product(flushed, v.size) * (linear / u)
        del flushed
        y.clamp_(min=1).mul_(kept)
        result["cast_sum"] = product(y, v.size) * linear
    else:
        result["cast_sum"] = result["abs_pv"] * u
    result["cast_square"] = product(y.square_(), v.square) * square
    return result


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched a @ b; operands of 16 bit are summed in float32."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        result: torch.Tensor = torch.bmm(a, b, out_dtype=torch.float32)
        return result
    return a.float() @ b.float()


def _inflation(dtype: torch.dtype, num_terms: int) -> tuple[float, float]:
    """Factors that make up for rounding both operands, of which squares of P are rounded twice before they are."""
    if dtype == torch.float64:
        return 1.0, 1.0
    kept = 1 - UNIT_ROUNDOFF[dtype]
    lost_by_sum = 1 + num_terms * SUM_UNIT
    return kept**-2 * lost_by_sum, kept**-4 * lost_by_sum
