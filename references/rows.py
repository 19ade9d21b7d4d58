"""Attention of chosen query rows with everything kept: scores, probabilities, values; float64, sequences batched.

Invariant: padded rows and keys have probability 0 everywhere, so that any sum over rows or keys may include them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from references.quantities import AttentionInputs


@dataclass(frozen=True)
class Rows:
    """Rows of `num_seqs` sequences, padded to R rows and n keys; query heads are folded as [kv head, row, group]."""

    sequences: tuple[int, ...]  # which sequences of the inputs
    tokens: torch.Tensor  # [num_seqs, R] int64: packed token; 0 where padded
    positions: torch.Tensor  # [num_seqs, R] int64: position of the query; negative before the first key
    real: torch.Tensor  # [num_seqs, R] bool: not padding
    keys: torch.Tensor  # [num_seqs, n] int64: packed key; 0 where padded
    v: torch.Tensor  # [num_seqs, num_kv_heads, n, head_size_v], 0 where padded
    raw: torch.Tensor  # [num_seqs, num_kv_heads, R * gqa_ratio, n] scaled q . k, before cap and bias; masked keys too
    scores: torch.Tensor  # same shape: with cap and bias; masked keys too, padded keys -inf
    visible: torch.Tensor  # [num_seqs, 1, R * gqa_ratio, n] bool
    p: torch.Tensor  # [num_seqs, num_kv_heads, R * gqa_ratio, n], 0 where not visible
    lse: torch.Tensor  # [num_seqs, num_kv_heads, R * gqa_ratio, 1] natural log, sink included
    out: torch.Tensor  # [num_seqs, num_kv_heads, R * gqa_ratio, head_size_v]
    dot_bound: (
        torch.Tensor
    )  # [num_seqs, num_kv_heads, R * gqa_ratio] scaled sqrt(sum_c (q_c k_jc)^2) of any key, at most
    head_size: int
    soft_cap: float  # 0 without one
    cached: torch.Tensor  # [num_seqs, n] bool: keys below cached_lens; all of them where the inputs name none
    weight: torch.Tensor | None  # [num_seqs, num_kv_heads, 1, n]: folded into P before it is rounded

    @property
    def group(self) -> int:
        return self.p.shape[2] // self.tokens.shape[1]

    def pick(self, per_token: torch.Tensor) -> torch.Tensor:
        """These rows of `per_token` [num_tokens, num_q_heads, m]: [num_seqs, num_kv_heads, R * gqa_ratio, m]."""
        num_seqs, num_rows = self.tokens.shape
        shape = num_seqs, num_rows, self.p.shape[1], self.group, per_token.shape[2]
        return per_token[self.tokens].view(shape).transpose(1, 2).flatten(2, 3)


def attention_rows(inputs: AttentionInputs, sequences: Sequence[int], rows: Sequence[Sequence[int]]) -> Rows:
    """`rows[i]` are indices of query rows within sequence `sequences[i]`, in [0, query_len).

    Memory: about 6 float64 temporaries of [len(sequences), num_q_heads, most rows, most keys]; callers choose the rows.
    """
    device, num_kv_heads = inputs.q.device, inputs.k.shape[1]
    group = inputs.q.shape[1] // num_kv_heads
    tokens, positions, real, keys, exists = (x.to(device) for x in _indices(inputs, sequences, rows))
    num_rows = tokens.shape[1]

    k = inputs.k[keys].double().transpose(1, 2)  # [num_seqs, num_kv_heads, n, head_size]
    v = (inputs.v[keys] * exists[:, :, None, None]).double().transpose(1, 2).contiguous()
    q = _queries(inputs, inputs.q, tokens)
    raw = q @ k.transpose(2, 3)  # [num_seqs, num_kv_heads, R * group, n]
    cached_lens = torch.tensor([(inputs.cached_lens or inputs.seq_lens)[s] for s in sequences], device=device)
    cached = torch.arange(keys.shape[1], device=device) < cached_lens[:, None]  # [num_seqs, n]
    if inputs.q_cached is not None:
        q_cached = _queries(inputs, inputs.q_cached, tokens)
        raw = torch.where(cached[:, None, None], q_cached @ k.transpose(2, 3), raw)
        q = torch.maximum(q.abs(), q_cached.abs())  # for the bound
    weight = None if inputs.weight_scale is None else inputs.weight_scale[keys].double().transpose(1, 2)[:, :, None]
    longest = k.square().square_().sum(-1).amax(-1, keepdim=True)  # [num_seqs, num_kv_heads, 1]
    dot_bound = (q.square().square_().sum(-1) * longest).sqrt_().sqrt_()  # by Cauchy-Schwarz on the squares

    scores = raw
    if inputs.logits_soft_cap:
        scores = (raw / inputs.logits_soft_cap).tanh_().mul_(inputs.logits_soft_cap)
    distance = torch.arange(keys.shape[1], device=device) - positions[:, :, None]  # [num_seqs, R, n]
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.double().view(num_kv_heads, 1, group, 1)
        bias = slopes * distance[:, None, :, None]  # [num_seqs, num_kv_heads, R, group, n]
        scores = scores + bias.flatten(2, 3)
    visible = exists[:, None, :] & real[:, :, None]  # [num_seqs, R, n]
    if inputs.causal:
        visible = visible & (distance <= 0)
    if inputs.sliding_window is not None:
        sink = torch.arange(keys.shape[1], device=device) < inputs.sink_tokens  # [n]
        visible = visible & ((-distance < inputs.sliding_window) | sink)
    visible = visible.repeat_interleave(group, dim=1)[:, None]  # [num_seqs, 1, R * group, n]
    scores = scores.masked_fill(~exists[:, None, None], float("-inf"))

    seen = scores.masked_fill(~visible, float("-inf"))
    lse = seen.logsumexp(-1, keepdim=True)
    if inputs.sinks is not None:
        sinks = inputs.sinks.double().view(num_kv_heads, 1, group).expand(-1, num_rows, -1)
        lse = torch.logaddexp(lse, sinks.reshape(1, num_kv_heads, -1, 1))
    p = (seen - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
    return Rows(
        tuple(sequences),
        tokens,
        positions,
        real,
        keys,
        v,
        raw,
        scores,
        visible,
        p,
        lse,
        p @ v,
        dot_bound,
        k.shape[3],
        inputs.logits_soft_cap or 0.0,
        cached,
        weight,
    )


def _queries(inputs: AttentionInputs, packed: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`packed` [num_tokens, num_q_heads, d] times the scale [num_seqs, num_kv_heads, R * gqa_ratio, d], float64"""
    shape = *tokens.shape, inputs.k.shape[1], -1, packed.shape[2]
    return packed[tokens].double().view(shape).transpose(1, 2).flatten(2, 3) * inputs.softmax_scale


def _indices(
    inputs: AttentionInputs, sequences: Sequence[int], rows: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, ...]:
    """tokens, positions, real [num_seqs, R]; keys, exists [num_seqs, n]; on the CPU."""
    num_rows, num_keys = max(map(len, rows)), max(max(inputs.seq_lens[s], 0) for s in sequences)
    first_token = [sum(inputs.query_lens[:s]) for s in sequences]
    first_key = torch.tensor([sum(inputs.seq_lens[:s]) for s in sequences])
    seq_lens = torch.tensor([inputs.seq_lens[s] for s in sequences])
    context = seq_lens - torch.tensor([inputs.query_lens[s] for s in sequences])
    padded = torch.tensor([[*row, *[-1] * (num_rows - len(row))] for row in rows]).view(len(rows), num_rows)
    real = padded >= 0
    tokens = (padded + torch.tensor(first_token)[:, None]) * real
    key = torch.arange(num_keys).expand(len(rows), -1)
    exists = key < seq_lens[:, None]
    return tokens, padded + context[:, None], real, (key + first_key[:, None]) * exists, exists
