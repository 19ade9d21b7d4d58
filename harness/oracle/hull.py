"""Hull: every output lies within the range of the values its row attends to, dim by dim.

Invariant: exact, no probability. An output is a mean of values with weights >= 0 whose sum is 1 (a sink, or no key at
all, brings in the value 0), so each element lies between the smallest and the largest value of its dim. The slack is
what roundings may do to that sum of weights, and one rounding of the output. It needs no softmax, hence no reference:
a fault that kernel and reference share cannot hide from it.
"""

from __future__ import annotations

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from harness.oracle.gains import HullFindings
from harness.oracle.tolerance import U32, UNDERFLOW
from references.attention import AttentionInputs


def judge_hull(inputs: AttentionInputs, out: torch.Tensor, profile: NumericsProfile, q_dtype: str) -> HullFindings:
    """`out` [num_tokens, num_q_heads, head_size_v], stored values times the output scale, any float dtype.

    NaN is not outside: other checks count it.
    """
    num_tokens, num_q_heads, size = out.shape
    if out.numel() == 0:
        return HullFindings(0, 0)
    heads = inputs.v.shape[1]
    low, high = attended_range(inputs)  # [num_tokens, num_kv_heads, head_size_v] each
    slack = _slack(low, high, inputs, profile, q_dtype)
    low, high = (low - slack)[:, :, None], (high + slack)[:, :, None]
    out_type = element_type(profile.out_type(q_dtype))
    if out_type.size == 1:  # what lies beyond its range is stored as its end
        largest = out_type.largest * profile.out_scale
        low, high = low.clamp(max=largest), high.clamp(min=-largest)
    by_kv_head = out.view(num_tokens, heads, num_q_heads // heads, size).to(low.dtype)
    over = torch.maximum(by_kv_head - high, low - by_kv_head)  # > 0 outside; NaN compares false
    outside = over > 0
    worst = torch.where(outside, over / (high - low).clamp(min=UNDERFLOW), -1.0).argmax()
    at = torch.stack([x.expand_as(over).flatten()[worst] for x in (by_kv_head, low, high)])
    num_outside, _, got, least, most = torch.cat((torch.stack((outside.sum(), worst)).to(at), at)).tolist()
    if not num_outside:
        return HullFindings(0, out.numel())
    row, dim = divmod(int(worst), size)
    token, head = divmod(row, num_q_heads)
    return HullFindings(int(num_outside), out.numel(), token, head, dim, got, least, most)


def attended_range(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value that each row attends to, 0 included with sinks and for rows without keys.

    [num_tokens, num_kv_heads, head_size_v] each, in the dtype of v. Ranges of keys are covered by two overlapping runs
    of 2^level keys, whose extremes come from those of the level below.
    """
    start, first, end = _key_ranges(inputs)
    extremes = torch.cat((inputs.v, -inputs.v), dim=2)  # [num_keys, heads, 2 dv]
    highest = _largest(extremes, first, end)
    if inputs.sink_tokens:
        behind = (first - start).clamp(max=inputs.sink_tokens)  # sink tokens that the window has left behind
        of_sinks = _largest(extremes, start, start + behind)
        has_some = (behind > 0).to(highest.device)[:, None, None]
        highest = torch.where(has_some, torch.maximum(highest, of_sinks), highest)
    high, low = highest.tensor_split(2, dim=2)
    if inputs.sinks is not None:
        high, low = high.clamp(min=0), low.clamp(min=0)  # low is negated still
    return -low, high


def _largest(values: torch.Tensor, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Largest of `values` [num_keys, heads, n] over keys [first, end), [num_tokens] each; 0 where there are none.

    [num_tokens, heads, n]
    """
    highest = values.new_zeros(len(first), *values.shape[1:])
    level_of = torch.floor(torch.log2((end - first).clamp(min=1).double())).long()  # exact below 2^50
    level_of[end <= first] = -1
    order = level_of.argsort()
    counts = torch.bincount(level_of + 1).tolist()  # rows that see nothing, then of each level
    index = torch.stack((order, first[order], end[order])).to(values.device)  # one transfer
    start = counts[0]
    for level, count in enumerate(counts[1:]):
        if level:
            values = torch.maximum(values[: -(1 << level - 1)], values[1 << level - 1 :])
        rows, left, right = index[:, start : start + count]
        if count:
            highest[rows] = torch.maximum(values[left], values[right - (1 << level)])
        start += count
    return highest


def _key_ranges(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token the first key of its sequence, and the keys [first, end) that it sees, sink tokens aside.

    Packed, int64 [num_tokens], on the CPU.
    """
    starts, firsts, ends, start = [], [], [], 0
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        position = torch.arange(seq_len - query_len, seq_len)
        window = inputs.sliding_window
        first = torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)
        end = (position + 1).clamp(min=0) if inputs.causal else torch.full_like(position, seq_len)
        starts.append(torch.full_like(first, start))
        firsts.append(start + first)
        ends.append(start + torch.maximum(end, first) if seq_len else start + first)
        start += seq_len
    return torch.cat(starts), torch.cat(firsts), torch.cat(ends)


def _slack(
    low: torch.Tensor, high: torch.Tensor, inputs: AttentionInputs, profile: NumericsProfile, q_dtype: str
) -> torch.Tensor:
    """Error of the sum of weights, times the largest value, and half an ulp of the output; same shape as `low`.

    Each weight is rounded by u_P at most; sums of n terms in float32, truncated, by 2 n u32. Weights flushed to zero
    are lost and only shorten the sum, unless 0 lies outside the range: they count as rounded then.
    """
    names = {profile.p_type(q_dtype, cached) for cached in (True, False)}
    p_types = [element_type(name) for name in names]
    out_type = element_type(profile.out_type(q_dtype))
    longest = max(inputs.seq_lens, default=0)
    weights = max(p.unit_roundoff for p in p_types) + 2 * (longest + 8) * U32
    weights += longest * max(p.half_subnormal for p in p_types) / profile.p_scale
    if profile.split_partial_dtype != "fp32":
        weights += element_type(profile.split_partial_dtype).unit_roundoff
    largest = torch.maximum(low.abs(), high.abs())
    slack = largest * ((1 + weights) * (1 + out_type.unit_roundoff) - 1)
    return slack + (out_type.half_subnormal * profile.out_scale + UNDERFLOW)
