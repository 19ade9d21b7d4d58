"""Decode over a paged cache: one query token per row, every key of the row, the current token's too, in the cache.

Invariant: rows with query_len != 1 are left alone, output included; no slot at or behind seq_len is read, nor a table
entry behind the last page of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.kernel.arguments import LaunchArguments

from .._shared.paged_tile import key_strides, num_heads_of, page_size_of, value_strides, visible
from .._shared.payload import as_loaded
from .attention_step import NUM_STAGES, NUM_WARPS, finish, fold, load_cached, masked_scores, tiling

# As in prefix_prefill: everything but the innermost strides is a runtime value that no compilation depends on.
_RUNTIME = [
    "softmax_scale", "cap", "sliding_window", "head_size", "head_size_v", "page_size", "gqa_ratio",
    "stride_table", "stride_q_token", "stride_q_head", "stride_out_token", "stride_out_head",
    "stride_lse_token", "stride_lse_head",
    "stride_kc_page", "stride_kc_slot", "stride_kc_head", "stride_vc_page", "stride_vc_head",
    "stride_k_scale", "stride_v_scale",
]  # fmt: skip
_INNERMOST = ["stride_q_dim", "stride_out_dim", "stride_kc_dim", "stride_kc_lane", "stride_vc_slot", "stride_vc_dim"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_INNERMOST)
def paged_decode_kernel(
    q_ptr,  # [num_tokens, num_q_heads, head_size]
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
    head_size,
    head_size_v,
    page_size,
    gqa_ratio,
    stride_table: tl.int64,
    stride_q_token: tl.int64,
    stride_q_head: tl.int64,
    stride_q_dim,
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
    HAS_SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,  # gqa_ratio padded to a power of two, 16 at least: what a matrix unit takes
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
    DIMS_V: tl.constexpr,
):
    """Program (seq, kv head): the query heads that share a KV head are the rows of one tile."""
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_token = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - first_token
    if query_len != 1:
        return
    seq_len = tl.load(seq_lens_ptr + seq)  # 0 for an empty row
    query_pos = seq_len - 1

    member = tl.arange(0, GROUP)
    in_group = member < gqa_ratio
    q_head = (kv_head * gqa_ratio + member).to(tl.int64)
    dim = tl.arange(0, DIMS)
    dim_v = tl.arange(0, DIMS_V)
    token = first_token.to(tl.int64)
    q = tl.load(
        q_ptr + token * stride_q_token + q_head[:, None] * stride_q_head + dim[None, :] * stride_q_dim,
        mask=in_group[:, None] & (dim < head_size)[None, :],
        other=0.0,
    )

    row_max = tl.full([GROUP], float("-inf"), tl.float32)
    row_sum = tl.zeros([GROUP], tl.float32)
    if sinks_ptr is not None:  # the sink is one more logit, with no value
        row_max = tl.load(sinks_ptr + q_head, mask=in_group, other=0.0)
        row_sum += 1.0
    acc = tl.zeros([GROUP, DIMS_V], tl.float32)
    slope = None
    if alibi_slopes_ptr is not None:
        slope = tl.load(alibi_slopes_ptr + q_head, mask=in_group, other=0.0)[:, None]

    oldest = tl.maximum(tl.where(sliding_window > 0, seq_len - sliding_window, 0), 0)
    for start in range(oldest // KEYS * KEYS, seq_len, KEYS):
        key_pos = start + tl.arange(0, KEYS)
        cached = key_pos < seq_len
        cached = cached & (key_pos >= oldest)  # the page of an older key may be gone
        page = tl.load(block_table_ptr + seq.to(tl.int64) * stride_table + key_pos // page_size, mask=cached, other=0)
        slot = key_pos % page_size
        k = load_cached(
            k_cache_ptr, k_scale_ptr, page, slot, cached, kv_head, dim, head_size,
            stride_kc_page, stride_kc_slot, stride_kc_head, stride_kc_dim, stride_kc_lane, stride_k_scale, VECTOR,
            QUANTISED, MANTISSA, q.dtype,
        )  # fmt: skip
        # The query is the newest token: nothing it could see lies behind it, causal or not.
        seen = visible(query_pos, key_pos[None, :], seq_len, sliding_window, False)
        scores = masked_scores(q, k, seen, key_pos[None, :] - query_pos, slope, softmax_scale, cap, HAS_SOFT_CAP)
        v = load_cached(
            v_cache_ptr, v_scale_ptr, page, slot, cached, kv_head, dim_v, head_size_v,
            stride_vc_page, stride_vc_slot, stride_vc_head, stride_vc_dim, 0, stride_v_scale, 1,
            QUANTISED, MANTISSA, q.dtype,
        )  # fmt: skip
        row_max, row_sum, acc = fold(scores, v, row_max, row_sum, acc)

    out, lse = finish(row_max, row_sum, acc)
    tl.store(
        out_ptr + token * stride_out_token + q_head[:, None] * stride_out_head + dim_v[None, :] * stride_out_dim,
        out.to(out_ptr.dtype.element_ty),
        mask=in_group[:, None] & (dim_v < head_size_v)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + token * stride_lse_token + q_head * stride_lse_head, lse, mask=in_group)


def paged_decode(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_size]
    out: torch.Tensor,  # [num_tokens, num_q_heads, head_size_v]
    k_cache: torch.Tensor,  # as `layout` says; holds [0, seq_len) of every row with query_len 1
    v_cache: torch.Tensor,
    layout: str,  # linear_nhd | hnd | vllm_classic
    block_table: torch.Tensor,  # [num_seqs, max_pages] int32
    query_start_loc: torch.Tensor,  # [num_seqs + 1] int32
    seq_lens: torch.Tensor,  # [num_seqs] int32, the current token included
    k_scale: torch.Tensor,  # [1] or [num_kv_heads] float32, used for quantised caches
    v_scale: torch.Tensor,
    softmax_scale: float,
    *,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,  # [num_q_heads] float32
    sinks: torch.Tensor | None = None,  # [num_q_heads] float32
    lse: torch.Tensor | None = None,  # [num_tokens, num_q_heads] float32
) -> None:
    """Attention of rows with query_len == 1, written to `out` and, if given, `lse`; other rows are not written."""
    ks, vs = key_strides(k_cache, layout), value_strides(v_cache, layout)
    (k_loaded, mantissa), (v_loaded, _) = as_loaded(k_cache), as_loaded(v_cache)
    num_kv_heads = num_heads_of(k_cache, layout)
    gqa_ratio = q.shape[1] // num_kv_heads
    tile = tiling(q.shape[2], out.shape[2], q.element_size())
    paged_decode_kernel[(seq_lens.shape[0], num_kv_heads)](
        q, out, lse, k_loaded, v_loaded, k_scale, v_scale, block_table, query_start_loc, seq_lens, alibi_slopes, sinks,
        softmax_scale, logits_soft_cap, sliding_window,
        q.shape[2], out.shape[2], page_size_of(k_cache, layout), gqa_ratio,
        block_table.stride(0), *q.stride(), *out.stride(), *(lse.stride() if lse is not None else (0, 0)),
        ks.page, ks.slot, ks.head, ks.dim, ks.lane, vs.page, vs.slot, vs.head, vs.dim,
        *(scale.stride(0) if len(scale) > 1 else 0 for scale in (k_scale, v_scale)),
        VECTOR=ks.vector,
        QUANTISED=k_cache.element_size() == 1,
        MANTISSA=mantissa,
        HAS_SOFT_CAP=logits_soft_cap > 0,
        GROUP=max(16, triton.next_power_of_2(gqa_ratio)),
        KEYS=tile.keys,
        DIMS=tile.head_size,
        DIMS_V=tile.head_size_v,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )  # fmt: skip


def launch(args: LaunchArguments) -> None:
    """Adapter. Class `all`: args.k and args.v are not looked at."""
    paged_decode(
        args.q, args.out, args.k_cache, args.v_cache, args.layout,
        args.block_table, args.query_start_loc, args.seq_lens, args.k_scale, args.v_scale, args.softmax_scale,
        sliding_window=args.sliding_window,
        logits_soft_cap=args.logits_soft_cap,
        alibi_slopes=args.alibi_slopes,
        sinks=args.sinks,
        lse=args.lse,
    )  # fmt: skip
