"""The tolerance written densely: key by key, without Cauchy-Schwarz, from its definition. For one head of one sequence.

Invariant: shares no arithmetic with harness.oracle.tolerance. What that bounds through a norm is summed here.
"""

from __future__ import annotations

import math

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from references.attention import AttentionInputs

U = 2.0**-24
LAMBDA = math.sqrt(2 * math.log(2 / 1e-15) / 3)
ULP = 3 / (8 * math.log(2))
WALK = ULP * (math.log(1e15) * 2 / (math.pi * math.sqrt(3) * LAMBDA)) ** 2
TF32 = {"tf32_rz": 2.0**-10, "tf32_rna": 2.0**-11}


def dense_tolerance(
    inputs: AttentionInputs, profile: NumericsProfile, q_dtype: str, structured: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [rows, d], lse [rows]); causal, soft cap, no bias, no sinks; every row sees a key and none repeats."""
    q, k, v = (x[:, 0].double() for x in (inputs.q, inputs.k, inputs.v))
    rows, n, d = len(q), len(k), q.shape[1]
    position = torch.arange(n)
    old = position < (inputs.cached_lens[0] if inputs.cached_lens else n)  # [n]
    hidden = position > torch.arange(n - rows, n)[:, None]
    raw = inputs.softmax_scale * (q @ k.T)
    if inputs.q_cached is not None:
        raw = torch.where(old, inputs.softmax_scale * (inputs.q_cached[:, 0].double() @ k.T), raw)
    cap = inputs.logits_soft_cap
    s = (cap * torch.tanh(raw / cap) if cap else raw).masked_fill(hidden, -math.inf)
    p, lse = s.softmax(-1), s.logsumexp(-1)
    o, length = p @ v, torch.exp(lse - s.amax(-1))[:, None]
    seen = (~hidden).sum(-1, keepdim=True).double()
    alike = seen if structured else torch.ones_like(seen)
    size, about = v.abs(), (v[None] - o[:, None]).abs()  # [n, d], [rows, n, d]

    # P
    types = [element_type(profile.p_type(q_dtype, place)) for place in (True, False)]
    tf32 = profile.in32 if q_dtype == "fp32" and profile.in32 != "exact" else None
    us = [TF32[tf32] if tf32 and t.name == "fp32" else t.unit_roundoff for t in types]
    u_p = torch.where(old, us[0], us[1]).double()
    eta = torch.where(old, types[0].half_subnormal, types[1].half_subnormal).double() / profile.p_scale
    if inputs.weight_scale is not None:
        eta = eta / inputs.weight_scale[:, 0].double()
    eta = eta / length  # [rows, n]
    a = torch.maximum(u_p * p, torch.minimum(p, eta))
    kept, flushed = a.masked_fill(p < 2 * eta, 0), a.masked_fill(p >= 2 * eta, 0)
    cast, cast_bound, flush = (kept**2) @ v**2, kept @ size, flushed @ size
    row_error = torch.zeros(rows, 1, dtype=torch.float64)
    if profile.sum_after_cast:
        cast = torch.maximum(cast, ((kept**2)[:, :, None] * about**2).sum(1))
        row_error = torch.minimum(
            LAMBDA * (alike * (kept**2).sum(-1, keepdim=True)).sqrt(), kept.sum(-1, keepdim=True)
        ) + flushed.sum(-1, keepdim=True)
        cast_bound = cast_bound + o.abs() * kept.sum(-1, keepdim=True)
        flush = flush + o.abs() * flushed.sum(-1, keepdim=True)
    one_sided = tf32 == "tf32_rz" and any(t.name == "fp32" for t in types)

    # logits
    products = inputs.softmax_scale * (q.abs() @ k.abs().T)
    squares = inputs.softmax_scale**2 * (q**2 @ (k**2).T)
    u_dot = element_type(profile.dot_reduce).unit_roundoff
    u_s = element_type(profile.s_dtype).unit_roundoff if profile.s_dtype != "fp32" else 0.0
    finite = raw.masked_fill(hidden, 0)
    b = 2 * math.sqrt(d) * u_dot * products + 8 * U * (1 + (cap or 0) + finite.abs()) + u_s * finite.abs()
    b2 = u_dot**2 * ULP * d * (squares + finite**2 / 3) + (u_s * finite) ** 2
    b2 = b2 + U**2 * (16 + (1 + 4 + 4 + 3 * 2.2**2) * finite**2) + (8 * U * (cap or 0)) ** 2
    q_types = [element_type(profile.q_type(q_dtype, place)) for place in (True, False)]
    if profile.mma != "simt" and any(t.size == 1 for t in q_types) and profile.mma == "wgmma":
        cut = d / 32 * 9 * 2.0**-13
        b, b2 = b + cut * products, b2 + 3 * (cut / 2) ** 2 * (squares + finite**2)
    elif profile.mma != "simt" and (q_types[1].size == 2 or tf32):
        cut = 2.5 * d / (8 if tf32 else 16) * U
        b2 = b2 + 3 * cut**2 * (squares + finite**2)
    logit = ((p**2 * b2)[:, :, None] * about**2).sum(1)
    logit_bound = (p * b) @ size + o.abs() * (p * b).sum(-1, keepdim=True)

    # sums
    spread = p**2 @ v**2
    sums = seen * U**2 * (WALK * spread + 2 * o**2)
    truncation = torch.zeros_like(o)
    for t in types:
        depth = 8 if tf32 and t.name == "fp32" else {"fp16": 16, "bf16": 16, "fp8_e4m3": 32}.get(t.name)
        if profile.mma == "simt" or depth is None:
            continue
        if t.size == 1 and profile.mma == "wgmma":
            ulps = seen.clamp(max=profile.promote_every or math.inf) / 32 * 9 * 2.0**-13
            one = torch.minimum(ulps * (o.abs() + LAMBDA * (alike * spread).sqrt()), ulps * (p @ size))
        else:
            ulps = 2.5 * seen / depth * 2.0**-23
            one = torch.minimum(ulps * (o.abs() / 2 + LAMBDA * (alike * spread).sqrt()), ulps * (p @ size))
        truncation = torch.maximum(truncation, one)

    independent = LAMBDA * (alike * (cast * (0.75 if one_sided else 1) + logit + sums)).sqrt()
    if one_sided:
        independent = independent + max(us) / 2 * o.abs()
    error = torch.minimum(independent, cast_bound + logit_bound + seen * U * (p @ size))
    error = error / (1 - row_error) + flush + truncation
    if profile.split_partial_dtype != "fp32":
        partial = element_type(profile.split_partial_dtype)
        error = error + partial.unit_roundoff * (p @ size) + partial.half_subnormal
    out_type = element_type(profile.out_type(q_dtype))
    _, exponent = torch.frexp((o.abs() + error) / profile.out_scale)
    half_ulp = (out_type.unit_roundoff * torch.ldexp(torch.ones_like(o), exponent - 1)).clamp(
        min=out_type.half_subnormal
    )
    lse_error = (p * b).sum(-1) + 8 * U * (lse.abs() + 1)
    lse_error = lse_error + torch.minimum(4 * U * (seen * alike).sqrt(), seen * U)[:, 0] - torch.log1p(-row_error)[:, 0]
    return error + half_ulp * profile.out_scale, lse_error
