"""An honest attention kernel in float32 on the CPU: tiles, online softmax, rounded P, splits. For tests of the oracle.

Invariant: rounds only where a NumericsProfile declares it, in an order of its own; the faults are the tests' business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from references.attention import AttentionInputs


@dataclass(frozen=True)
class Schedule:
    """The order a kernel works in, which its tolerance must not depend on."""

    tile: int = 64
    reverse: bool = False
    splits: int = 1


def run_emulated(
    inputs: AttentionInputs,
    profile: NumericsProfile,
    q_dtype: str,
    schedule: Schedule = Schedule(),
    *,
    causal_shift: int = 0,
    dropped_keys: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [num_tokens, num_q_heads, head_size_v], lse [num_tokens, num_q_heads] float32).

    `causal_shift` lets a row see so many keys of its future, `dropped_keys` hides the newest keys of each sequence:
    the two faults that cannot be planted through `inputs`.
    """
    out_dtype = element_type(profile.out_type(q_dtype)).torch
    outs, lses = [], []
    first_key = token = 0
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        group = inputs.q.shape[1] // inputs.k.shape[1]
        q = inputs.q[token : token + query_len].float().transpose(0, 1)  # [heads, rows, d]
        keys = slice(first_key, first_key + seq_len)
        k = inputs.k[keys].float().transpose(0, 1).repeat_interleave(group, 0)  # [heads, keys, d]
        v = inputs.v[keys].float().transpose(0, 1).repeat_interleave(group, 0)  # [heads, keys, dv]
        positions = torch.arange(seq_len - query_len, seq_len, device=q.device)  # [rows]
        distance = torch.arange(seq_len, device=q.device) - positions[:, None]  # [rows, keys]
        logits = _logits(inputs, q @ k.transpose(1, 2), distance, causal_shift)
        logits[..., seq_len - dropped_keys :] = float("-inf")
        out, lse = _softmax_v(inputs, profile, q_dtype, schedule, logits, v)
        outs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
        first_key, token = keys.stop, token + query_len
    out = torch.cat(outs) / profile.out_scale
    largest = element_type(profile.out_type(q_dtype)).largest
    return out.clamp(-largest, largest).to(out_dtype), torch.cat(lses)


def _logits(inputs: AttentionInputs, dots: torch.Tensor, distance: torch.Tensor, causal_shift: int) -> torch.Tensor:
    """float32 [heads, rows, keys]"""
    logits = dots * inputs.softmax_scale
    if inputs.logits_soft_cap:
        cap = inputs.logits_soft_cap
        logits = cap * (2 / (1 + torch.exp(-2 * (logits / cap))) - 1)
    if inputs.alibi_slopes is not None:
        logits = logits + inputs.alibi_slopes.float()[:, None, None] * distance
    if inputs.causal:
        logits = logits.masked_fill(distance > causal_shift, float("-inf"))
    if inputs.sliding_window is not None:
        sink = torch.arange(distance.shape[1], device=distance.device) < inputs.sink_tokens
        logits = logits.masked_fill((-distance >= inputs.sliding_window) & ~sink, float("-inf"))
    return logits


def _softmax_v(
    inputs: AttentionInputs,
    profile: NumericsProfile,
    q_dtype: str,
    schedule: Schedule,
    logits: torch.Tensor,
    v: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Online softmax over tiles, per split; then the splits and the sink are merged."""
    p_dtype = element_type(profile.p_type(q_dtype)).torch
    partial_dtype = element_type(profile.split_partial_dtype).torch
    starts = list(range(0, logits.shape[2], schedule.tile))
    if schedule.reverse:
        starts.reverse()
    per_split = -(-len(starts) // schedule.splits) or 1
    top = logits.new_full((*logits.shape[:2], 1), float("-inf"))
    if inputs.sinks is not None:
        top = top.maximum(inputs.sinks.float()[:, None, None].expand_as(top))
    total = torch.exp(top - top).nan_to_num(nan=0.0) if inputs.sinks is not None else torch.zeros_like(top)
    out = v.new_zeros(*logits.shape[:2], v.shape[2])
    for first in range(0, len(starts), per_split):
        m = torch.full_like(top, float("-inf"))
        length, acc = torch.zeros_like(top), torch.zeros_like(out)
        for start in starts[first : first + per_split]:
            s = logits[..., start : start + schedule.tile]
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            safe = m_new.masked_fill(m_new == float("-inf"), 0.0)
            p = torch.exp(s - safe)
            rounded = (p * profile.p_scale).to(p_dtype).float()
            keep = torch.exp(m - safe)
            summed = rounded / profile.p_scale if profile.sum_after_cast else p
            length = length * keep + summed.sum(-1, keepdim=True)
            acc = acc * keep + rounded @ v[:, start : start + schedule.tile]
            m = m_new
        partial = (acc / profile.p_scale / length).nan_to_num(nan=0.0).to(partial_dtype).float()
        new_top = torch.maximum(top, m)
        safe = new_top.masked_fill(new_top == float("-inf"), 0.0)
        weight = length * torch.exp(m - safe)
        out = out * torch.exp(top - safe) + partial * weight
        total = total * torch.exp(top - safe) + weight
        top = new_top
    return (out / total).nan_to_num(nan=0.0), (top + torch.log(total)).squeeze(-1)
