"""Data laws: how queries, keys and values are drawn.

Invariant: every bit follows from the case and its data seed, on any device: sums are exact (integers, or few terms in a
fixed order), divisors are tensors (torch multiplies by the reciprocal of a Python number on some devices), and no
transcendental function is applied to a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from harness.case import Case
from harness.dtypes import element_type
from harness.problem import random
from harness.problem.admission import NEEDLES, SHIFTED_MEAN
from harness.problem.bar_codes import code_values
from harness.problem.ramp import ramp_keys, ramp_lse, ramp_queries
from harness.problem.spans import Span, key_start, pick_targets, spans

_CHUNK = 1 << 24  # elements of a temporary
_SHIFTED_QUERY = 2.0  # length of a query along the direction shared with the keys, in sqrt(head_size)
_OUTLIER_RATE, _OUTLIER_SIZE = 0.001, 10.0
_TINY = 0.001
_SHIFTS = {"negative": -1.0, "large": 1.0}  # on which side of 0 the scores of shifted laws lie


def draw_keys(case: Case, device: torch.device | str) -> torch.Tensor:
    """K of every position in the dtype of the case: [num_keys, num_kv_heads, head_size]."""
    shape = (key_start(case.rows)[-1], case.num_kv_heads, case.head_size)
    dtype = element_type(case.dtype).torch
    if case.data in ("rising", "falling"):
        return ramp_keys(case, device).to(dtype)
    if case.data not in _SHIFTS:
        return _generic(case, "k", shape, device)
    noise = random.normal(case.data_seed, "k", shape, device)
    shift = _SHIFTS[case.data] * _shift_of_keys(case)
    return (noise + shift * _directions(case, device)).to(dtype)


def draw_values(case: Case, device: torch.device | str) -> torch.Tensor:
    """V of every position in the dtype of the case: [num_keys, num_kv_heads, head_size_v]."""
    shape, dtype = (key_start(case.rows)[-1], case.num_kv_heads, case.value_size), element_type(case.dtype).torch
    if case.data == "bar_codes":
        return code_values(case, device).to(dtype)
    if case.data == "biased":
        return (random.normal(case.data_seed, "v", shape, device) + 1.0).to(dtype)
    return _generic(case, "v", shape, device)


def draw_queries(case: Case, k: torch.Tensor) -> torch.Tensor:
    """Q in the dtype of the case: [num_tokens, num_q_heads, head_size]; `k` [num_keys, num_kv_heads, head_size].

    Under a soft cap, queries of generic laws are longer, so that scores reach where the cap bends.
    Needles are drawn by harness.problem.needle.
    """
    device, dtype = k.device, element_type(case.dtype).torch
    shape = (case.rows.num_tokens, case.num_q_heads, case.head_size)
    if case.data in ("uniform", "bar_codes"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if case.data == "probe":
        return _probe_queries(case, k)
    if case.data in ("rising", "falling"):
        return ramp_queries(case, device).to(dtype)
    if case.data in _SHIFTS:
        noise = random.normal(case.data_seed, "q", shape, device) * min(1.0, 5.0 / _shift_of_keys(case))
        shared = _directions(case, device).repeat_interleave(case.gqa_ratio, dim=0)  # [num_q_heads, head_size]
        return (noise + _SHIFTED_QUERY * shared).to(dtype)
    gain = 1.0 if case.logits_soft_cap is None else min(max(case.logits_soft_cap / 10.0, 1.0), 4.0)
    return _generic(case, "q", shape, device) * gain


def draw_sinks(case: Case, slopes: Sequence[float] | None, device: torch.device | str) -> torch.Tensor:
    """Sink logits near the LSE of a typical row, so that they matter: float32 [num_q_heads].

    For needles they stay near 0: a sink must not take a needle's mass.
    """
    noise = random.normal(case.data_seed, "sinks", (case.num_q_heads,), device)
    seen = sorted(min(s, (case.sliding_window or s) + case.sink_tokens) for s in case.rows.seq_lens if s > 0)
    typical_len = seen[len(seen) // 2] if seen else 1
    typical = []
    for head in range(case.num_q_heads):
        near = typical_len if slopes is None else min(typical_len, 1.0 / slopes[head])  # keys ALiBi leaves in sight
        lse = math.log(max(near, 1.0)) + 0.5
        if case.data == "probe":
            lse = probe_score(typical_len) * case.scale_factor
        if case.data in ("rising", "falling"):
            lse = ramp_lse(case, typical_len) * case.scale_factor
        if case.data in _SHIFTS:
            lse += _SHIFTS[case.data] * SHIFTED_MEAN * case.scale_factor
        if case.data in NEEDLES:
            lse = 0.0
        if case.logits_soft_cap is not None and case.data in ("probe", "negative", "large"):
            lse = case.logits_soft_cap * math.tanh(lse / case.logits_soft_cap)
        typical.append(lse)
    return noise + torch.tensor(typical, dtype=torch.float32, device=device)


def probe_score(seq_len: int) -> float:
    """Score of a probed key: enough above its neighbours, whose scores are about N(0, 1), to outweigh them all."""
    return math.log(max(seq_len, 1)) + 4.0


def _generic(case: Case, stream: str, shape: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Independent draws of law `outliers` or `tiny`, or of `normal` for any other, in the case's dtype: [*shape]."""
    dtype = element_type(case.dtype).torch
    if case.data == "tiny":
        return ((random.uniform(case.data_seed, stream, shape, device) * 2.0 - 1.0) * _TINY).to(dtype)
    if case.data != "outliers":
        return random.normal(case.data_seed, stream, shape, device, dtype)
    hit = random.uniform(case.data_seed, f"{stream}/outlier", shape, device) < _OUTLIER_RATE
    large = random.normal(case.data_seed, f"{stream}/size", shape, device) * _OUTLIER_SIZE
    return (random.normal(case.data_seed, stream, shape, device) + large * hit).to(dtype)


