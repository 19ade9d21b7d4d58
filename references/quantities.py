"""What goes into the reference and what comes out of it: frozen records of tensors, shapes and meanings stated.

Invariant: nothing here computes; nothing here knows a kernel, a cache or a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AttentionInputs:
    """What a right kernel sees: values after dequantisation, packed by sequence.

    k and v hold positions [0, seq_len) of each sequence, one sequence after the other. A seq_len may be less than
    its query_len (the first rows then lie before the first key) and may be 0.
    """

    q: torch.Tensor  # [num_tokens, num_q_heads, head_size] any float dtype
    k: torch.Tensor  # [num_keys, num_kv_heads, head_size] float32 or float64
    v: torch.Tensor  # [num_keys, num_kv_heads, head_size_v] float32 or float64
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    softmax_scale: float
    causal: bool = True
    sliding_window: int | None = None  # keys a query sees to its left, itself included
    logits_soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None  # [num_q_heads]
    sinks: torch.Tensor | None = None  # [num_q_heads] logits, not scaled again
    sink_tokens: int = 0  # leading keys of each sequence that the window does not hide
    q_cached: torch.Tensor | None = None  # [num_tokens, num_q_heads, head_size] instead of q, for keys < cached_lens
    cached_lens: tuple[int, ...] | None = None  # per sequence; for q_cached and Rounding.cached
    weight_scale: torch.Tensor | None = None  # [num_keys, num_kv_heads] > 0: folded into P before P is rounded

    def __post_init__(self) -> None:
        num_tokens, num_q_heads, head_size = self.q.shape
        num_keys, num_kv_heads, _ = self.v.shape
        wanted = (
            ("query_lens and seq_lens", (len(self.query_lens),), (len(self.seq_lens),)),
            ("q tokens", (sum(self.query_lens),), (num_tokens,)),
            ("k", (sum(self.seq_lens), num_kv_heads, head_size), tuple(self.k.shape)),
            ("v tokens", (sum(self.seq_lens),), (num_keys,)),
            ("num_q_heads modulo num_kv_heads", 0, num_q_heads % num_kv_heads),
            ("q_cached", tuple(self.q.shape), tuple(self.q.shape if self.q_cached is None else self.q_cached.shape)),
            ("cached_lens", len(self.seq_lens), len(self.seq_lens if self.cached_lens is None else self.cached_lens)),
        )
        for what, expected, got in wanted:
            if expected != got:
                raise ValueError(f"attention inputs: {what}: expected {expected}, got {got}")
        if self.q_cached is not None and self.cached_lens is None:
            raise ValueError("attention inputs: q_cached needs cached_lens, which say where it ends")


@dataclass(frozen=True)
class Rounding:
    """How a kernel rounds x_j before the product with V: the half ulp is max(u x_j, min(x_j, half_subnormal)).

    Where a weight w_j is folded into P, w_j x_j is what is rounded: half_subnormal then means half_subnormal / w_j.
    """

    unit_roundoff: float  # u: 2^-8 bfloat16, 2^-11 float16, 2^-24 float32
    half_subnormal: float = 0.0  # half the subnormal spacing, over the factor that x is scaled by
    row_sums: bool = False  # also return the moments without V, for kernels whose row sum adds rounded values
    cached: Rounding | None = None  # for keys below cached_lens, where it differs; its row_sums does not count


@dataclass(frozen=True)
class AttentionReference:
    """Results and moments, float64. A_j = max(u x_j, min(x_j, half_subnormal)) / l is the half ulp of p_j; keys with
    x_j < 2 half_subnormal may be flushed to zero, which is biased, so their A_j is summed separately.

    out, lse, row_mass, row_square and peak are exact to float64. Moments (from abs_pv to row_flush_sum) are exact where
    they were summed in float64; summed in another type they are upper bounds, by at most some percent.
    """

    out: torch.Tensor  # [num_tokens, num_q_heads, head_size_v]
    lse: torch.Tensor  # [num_tokens, num_q_heads] natural log, sink included
    abs_pv: torch.Tensor  # [num_tokens, num_q_heads, head_size_v] sum p_j |v_j|
    cast_square: torch.Tensor  # [num_tokens, num_q_heads, head_size_v] sum A_j^2 v_j^2 over keys not flushed
    cast_sum: torch.Tensor  # [num_tokens, num_q_heads, head_size_v] sum A_j |v_j| over keys not flushed
    flush_sum: torch.Tensor  # [num_tokens, num_q_heads, head_size_v] sum A_j |v_j| over flushed keys
    row_cast_square: torch.Tensor  # [num_tokens, num_q_heads] sum A_j^2 over keys not flushed; 0 without row_sums
    row_cast_sum: torch.Tensor  # [num_tokens, num_q_heads] sum A_j over keys not flushed; 0 without row_sums
    row_flush_sum: torch.Tensor  # [num_tokens, num_q_heads] sum A_j over flushed keys; 0 without row_sums
    row_mass: torch.Tensor  # [num_tokens, num_q_heads] sum p_j: 1 without a sink, 0 for rows that see nothing
    row_square: torch.Tensor  # [num_tokens, num_q_heads] sum p_j^2
    peak: torch.Tensor  # [num_tokens, num_q_heads] exp(m - lse) = 1 / l; 0 for rows that see nothing
    offset: torch.Tensor  # [num_tokens, num_q_heads] bound on sum p_j |slope (j - t)| + p_sink |sink|
    largest_logit: torch.Tensor  # [num_tokens, num_q_heads] bound on |s_j| before cap and bias, hidden keys included
    logit_bound: torch.Tensor  # [num_tokens, num_q_heads] softmax_scale |q| max|k| >= |s_j| before cap and bias
    dot_bound: torch.Tensor  # [num_tokens, num_q_heads] softmax_scale sqrt(|q*q| max|k*k|), norms of squared vectors
    max_abs_v: torch.Tensor  # [num_tokens, num_q_heads] largest |v| of the sequence and kv head
    key_repeats: torch.Tensor  # [num_tokens, num_q_heads] how often the most repeated key of that sequence occurs
    num_visible: torch.Tensor  # [num_tokens] number of keys the row sees
    logits_soft_cap: float  # 0 without one
    rounding: Rounding

    def part(self, tokens: slice) -> AttentionReference:
        """The rows of some tokens, as views."""
        fields: dict[str, Any] = dict(vars(self))
        fields |= {name: x[tokens] for name, x in fields.items() if isinstance(x, torch.Tensor)}
        return AttentionReference(**fields)
