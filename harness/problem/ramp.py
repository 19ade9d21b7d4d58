"""Laws `rising` and `falling`: scores that climb, or drop, along the keys of a sequence.

Invariant: a key agrees with its queries in `level` of its signs, and the level runs from 0 to head_size along the
sequence, so the score is an increasing function of the position (a decreasing one in `falling`) for every query, but
for a noise that is small against the rise over sixteen keys of a sequence of a thousand. Elements stay near +-1, which
every cache type holds: a rise carried by the size of the keys would end in the rounding of fp8.
"""

from __future__ import annotations

import math

import torch

from harness.case import Case
from harness.problem import random
from harness.problem.spans import key_start, spans

_NOISE = 1.0 / 16.0  # of a key's elements, so that keys of one level differ
_RISE_PER_KEY = 1.0 / 8.0  # in score: about eight keys at the top share most of the mass
_RISE_PER_DIM = 1.0 / 2.0  # at most, in score: the whole rise stays below head_size / 2


def ramp_keys(case: Case, device: torch.device | str) -> torch.Tensor:
    """float32 [num_keys, num_kv_heads, head_size]: signs that agree with `ramp_queries` in more and more places."""
    heads, dim = case.num_kv_heads, case.head_size
    starts = key_start(case.rows)
    order = torch.stack([
        torch.tensor(random.permutation(case.data_seed, f"ramp/{head}", dim), device=device) for head in range(heads)
    ])  # [num_kv_heads, head_size]: the place of each dimension in the order in which signs turn  # fmt: skip
    keys = random.normal(case.data_seed, "k", (starts[-1], heads, dim), device) * _NOISE
    for seq, seq_len in enumerate(case.rows.seq_lens):
        if seq_len <= 0:
            continue
        length, position = _ramp_len(case, seq_len), torch.arange(seq_len, device=device)
        steps = length - position if case.data == "falling" else position + 1
        level = torch.div(steps * dim, length, rounding_mode="floor")  # [seq_len] integers: exact
        agrees = order < level[:, None, None]  # [seq_len, num_kv_heads, head_size]
        sign = (2 * agrees.to(torch.float32) - 1) * _signs(case, device)
        keys[starts[seq] : starts[seq + 1]] += sign
    return keys


def ramp_queries(case: Case, device: torch.device | str) -> torch.Tensor:
    """float32 [num_tokens, num_q_heads, head_size]: the signs of their KV head, at sizes that differ (1/2 to 3/2)."""
    shape = (case.rows.num_tokens, case.num_q_heads, case.head_size)
    q = random.uniform(case.data_seed, "q", shape, device) + 0.5
    q *= _signs(case, device).repeat_interleave(case.gqa_ratio, dim=0)
    for span in spans(case.rows, device):
        rise = ramp_rise(case, _ramp_len(case, span.seq_len))
        q[span.tokens] *= rise / (2.0 * math.sqrt(case.head_size))
    return q


def ramp_rise(case: Case, seq_len: int) -> float:
    """Score of the highest key less that of the lowest, for a typical query of a sequence of `seq_len` keys."""
    return min(_RISE_PER_KEY * max(seq_len, 0), _RISE_PER_DIM * case.head_size)


def ramp_lse(case: Case, seq_len: int) -> float:
    """LSE of a query that sees the highest key, roughly."""
    rise = ramp_rise(case, seq_len)
    return rise / 2 + math.log(max(seq_len, 1) / max(rise, 1.0) + 0.5)


def _ramp_len(case: Case, seq_len: int) -> int:
    """Keys over which the level runs: those of the longest sequence where sequences share keys."""
    return max(case.rows.seq_lens) if case.placement.kind == "shared_prefix" else seq_len


def _signs(case: Case, device: torch.device | str) -> torch.Tensor:
    """One random corner of the cube per KV head: float32 [num_kv_heads, head_size] of -1 and 1."""
    draws = random.integers(case.data_seed, "directions", (case.num_kv_heads, case.head_size), 2, device)
    return (2 * draws - 1).to(torch.float32)
