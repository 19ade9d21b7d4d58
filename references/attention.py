"""Attention in float64, with the moments from which a tolerance follows. Needs torch only, knows no kernel.

Invariant: `out` and `lse` depend on nothing but the inputs; how a kernel rounds (`Rounding`) only selects the moments.

For query row i of a sequence, at position t = seq_len - query_len + i, and key position j it sees:

    s_j = softmax_scale * q . k_j;   s_j = cap * tanh(s_j / cap);   s_j += slope * (j - t)
    m = max(s_j, sink);   x_j = exp(s_j - m);   l = sum x_j + exp(sink - m);   p_j = x_j / l
    out = sum p_j v_j;    lse = m + ln l

A row sees 0 <= j < seq_len, j <= t if causal, t - j < sliding_window if there is a window. A row that sees nothing
has out 0 and lse -inf, or the sink.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from references.quantities import AttentionInputs, AttentionReference, Rounding
from references.tile import SequenceKeys, Tile

__all__ = ["AttentionInputs", "AttentionReference", "Rounding", "attend"]

DEFAULT_MAX_ELEMENTS = 1 << 25  # 256 MiB per float64 tile
CAUSAL_TILE_ROWS = 256  # rows per tile under a causal mask: a tile computes the keys of its last row for all its rows


def attend(
    inputs: AttentionInputs, rounding: Rounding, *, max_elements: int = DEFAULT_MAX_ELEMENTS
) -> AttentionReference:
    """Reference attention of `inputs`, on the device of q.

    Memory: no temporary holds more than N = max(max_elements, gqa_ratio * max(longest seq_len, 2 * head_size_v,
    head_size)) elements, and at most 4 such float64 temporaries are alive at once (32 N bytes); beside them the
    result and float64 copies of k and 3 times v of one sequence.
    """
    result = _empty_result(inputs, rounding)
    token = key = 0
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        rows, keys = slice(token, token + query_len), slice(key, key + seq_len)
        _attend_sequence(inputs, result, rows, keys, max_elements)
        token, key = rows.stop, keys.stop
    if rounding.half_subnormal == 0:
        torch.mul(result.abs_pv, rounding.unit_roundoff, out=result.cast_sum)
    return result


def _empty_result(inputs: AttentionInputs, rounding: Rounding) -> AttentionReference:
    """The result for rows that see nothing."""
    num_tokens, num_q_heads, _ = inputs.q.shape
    shapes = {"out": (num_tokens, num_q_heads, inputs.v.shape[2]), "row": (num_tokens, num_q_heads)}
    per_element = ("out", "abs_pv", "cast_square", "cast_sum", "flush_sum")
    not_tensors = ("lse", "num_visible", "logits_soft_cap", "rounding")
    tensors = {
        field.name: inputs.q.new_zeros(shapes["out" if field.name in per_element else "row"], dtype=torch.float64)
        for field in fields(AttentionReference)
        if field.name not in not_tensors
    }
    lse = inputs.q.new_full(shapes["row"], float("-inf"), dtype=torch.float64)
    if inputs.sinks is not None:
        lse.copy_(inputs.sinks.expand_as(lse))
        tensors["offset"].copy_(inputs.sinks.abs().expand_as(lse))
    num_visible = inputs.q.new_zeros(num_tokens, dtype=torch.float64)
    return AttentionReference(
        **tensors,
        lse=lse,
        num_visible=num_visible,
        logits_soft_cap=inputs.logits_soft_cap or 0.0,
        rounding=rounding,
    )


def _attend_sequence(
    inputs: AttentionInputs, result: AttentionReference, rows: slice, keys: slice, max_elements: int
) -> None:
    query_len, seq_len = rows.stop - rows.start, keys.stop - keys.start
    first_pos = seq_len - query_len
    blind_rows = max(-first_pos, 0) if inputs.causal else 0
    if seq_len == 0 or blind_rows == query_len:
        return
    num_q_heads, num_kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    group = num_q_heads // num_kv_heads

    k = inputs.k[keys].double().permute(1, 2, 0).contiguous()  # [num_kv_heads, head_size, seq_len]
    v = inputs.v[keys].double().permute(1, 0, 2).contiguous()  # [num_kv_heads, seq_len, head_size_v]
    sequence = SequenceKeys(k, torch.cat((v, v.abs()), dim=-1), v * v)
    seen = slice(rows.start + blind_rows, rows.stop)
    longest_key = k.square().sum(1).amax(-1).sqrt_().repeat_interleave(group)  # [num_q_heads]
    result.logit_bound[seen] = inputs.q[seen].double().norm(dim=-1) * longest_key * abs(inputs.softmax_scale)
    result.max_abs_v[seen] = v.abs().amax((1, 2)).repeat_interleave(group)

    width = max(_widest_span(inputs, query_len, seq_len), 2 * v.shape[2], k.shape[1])
    kv_heads = min(num_kv_heads, max(max_elements // (group * width), 1))
    tile_rows = max(max_elements // (kv_heads * group * width), 1)
    if inputs.causal:
        tile_rows = min(tile_rows, CAUSAL_TILE_ROWS)
    for row in range(blind_rows, query_len, tile_rows):
        row_end = min(row + tile_rows, query_len)
        positions = range(first_pos + row, first_pos + row_end)
        for head in range(0, num_kv_heads, kv_heads):
            tile = Tile(
                inputs,
                result,
                slice(rows.start + row, rows.start + row_end),
                slice(head, min(head + kv_heads, num_kv_heads)),
                positions,
                _span(inputs, positions, seq_len),
            )
            tile.run(sequence)


def _span(inputs: AttentionInputs, positions: range, seq_len: int) -> slice:
    """The keys that any of the query positions sees; for non-causal windows the leftmost bound counts."""
    start = 0 if inputs.sliding_window is None else max(positions[0] - inputs.sliding_window + 1, 0)
    return slice(start, min(positions[-1] + 1, seq_len) if inputs.causal else seq_len)


def _widest_span(inputs: AttentionInputs, query_len: int, seq_len: int) -> int:
    """Upper bound on the number of keys of any tile."""
    if inputs.sliding_window is None or not inputs.causal:
        return seq_len
    return min(seq_len, inputs.sliding_window + min(query_len, CAUSAL_TILE_ROWS))
