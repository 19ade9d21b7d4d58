"""Prefill over a paged prefix: cached tokens [0, context_len) come from the cache, new tokens from k and v.

Invariant: a cache slot at or behind context_len is never read, nor a table entry behind the last page of the context,
nor a k or v row of a token at a negative position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.kernel.arguments import LaunchArguments

from .._shared.paged_tile import key_strides, page_size_of, value_strides, visible
from .._shared.payload import as_loaded
from .attention_step import NUM_STAGES, NUM_WARPS, finish, fold, load_cached, masked_scores, tiling

# Lengths, sizes and strides are runtime values: one compilation serves them all. Only the innermost strides stay
# specialised, so that a contiguous axis (stride 1) is loaded in vectors.
_RUNTIME = [
    "softmax_scale", "cap", "sliding_window", "skip_decode", "head_size", "head_size_v", "page_size", "gqa_ratio",
    "stride_table", "stride_q_token", "stride_q_head", "stride_k_token", "stride_k_head", "stride_v_token",
    "stride_v_head", "stride_out_token", "stride_out_head", "stride_lse_token", "stride_lse_head",
    "stride_kc_page", "stride_kc_slot", "stride_kc_head", "stride_vc_page", "stride_vc_head",
    "stride_k_scale", "stride_v_scale",
]  # fmt: skip
_INNERMOST = [
    "stride_q_dim", "stride_k_dim", "stride_v_dim", "stride_out_dim",
    "stride_kc_dim", "stride_kc_lane", "stride_vc_slot", "stride_vc_dim",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_INNERMOST)
def prefix_prefill_kernel(
    q_ptr,  # [num_tokens, num_q_heads, head_size]
    k_ptr,  # [num_tokens, num_kv_heads, head_size]
    v_ptr,  # [num_tokens, num_kv_heads, head_size_v]
    out_ptr,  # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,  # [num_tokens, num_q_heads] float32 or None
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,  # [1] or [num_kv_heads] float32
    v_scale_ptr,
    block_table_ptr,  # [num_seqs, max_pages] int32
    query_start_loc_ptr,  # [num_seqs + 1] int32
    seq_lens_ptr,  # [num_seqs] int32
    alibi_slopes_ptr,  # [num_q_heads] float32 or None
    sinks_ptr,  # [num_q_heads] float32 or None
    softmax_scale,
    cap,
    sliding_window,
    skip_decode,
    head_size,
    head_size_v,
    page_size,
    gqa_ratio,
    stride_table: tl.int64,
    stride_q_token: tl.int64,
    stride_q_head: tl.int64,
    stride_q_dim,
    stride_k_token: tl.int64,
    stride_k_head: tl.int64,
    stride_k_dim,
    stride_v_token: tl.int64,
    stride_v_head: tl.int64,
    stride_v_dim,
    stride_out_token: tl.int64,
    stride_out_head: tl.int64,
    stride_out_dim,
    stride_lse_token: tl.int64,
    stride_lse_head: tl.int64,
    stride_kc_page: tl.int64,
    stride_kc_slot: tl.int64,
    stride_kc_head: tl.int64,
    stride_kc_dim,
    stride_kc_lane,
    stride_vc_page: tl.int64,
    stride_vc_slot,
    stride_vc_head: tl.int64,
    stride_vc_dim,
    stride_k_scale: tl.int64,
    stride_v_scale: tl.int64,
    VECTOR: tl.constexpr,
    QUANTISED: tl.constexpr,
    MANTISSA: tl.constexpr,  # of a cache that is taken apart byte by byte, else 0
    CAUSAL: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
    DIMS_V: tl.constexpr,
):
    """Program (seq, q head, query tile): one pass over context tiles, then one over new-token tiles."""
    seq = tl.program_id(0)
    q_head = tl.program_id(1)
    first_query = tl.program_id(2) * QUERIES
    first_token = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - first_token
    if (first_query >= query_len) | ((query_len == 1) & (skip_decode != 0)):
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    context_len = seq_len - query_len  # may be negative: the first new tokens then lie before the first key
    kv_head = q_head // gqa_ratio

    query = first_query + tl.arange(0, QUERIES)
    query_pos = context_len + query
    dim = tl.arange(0, DIMS)
    dim_v = tl.arange(0, DIMS_V)
    token = (first_token + query).to(tl.int64)
    q = tl.load(
        q_ptr + token[:, None] * stride_q_token + q_head.to(tl.int64) * stride_q_head + dim[None, :] * stride_q_dim,
        mask=(query < query_len)[:, None] & (dim < head_size)[None, :],
        other=0.0,
    )

    row_max = tl.full([QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([QUERIES], tl.float32)
    if sinks_ptr is not None:  # the sink is one more logit, with no value
        row_max = tl.zeros([QUERIES], tl.float32) + tl.load(sinks_ptr + q_head)
        row_sum += 1.0
    acc = tl.zeros([QUERIES, DIMS_V], tl.float32)
    slope = None
    if alibi_slopes_ptr is not None:
        slope = tl.load(alibi_slopes_ptr + q_head)

    # The oldest key that any query of this tile sees; tiles wholly before it are skipped.
    oldest = tl.maximum(tl.where(sliding_window > 0, context_len + first_query - sliding_window + 1, 0), 0)

    for start in range(oldest // KEYS * KEYS, context_len, KEYS):
        key_pos = start + tl.arange(0, KEYS)
        cached = key_pos < context_len
        page = tl.load(block_table_ptr + seq.to(tl.int64) * stride_table + key_pos // page_size, mask=cached, other=0)
        slot = key_pos % page_size
        k = load_cached(
            k_cache_ptr, k_scale_ptr, page, slot, cached, kv_head, dim, head_size,
            stride_kc_page, stride_kc_slot, stride_kc_head, stride_kc_dim, stride_kc_lane, stride_k_scale, VECTOR,
            QUANTISED, MANTISSA, q.dtype,
        )  # fmt: skip
        seen = visible(query_pos[:, None], key_pos[None, :], context_len, sliding_window, CAUSAL)
        distance = key_pos[None, :] - query_pos[:, None]
        scores = masked_scores(q, k, seen, distance, slope, softmax_scale, cap, HAS_SOFT_CAP)
        v = load_cached(
            v_cache_ptr, v_scale_ptr, page, slot, cached, kv_head, dim_v, head_size_v,
            stride_vc_page, stride_vc_slot, stride_vc_head, stride_vc_dim, 0, stride_v_scale, 1,
            QUANTISED, MANTISSA, q.dtype,
        )  # fmt: skip
        row_max, row_sum, acc = fold(scores, v, row_max, row_sum, acc)

    end = query_len
    if CAUSAL:
        end = tl.minimum(query_len, first_query + QUERIES)
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * stride_v_head
    for start in range(tl.maximum(oldest - context_len, 0) // KEYS * KEYS, end, KEYS):
        new = start + tl.arange(0, KEYS)
        key_pos = context_len + new
        exists = (new < query_len) & (key_pos >= 0)
        token_kv = (first_token + new).to(tl.int64)
        k = tl.load(
            k_head_ptr + token_kv[:, None] * stride_k_token + dim[None, :] * stride_k_dim,
            mask=exists[:, None] & (dim < head_size)[None, :],
            other=0.0,
        )
        seen = visible(query_pos[:, None], key_pos[None, :], seq_len, sliding_window, CAUSAL)
        distance = key_pos[None, :] - query_pos[:, None]
        scores = masked_scores(q, k, seen, distance, slope, softmax_scale, cap, HAS_SOFT_CAP)
        v = tl.load(
            v_head_ptr + token_kv[:, None] * stride_v_token + dim_v[None, :] * stride_v_dim,
            mask=exists[:, None] & (dim_v < head_size_v)[None, :],
            other=0.0,
        )
        row_max, row_sum, acc = fold(scores, v, row_max, row_sum, acc)

    out, lse = finish(row_max, row_sum, acc)
    tl.store(
        out_ptr
        + token[:, None] * stride_out_token
        + q_head.to(tl.int64) * stride_out_head
        + dim_v[None, :] * stride_out_dim,
        out.to(out_ptr.dtype.element_ty),
        mask=(query < query_len)[:, None] & (dim_v < head_size_v)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + token * stride_lse_token + q_head * stride_lse_head, lse, mask=query < query_len)


def prefix_prefill(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_size]
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_size] new tokens only
    v: torch.Tensor,  # [num_tokens, num_kv_heads, head_size_v] new tokens only
    out: torch.Tensor,  # [num_tokens, num_q_heads, head_size_v]
    k_cache: torch.Tensor,  # as `layout` says; holds [0, context_len) of every row
    v_cache: torch.Tensor,
    layout: str,  # linear_nhd | hnd | vllm_classic
    block_table: torch.Tensor,  # [num_seqs, max_pages] int32
    query_start_loc: torch.Tensor,  # [num_seqs + 1] int32
    seq_lens: torch.Tensor,  # [num_seqs] int32, new tokens included
    max_query_len: int,
    k_scale: torch.Tensor,  # [1] or [num_kv_heads] float32, used for quantised caches
    v_scale: torch.Tensor,
    softmax_scale: float,
    *,
    causal: bool = True,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,  # [num_q_heads] float32
    sinks: torch.Tensor | None = None,  # [num_q_heads] float32
    lse: torch.Tensor | None = None,  # [num_tokens, num_q_heads] float32
    skip_decode: bool = False,
) -> None:
    """Attention of the new tokens over cached context and new tokens, written to `out` and, if given, `lse`.

    With `skip_decode`, rows with query_len == 1 are left to another kernel and their output is not written.
    """
    tile = tiling(q.shape[2], v.shape[2], q.element_size())
    ks, vs = key_strides(k_cache, layout), value_strides(v_cache, layout)
    (k_loaded, mantissa), (v_loaded, _) = as_loaded(k_cache), as_loaded(v_cache)
    grid = (seq_lens.shape[0], q.shape[1], triton.cdiv(max_query_len, tile.queries))
    prefix_prefill_kernel[grid](
        q, k, v, out, lse, k_loaded, v_loaded, k_scale, v_scale, block_table, query_start_loc, seq_lens,
        alibi_slopes, sinks,
        softmax_scale, logits_soft_cap, sliding_window, int(skip_decode),
        q.shape[2], v.shape[2], page_size_of(k_cache, layout), q.shape[1] // k.shape[1],
        block_table.stride(0), *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        *(lse.stride() if lse is not None else (0, 0)),
        ks.page, ks.slot, ks.head, ks.dim, ks.lane, vs.page, vs.slot, vs.head, vs.dim,
        *(scale.stride(0) if len(scale) > 1 else 0 for scale in (k_scale, v_scale)),
        VECTOR=ks.vector,
        QUANTISED=k_cache.element_size() == 1,
        MANTISSA=mantissa,
        CAUSAL=causal,
        HAS_SOFT_CAP=logits_soft_cap > 0,
        QUERIES=tile.queries,
        KEYS=tile.keys,
        DIMS=tile.head_size,
        DIMS_V=tile.head_size_v,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )  # fmt: skip


def launch(args: LaunchArguments, *, skip_decode: bool = False) -> None:
    """Adapter. Class `context`; ValueError without args.k and args.v."""
    if args.k is None or args.v is None:
        raise ValueError("prefix_prefill takes the new tokens as k and v; got None")
    prefix_prefill(
        args.q, args.k, args.v, args.out, args.k_cache, args.v_cache, args.layout,
        args.block_table, args.query_start_loc, args.seq_lens, args.max_query_len,
        args.k_scale, args.v_scale, args.softmax_scale,
        causal=args.causal,
        sliding_window=args.sliding_window,
        logits_soft_cap=args.logits_soft_cap,
        alibi_slopes=args.alibi_slopes,
        sinks=args.sinks,
        lse=args.lse,
        skip_decode=skip_decode,
    )  # fmt: skip
