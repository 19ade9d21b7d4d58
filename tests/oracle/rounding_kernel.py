"""One head of one sequence with every rounding that a profile can declare, in float32 and in plain steps.

Invariant: shares no rounding code with harness.oracle.emulate; what is not declared is not rounded. For tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile


@dataclass(frozen=True)
class Raw:
    """What is handed to a kernel: q [rows, d] in its dtype; float32 payload * descale of K and V [keys, d]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    v_descale: torch.Tensor  # [keys]
    cached: int  # leading keys that come from the cache
    scale: float


def rounding_kernel(raw: Raw, profile: NumericsProfile, q_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [rows, d], lse [rows] float32), causal, the last row at the last key."""
    own = element_type(q_dtype).torch
    k, v, q, factor = raw.k, raw.v, raw.q.float(), raw.scale
    if profile.kv_dequant == "round_to_q":
        k, v = (torch.cat([x[: raw.cached].to(own).float(), x[raw.cached :]]) for x in (k, v))
    for step in profile.q_prescale:
        constant = raw.scale if step.factor == "softmax_scale" else math.log2(math.e)
        exact = element_type(q_dtype if step.constant == "q" else step.constant).torch
        q = (q * torch.tensor(constant).to(exact).float()).to(own).float()
        factor = factor / constant
    in_base_2 = any(step.factor == "log2e" for step in profile.q_prescale)
    factor = factor * math.log2(math.e) if in_base_2 else factor
    cut = profile.in32 if q_dtype == "fp32" else "exact"
    k, v = _tf32(k, cut), _tf32(v, cut)

    distance = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    halves = []
    for cached, keys in ((True, k[: raw.cached]), (False, k[raw.cached :])):
        kind = element_type(profile.q_type(q_dtype, cached))
        halves.append(_dot(_tf32(_cast(q, kind.torch), cut), keys, profile, kind.size))
    s = torch.cat(halves, 1) * factor
    if profile.s_dtype != "fp32":
        s = _cast(s, element_type(profile.s_dtype).torch)
    s = s.masked_fill(distance > 0, -math.inf)

    top = s.amax(1, keepdim=True)
    p = torch.exp2(s - top) if in_base_2 else torch.exp(s - top)
    weight = raw.v_descale if profile.p_fold_v else torch.ones(len(k))
    out, total = torch.zeros(len(q), v.shape[1]), torch.zeros(len(q), 1)
    for cached, keys in ((True, slice(0, raw.cached)), (False, slice(raw.cached, None))):
        kind = element_type(profile.p_type(q_dtype, cached))
        rounded = _tf32(_cast(p[:, keys] * weight[keys] * profile.p_scale, kind.torch), cut)
        reduced = profile.mma == "wgmma" and kind.size == 1
        values = v[keys] / weight[keys, None]
        part = _truncated(rounded, values, profile.promote_every) if reduced else rounded @ values
        out += part / profile.p_scale
        summed = rounded / profile.p_scale / weight[keys] if profile.sum_after_cast else p[:, keys]
        total += summed.sum(1, keepdim=True)
    lse = top * (math.log(2) if in_base_2 else 1) + total.log()
    result = _cast(out / total, element_type(profile.split_partial_dtype).torch)
    return _cast(result / profile.out_scale, element_type(profile.out_type(q_dtype)).torch), lse[:, 0]


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def _tf32(x: torch.Tensor, how: str) -> torch.Tensor:
    """Eleven significant bits, by way of frexp."""
    if how == "exact":
        return x
    mantissa, exponent = torch.frexp(x.double())
    steps = mantissa * 2**11
    cut = steps.trunc() if how == "tf32_rz" else (steps.abs() + 0.5).floor() * steps.sign()
    return torch.ldexp(cut / 2**11, exponent).float()


def _dot(q: torch.Tensor, k: torch.Tensor, profile: NumericsProfile, q_size: int) -> torch.Tensor:
    """q . k [rows, keys]"""
    if profile.dot_reduce != "fp32":
        dtype, total = element_type(profile.dot_reduce).torch, torch.zeros(len(q), len(k))
        for t in range(q.shape[1]):
            total = _cast(total + _cast(q[:, t, None] * k[None, :, t], dtype), dtype)
        return total
    return _truncated(q, k.T, None) if profile.mma == "wgmma" and q_size == 1 else q @ k.T


def _truncated(a: torch.Tensor, b: torch.Tensor, promote_every: int | None) -> torch.Tensor:
    """a [m, n] @ b [n, d] through an accumulator of 13 bits, four products at a time, promoted as declared."""
    total = torch.zeros(len(a), b.shape[1])
    for start in range(0, len(b), promote_every or max(len(b), 1)):
        partial = torch.zeros_like(total).double()
        for j in range(start, min(start + (promote_every or len(b)), len(b)), 4):
            products = a[:, j : j + 4].double() @ b[j : j + 4].double()
            _, exponent = torch.frexp(torch.maximum(partial.abs(), products.abs()))
            spacing = torch.ldexp(torch.ones_like(partial), exponent - 13)
            partial = (partial / spacing).trunc() * spacing + (products / spacing).trunc() * spacing
        total += partial.float()
    return total
