"""Emulated roundings: what a kernel's declared input roundings make of q, k and v, for the reference to start from.

Invariant: a pure function of the inputs and the profile, element by element, so that it does not matter in what order a
kernel works; emulating a rounding costs no tolerance, and not emulating it would be a false alarm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile

TF32_DROPPED_BITS = 13  # of float32's 23 mantissa bits TF32 keeps 10


@dataclass(frozen=True)
class Operands:
    """q, k, v as the products of a kernel see them; q_cached is what keys from the cache meet where that differs."""

    q: torch.Tensor  # [num_tokens, num_q_heads, head_size]
    k: torch.Tensor  # [num_keys, num_kv_heads, head_size]
    v: torch.Tensor  # [num_keys, num_kv_heads, head_size_v]
    q_cached: torch.Tensor | None = None  # [num_tokens, num_q_heads, head_size]


def emulate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    profile: NumericsProfile,
    q_dtype: str,
    softmax_scale: float,
    q_descale: float = 1.0,
) -> Operands:
    """The operands of a kernel of `profile`.

    q: [num_tokens, num_q_heads, head_size] of element type `q_dtype`; k, v: [num_keys, num_kv_heads, d] float32,
    dequantised (payload * descale), or new tokens as they are. The factors of a prescaled q are divided out again in
    float64: `softmax_scale` still applies to what is returned. An 8-bit query is handed over as the numbers it stores;
    `q_descale` multiplies them after all declared roundings, in float64: kernels scale logits by it, in float32.
    """
    own_type = element_type(q_dtype).torch
    if profile.kv_dequant == "round_to_q":  # new tokens have that type already
        k, v = k.to(own_type).float(), v.to(own_type).float()
    scaled, factor = _prescaled(q, profile, q_dtype, softmax_scale)
    queries = []
    for cached in (False, True):
        rounded = round_to(scaled, profile.q_type(q_dtype, cached))
        if cut := profile.tf32(q_dtype):
            rounded = round_to_tf32(rounded.float(), cut)
        queries.append(rounded if factor == q_descale == 1.0 else rounded.double() * (q_descale / factor))
    if cut := profile.tf32(q_dtype):
        k, v = round_to_tf32(k, cut), round_to_tf32(v, cut)
    same = profile.q_type(q_dtype, cached=False) == profile.q_type(q_dtype, cached=True)
    return Operands(queries[0], k, v, None if same else queries[1])


def round_to(x: torch.Tensor, name: str) -> torch.Tensor:
    """x rounded to element type `name`, in the dtype of x; types of one byte saturate."""
    target = element_type(name)
    if target.torch == x.dtype:
        return x
    if target.size == 1:
        x = x.clamp(-target.largest, target.largest)
    return x.to(target.torch).to(x.dtype)


def round_to_tf32(x: torch.Tensor, how: str) -> torch.Tensor:
    """float32 x with 10 mantissa bits; `how`: tf32_rz truncates, tf32_rna rounds to nearest, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    if how == "tf32_rna":
        bits = bits + (1 << (TF32_DROPPED_BITS - 1))
    return (bits & -(1 << TF32_DROPPED_BITS)).view(torch.float32)


def _prescaled(
    q: torch.Tensor, profile: NumericsProfile, q_dtype: str, softmax_scale: float
) -> tuple[torch.Tensor, float]:
    """q after the declared steps, each a float32 product rounded to q's type, and the factor they stand for."""
    exact = 1.0
    for step in profile.q_prescale:
        value = softmax_scale if step.factor == "softmax_scale" else math.log2(math.e)
        constant = element_type(q_dtype if step.constant == "q" else step.constant).torch
        q = (q.float() * torch.tensor(value, dtype=constant).item()).to(q.dtype)
        exact *= value
    return q, exact
