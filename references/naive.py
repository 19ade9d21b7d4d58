"""A second attention, written differently: one token, one head, one key at a time, in Python floats and lists.

Invariant: shares no arithmetic with references.attention, so that the two can only agree by both being right. For
tests of small sizes; each quantity is written straight from its definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from references.quantities import AttentionInputs, Rounding


@dataclass(frozen=True)
class NaiveResult:
    """float64; the names mean what they mean in AttentionReference."""

    out: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    lse: torch.Tensor  # [num_tokens, num_q_heads]
    abs_pv: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    cast_square: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    cast_sum: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    flush_sum: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    largest_logit: torch.Tensor  # [num_tokens, num_q_heads] max |softmax_scale q.k| over visible keys
    offset: torch.Tensor  # [num_tokens, num_q_heads] sum p |bias| + p_sink |sink|, exactly
    num_visible: torch.Tensor  # [num_tokens]
    row_mass: torch.Tensor  # [num_tokens, num_q_heads]
    row_square: torch.Tensor  # [num_tokens, num_q_heads]
    peak: torch.Tensor  # [num_tokens, num_q_heads]


def naive_attention(inputs: AttentionInputs, rounding: Rounding) -> NaiveResult:
    """Attention of `inputs` by explicit loops; slow on purpose."""
    num_q_heads = inputs.q.shape[1]
    q, k, v = inputs.q.double().tolist(), inputs.k.double().tolist(), inputs.v.double().tolist()
    q_cached = q if inputs.q_cached is None else inputs.q_cached.double().tolist()
    scales = None if inputs.weight_scale is None else inputs.weight_scale.double().tolist()
    rows = []
    token = first_key = 0
    for sequence, (query_len, seq_len) in enumerate(zip(inputs.query_lens, inputs.seq_lens, strict=True)):
        cached = 0 if inputs.cached_lens is None else inputs.cached_lens[sequence]
        for i in range(query_len):
            position = seq_len - query_len + i
            visible = [j for j in range(seq_len) if sees(inputs, position, j)]
            for head in range(num_q_heads):
                kv_head = head // (num_q_heads // inputs.k.shape[1])
                keys = [k[first_key + j][kv_head] for j in visible]
                values = [v[first_key + j][kv_head] for j in visible]
                queries = [(q_cached if j < cached else q)[token][head] for j in visible]
                roundings = [(rounding.cached or rounding) if j < cached else rounding for j in visible]
                steps = [
                    (r.unit_roundoff, r.half_subnormal / (scales[first_key + j][kv_head] if scales else 1.0))
                    for j, r in zip(visible, roundings, strict=True)
                ]
                rows.append(_one_row(inputs, steps, queries, keys, values, position, visible, head))
            token += 1
        first_key += seq_len
    shape = (token, num_q_heads, -1)
    columns = [torch.tensor(column, dtype=torch.float64).view(shape) for column in zip(*rows, strict=True)]
    out, abs_pv, cast_square, cast_sum, flush_sum, lse, largest, offset, count, mass, square, peak = columns
    return NaiveResult(
        out,
        lse[..., 0],
        abs_pv,
        cast_square,
        cast_sum,
        flush_sum,
        largest[..., 0],
        offset[..., 0],
        count[:, 0, 0],
        mass[..., 0],
        square[..., 0],
        peak[..., 0],
    )


def sees(inputs: AttentionInputs, position: int, key: int) -> bool:
    """Whether the query at `position` sees the key at position `key`."""
    if inputs.causal and key > position:
        return False
    if key < inputs.sink_tokens:
        return True
    return inputs.sliding_window is None or position - key < inputs.sliding_window


def _one_row(
    inputs: AttentionInputs,
    steps: list[tuple[float, float]],  # unit roundoff and half subnormal spacing for each key
    queries: list[list[float]],  # the query that each key meets
    keys: list[list[float]],
    values: list[list[float]],
    position: int,
    visible: list[int],
    head: int,
) -> tuple[list[float] | float, ...]:
    products = [
        inputs.softmax_scale * math.fsum(a * b for a, b in zip(q, key, strict=True))
        for q, key in zip(queries, keys, strict=True)
    ]
    logits, biases = [], []
    for product, key_position in zip(products, visible, strict=True):
        cap, slopes = inputs.logits_soft_cap, inputs.alibi_slopes
        biases.append(0.0 if slopes is None else float(slopes[head]) * (key_position - position))
        logits.append((cap * math.tanh(product / cap) if cap else product) + biases[-1])
    sink = -math.inf if inputs.sinks is None else float(inputs.sinks[head])
    largest = max(math.fabs(product) for product in products) if products else 0.0

    top = max([*logits, sink])
    if top == -math.inf:  # nothing to attend to
        zeros = [0.0] * inputs.v.shape[2]
        return zeros, zeros, zeros, zeros, zeros, -math.inf, largest, 0.0, 0, 0.0, 0.0, 0.0
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum([*weights, math.exp(sink - top)])
    half_ulps, flushed = [], []
    for x, (unit_roundoff, half_subnormal) in zip(weights, steps, strict=True):
        half_ulps.append(max(unit_roundoff * x, min(x, half_subnormal)) / total)
        flushed.append(x < 2 * half_subnormal)

    def over_keys(term: list[float], power: int = 1, magnitude: bool = True) -> list[float]:
        columns = ([value[c] for value in values] for c in range(inputs.v.shape[2]))
        size = math.fabs if magnitude else float
        return [math.fsum(w * size(x) ** power for w, x in zip(term, column, strict=True)) for column in columns]

    kept = [0.0 if f else a for a, f in zip(half_ulps, flushed, strict=True)]
    lost = [a if f else 0.0 for a, f in zip(half_ulps, flushed, strict=True)]
    probabilities = [w / total for w in weights]
    offset = math.fsum(p * math.fabs(b) for p, b in zip(probabilities, biases, strict=True))
    if inputs.sinks is not None:
        offset += math.exp(sink - top) / total * math.fabs(sink)
    return (
        over_keys(probabilities, magnitude=False),
        over_keys(probabilities),
        over_keys([a * a for a in kept], power=2),
        over_keys(kept),
        over_keys(lost),
        top + math.log(total),
        largest,
        offset,
        len(visible),
        math.fsum(probabilities),
        math.fsum(p * p for p in probabilities),
        1 / total if visible else 0.0,
    )