def _shift_of_keys(case: Case) -> float:
    """Length of keys along the shared direction, in sqrt(head_size): moves the mean of scores by SHIFTED_MEAN."""
    return SHIFTED_MEAN / (_SHIFTED_QUERY * math.sqrt(case.head_size))


def _directions(case: Case, device: torch.device | str) -> torch.Tensor:
    """One random corner of the cube per KV head: float32 [num_kv_heads, head_size] of -1 and 1."""
    draws = random.integers(case.data_seed, "directions", (case.num_kv_heads, case.head_size), 2, device)
    return (2 * draws - 1).to(torch.float32)


def _probe_queries(case: Case, k: torch.Tensor) -> torch.Tensor:
    """beta sqrt(d) sum_t k_t / |k_t|^2 over one seen key and the first masked ones: [num_tokens, heads, head_size].

    Each k_t then has score beta. The first masked keys are pos + 1 (causal), pos - window, and the one behind the sink
    tokens.
    """
    q = torch.zeros(
        (case.rows.num_tokens, case.num_q_heads, case.head_size), dtype=element_type(case.dtype).torch, device=k.device
    )
    for span in spans(case.rows, k.device, max(1, _CHUNK // (case.num_q_heads * case.head_size))):
        if span.seq_len <= 0:
            continue
        target, seen = pick_targets(case, span)
        points = [(target, seen.expand_as(target))]
        pos = span.query_pos[:, None].expand_as(target)
        if case.causal:
            points.append((pos + 1, (pos + 1 >= 0) & (pos + 1 < span.seq_len)))
        if case.sliding_window is not None:
            left = pos - case.sliding_window
            points.append((left, left >= case.sink_tokens))
            if case.sink_tokens:
                points.append((torch.full_like(pos, case.sink_tokens), left > case.sink_tokens))
        total = torch.zeros((*target.shape, case.head_size), dtype=torch.float32, device=k.device)
        for position, exists in points:
            total += _towards(case, k, span, position.clamp(0, span.seq_len - 1), exists)
        q[span.tokens] = total.to(q.dtype)
    return q


def _towards(case: Case, k: torch.Tensor, span: Span, position: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """beta sqrt(d) k_t / |k_t|^2, 0 where not `exists`: float32 [tokens, heads, head_size].

    `position`, `exists` [tokens, heads].
    """
    kv_head = torch.arange(case.num_q_heads, device=k.device) // case.gqa_ratio
    key = k[span.keys.start + position, kv_head].to(torch.float32)  # [tokens, heads, head_size]
    fixed = (key * 1024.0).round().to(torch.int64)  # integers: their sum of squares is exact in any order
    square = (fixed * fixed).sum(dim=-1).clamp(min=1).to(torch.float64) * 2.0**-20
    length = torch.full_like(square, probe_score(span.seq_len) * math.sqrt(case.head_size))
    weight = torch.where(exists, length / square, torch.zeros_like(square)).to(torch.float32)
    return key * weight[:, :, None]
