"""Split-KV: which keys a split owns, and the kernel that merges what the splits stored.

Invariant: a split without keys stores nothing and is never loaded here, whatever the workspace holds; a sink enters the
softmax here and in no split.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._shared.query_tile import query_rows
from .._shared.softmax_rows import initial_max_and_sum, rescale, store_rows

_RUNTIME = (
    "query_start_loc_ptr", "seq_lens_ptr", "sinks_ptr", "output_scale_ptr", "out_ptr", "lse_ptr", "partial_out_ptr",
    "partial_max_ptr", "partial_sum_ptr", "gqa_ratio", "head_size_v", "num_splits", "out_stride_token",
    "out_stride_head", "lse_stride_token", "lse_stride_head", "part_stride_split", "part_stride_token",
    "part_stride_head", "max_stride_split", "max_stride_token", "sum_stride_split", "sum_stride_token",
)  # fmt: skip


@triton.jit
def keys_per_split(seq_len, num_splits, BLOCK_N: tl.constexpr):
    """Keys each split owns: whole tiles, at least one."""
    return tl.maximum(tl.cdiv(tl.cdiv(seq_len, BLOCK_N), num_splits), 1) * BLOCK_N


@triton.jit
def part_offsets(split, token, head, stride_split: tl.int64, stride_token: tl.int64, stride_head: tl.int64):
    """Where the part of `split` lies in a workspace, int64 [BLOCK_M]; token int64, head [BLOCK_M]."""
    return split * stride_split + token * stride_token + head * stride_head


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=("out_stride_dim",))
def split_kv_combine_kernel(
    query_start_loc_ptr,  # [num_seqs + 1] int32
    seq_lens_ptr,  # [num_seqs] int32
    sinks_ptr,  # [num_q_heads] float32 or None
    output_scale_ptr,  # [1] float32 or None
    out_ptr,  # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,  # [num_tokens, num_q_heads] float32 or None
    partial_out_ptr,  # [num_splits, num_tokens, num_q_heads, head_size_v] float32
    partial_max_ptr,  # [num_splits, num_tokens, num_q_heads] float32
    partial_sum_ptr,  # [num_splits, num_tokens, num_q_heads] float32
    gqa_ratio: tl.int32,
    head_size_v: tl.int32,
    num_splits: tl.int32,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    out_stride_dim: tl.int64,
    lse_stride_token: tl.int64,
    lse_stride_head: tl.int64,
    part_stride_split: tl.int64,
    part_stride_token: tl.int64,
    part_stride_head: tl.int64,
    max_stride_split: tl.int64,
    max_stride_token: tl.int64,
    sum_stride_split: tl.int64,
    sum_stride_token: tl.int64,
    OUT_MANTISSA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (query tiles, num_kv_heads, num_seqs), the same tiles as the attention kernel."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    query_start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + seq)
    if tile * BLOCK_M >= query_len * gqa_ratio:
        return

    _, present, token, head = query_rows(tile, query_start, query_len, kv_head, gqa_ratio, BLOCK_M)
    dim_v = tl.arange(0, BLOCK_DV)

    row_max, row_sum = initial_max_and_sum(sinks_ptr, head, present, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    with_keys = tl.cdiv(tl.maximum(seq_len, 0), keys_per_split(seq_len, num_splits, BLOCK_N))
    for split in range(0, with_keys):
        max_offsets = part_offsets(split, token, head, max_stride_split, max_stride_token, 1)
        sum_offsets = part_offsets(split, token, head, sum_stride_split, sum_stride_token, 1)
        part_max = tl.load(partial_max_ptr + max_offsets, mask=present, other=float("-inf"))
        part_sum = tl.load(partial_sum_ptr + sum_offsets, mask=present, other=0.0)
        offsets = part_offsets(split, token, head, part_stride_split, part_stride_token, part_stride_head)
        part = tl.load(
            partial_out_ptr + offsets[:, None] + dim_v[None, :],
            mask=present[:, None] & (dim_v < head_size_v)[None, :],
            other=0.0,
        )
        new_max = tl.maximum(row_max, part_max)
        alpha = rescale(row_max, new_max)
        beta = rescale(part_max, new_max)
        acc = acc * alpha[:, None] + part * beta[:, None]
        row_sum = row_sum * alpha + part_sum * beta
        row_max = new_max

    store_rows(
        acc, row_max, row_sum, token, head, present, out_ptr, lse_ptr, output_scale_ptr, head_size_v,
        out_stride_token, out_stride_head, out_stride_dim, lse_stride_token, lse_stride_head, OUT_MANTISSA, BLOCK_DV,
    )  # fmt: skip
