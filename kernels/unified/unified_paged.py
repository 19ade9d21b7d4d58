"""Attention over a paged KV cache that holds every token: prefill rows and decode rows in one kernel.

Invariant: one program owns one tile of (token, query head) rows of one sequence and one KV head, so every element of
`out` and `lse` is stored once. With split-KV one program owns such a tile and one share of the keys, stores partials of
its own, and split_kv merges them. Nothing but live slots of the cache is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from harness.kernel.arguments import LaunchArguments

from .._shared.page_table import pages_of_sequence
from .._shared.paged_tile import (
    cache_offsets,
    key_strides,
    num_heads_of,
    page_size_of,
    soft_cap,
    value_strides,
    visible,
)
from .._shared.payload import as_loaded, descales_by_key, descales_of, payload_values
from .._shared.query_tile import query_rows
from .._shared.softmax_rows import initial_max_and_sum, rescale, store_rows
from .split_kv import keys_per_split, part_offsets, split_kv_combine_kernel

# Pointers and sizes differ from case to case: specialising on their alignment or on the value 1 would only multiply
# compilations. The strides that may be innermost do know the value 1, which is what makes loads coalesce.
_RUNTIME = (
    "q_ptr", "k_cache_ptr", "v_cache_ptr", "block_table_ptr", "kv_indptr_ptr", "kv_page_indices_ptr",
    "kv_last_page_len_ptr", "query_start_loc_ptr", "seq_lens_ptr", "q_descale_ptr",
    "k_descale_ptr", "v_descale_ptr", "output_scale_ptr", "alibi_slopes_ptr", "sinks_ptr", "out_ptr", "lse_ptr",
    "partial_out_ptr", "partial_max_ptr", "partial_sum_ptr", "gqa_ratio", "head_size", "head_size_v", "page_size",
    "window", "sink_tokens", "num_splits", "q_stride_token", "q_stride_head", "out_stride_token", "out_stride_head",
    "lse_stride_token", "lse_stride_head", "table_stride", "k_stride_page", "k_stride_slot", "k_stride_head",
    "v_stride_page", "v_stride_head", "k_descale_page", "k_descale_slot", "k_descale_head", "v_descale_page",
    "v_descale_slot", "v_descale_head", "part_stride_split", "part_stride_token", "part_stride_head",
    "max_stride_split", "max_stride_token", "sum_stride_split", "sum_stride_token",
)  # fmt: skip
_INNERMOST = (
    "q_stride_dim", "out_stride_dim", "k_stride_dim", "k_stride_lane", "v_stride_slot", "v_stride_dim",
    "v_stride_slot_lane",
)  # fmt: skip
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_INNERMOST)
def unified_paged_kernel(
    q_ptr,  # [num_tokens, num_q_heads, head_size]
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,  # [num_seqs, max_pages] int32, or None and
    kv_indptr_ptr,  # [num_seqs + 1] int32 or None
    kv_page_indices_ptr,  # [total pages] int32 or None
    kv_last_page_len_ptr,  # [num_seqs] int32 or None
    query_start_loc_ptr,  # [num_seqs + 1] int32
    seq_lens_ptr,  # [num_seqs] int32
    q_descale_ptr,  # [1] float32 or None
    k_descale_ptr,  # float32, by its strides
    v_descale_ptr,
    output_scale_ptr,  # [1] float32 or None
    alibi_slopes_ptr,  # [num_q_heads] float32 or None
    sinks_ptr,  # [num_q_heads] float32 or None
    out_ptr,  # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,  # [num_tokens, num_q_heads] float32 or None
    partial_out_ptr,  # [num_splits, num_tokens, num_q_heads, head_size_v] float32 or None
    partial_max_ptr,  # [num_splits, num_tokens, num_q_heads] float32 or None
    partial_sum_ptr,  # [num_splits, num_tokens, num_q_heads] float32 or None
    softmax_scale: tl.float32,
    cap: tl.float32,
    gqa_ratio: tl.int32,
    head_size: tl.int32,
    head_size_v: tl.int32,
    page_size: tl.int32,
    window: tl.int32,
    sink_tokens: tl.int32,
    num_splits: tl.int32,
    q_stride_token: tl.int64,
    q_stride_head: tl.int64,
    q_stride_dim: tl.int64,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    out_stride_dim: tl.int64,
    lse_stride_token: tl.int64,
    lse_stride_head: tl.int64,
    table_stride: tl.int64,
    k_stride_page: tl.int64,
    k_stride_slot: tl.int64,
    k_stride_head: tl.int64,
    k_stride_dim: tl.int64,
    k_stride_lane: tl.int64,
    v_stride_page: tl.int64,
    v_stride_slot: tl.int64,
    v_stride_head: tl.int64,
    v_stride_dim: tl.int64,
    v_stride_slot_lane: tl.int64,
    k_descale_page: tl.int64,
    k_descale_slot: tl.int64,
    k_descale_head: tl.int64,
    v_descale_page: tl.int64,
    v_descale_slot: tl.int64,
    v_descale_head: tl.int64,
    part_stride_split: tl.int64,
    part_stride_token: tl.int64,
    part_stride_head: tl.int64,
    max_stride_split: tl.int64,
    max_stride_token: tl.int64,
    sum_stride_split: tl.int64,
    sum_stride_token: tl.int64,
    VECTOR: tl.constexpr,
    SLOT_VECTOR: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    DESCALES_BY_KEY: tl.constexpr,
    DTYPE: tl.constexpr,  # of all products
    Q_MANTISSA: tl.constexpr,
    CACHE_MANTISSA: tl.constexpr,
    OUT_MANTISSA: tl.constexpr,
    SPLIT_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (query tiles * num_splits, num_kv_heads, num_seqs). SPLIT_KV stores partials instead of the result."""
    tile = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    query_start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - query_start
    table_row, seq_len = pages_of_sequence(
        block_table_ptr, table_stride, seq_lens_ptr, kv_indptr_ptr, kv_page_indices_ptr, kv_last_page_len_ptr,
        seq, page_size,
    )  # fmt: skip
    if tile * BLOCK_M >= query_len * gqa_ratio:
        return

    query, present, token, head = query_rows(tile, query_start, query_len, kv_head, gqa_ratio, BLOCK_M)
    context_len = seq_len - query_len
    query_pos = context_len + query

    # Keys [first_key, end_key): the split's own, cut to what the tile can see.
    first_key = 0
    end_key = seq_len
    if SPLIT_KV:
        owned = keys_per_split(seq_len, num_splits, BLOCK_N)
        first_key = split * owned
        if first_key >= seq_len:
            return
        end_key = tl.minimum(first_key + owned, seq_len)
    if CAUSAL:
        last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // gqa_ratio, query_len - 1)
        end_key = tl.minimum(end_key, context_len + last_query + 1)
    sink_tiles = 0  # tiles of keys that hold sink tokens, where the window begins behind them
    own_first = first_key
    if window > 0:
        oldest = tl.maximum(context_len + (tile * BLOCK_M) // gqa_ratio - window + 1, 0)
        first_key = tl.maximum(first_key, oldest // BLOCK_N * BLOCK_N)
        sink_end = tl.minimum(tl.minimum(sink_tokens, first_key), end_key)
        sink_tiles = tl.cdiv(tl.maximum(sink_end - own_first, 0), BLOCK_N)
    num_tiles = sink_tiles + tl.cdiv(tl.maximum(end_key - first_key, 0), BLOCK_N)

    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    q_offsets = (token * q_stride_token + head * q_stride_head)[:, None] + (dim * q_stride_dim)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=present[:, None] & (dim < head_size)[None, :], other=0.0)
    if q_descale_ptr is not None:
        q = payload_values(q, Q_MANTISSA).to(DTYPE)  # exact: each of these types holds every 8-bit float
        softmax_scale *= tl.load(q_descale_ptr)
    if alibi_slopes_ptr is not None:
        slope = tl.load(alibi_slopes_ptr + head, mask=present, other=0.0)
    if QUANTISED and not DESCALES_BY_KEY:
        k_scale = tl.load(k_descale_ptr + kv_head * k_descale_head)
        v_scale = tl.load(v_descale_ptr + kv_head * v_descale_head)

    if SPLIT_KV:  # the sink joins in the combine
        row_max, row_sum = initial_max_and_sum(None, head, present, BLOCK_M)
    else:
        row_max, row_sum = initial_max_and_sum(sinks_ptr, head, present, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for number in range(0, num_tiles):
        tile_start = own_first + number * BLOCK_N
        if number >= sink_tiles:
            tile_start = first_key + (number - sink_tiles) * BLOCK_N
        key = tile_start + tl.arange(0, BLOCK_N)
        cached = key < seq_len
        page = tl.load(table_row + key // page_size, mask=cached, other=0)
        slot = key % page_size

        k_offsets = cache_offsets(
            page[None, :], slot[None, :], kv_head, dim[:, None],
            k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, k_stride_lane, VECTOR,
        )  # fmt: skip
        k = tl.load(k_cache_ptr + k_offsets, mask=cached[None, :] & (dim < head_size)[:, None], other=0.0)
        if DESCALES_BY_KEY:
            k_descale = page.to(tl.int64) * k_descale_page + slot * k_descale_slot + kv_head * k_descale_head
            k_scale = tl.load(k_descale_ptr + k_descale, mask=cached, other=1.0)[None, :]
        if QUANTISED:
            k = (payload_values(k, CACHE_MANTISSA) * k_scale).to(DTYPE)

        scores = tl.dot(q, k, input_precision="ieee") * softmax_scale  # [BLOCK_M, BLOCK_N]
        if HAS_SOFT_CAP:
            scores = soft_cap(scores, cap)
        if alibi_slopes_ptr is not None:
            scores += slope[:, None] * (key[None, :] - query_pos[:, None]).to(tl.float32)
        seen = visible(query_pos[:, None], key[None, :], seq_len, window, CAUSAL, sink_tokens)
        scores = tl.where(seen, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = rescale(scores, new_max[:, None])
        alpha = rescale(row_max, new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max

        v_offsets = cache_offsets(
            page[:, None], slot[:, None], kv_head, dim_v[None, :],
            v_stride_page, v_stride_slot, v_stride_head, v_stride_dim, 0, 1, v_stride_slot_lane, SLOT_VECTOR,
        )  # fmt: skip
        # 0 * NaN is NaN: values behind the last token must not be loaded, a zero weight does not hide them.
        v = tl.load(v_cache_ptr + v_offsets, mask=cached[:, None] & (dim_v < head_size_v)[None, :], other=0.0)
        if DESCALES_BY_KEY:
            v_descale = page.to(tl.int64) * v_descale_page + slot * v_descale_slot + kv_head * v_descale_head
            v_scale = tl.load(v_descale_ptr + v_descale, mask=cached, other=1.0)[:, None]
        if QUANTISED:
            v = (payload_values(v, CACHE_MANTISSA) * v_scale).to(DTYPE)
        acc = acc * alpha[:, None] + tl.dot(p.to(DTYPE), v, input_precision="ieee")

    if SPLIT_KV:
        max_offsets = part_offsets(split, token, head, max_stride_split, max_stride_token, 1)
        sum_offsets = part_offsets(split, token, head, sum_stride_split, sum_stride_token, 1)
        part = part_offsets(split, token, head, part_stride_split, part_stride_token, part_stride_head)
        tl.store(partial_max_ptr + max_offsets, row_max, mask=present)
        tl.store(partial_sum_ptr + sum_offsets, row_sum, mask=present)
        out_offsets = part[:, None] + dim_v[None, :]
        tl.store(partial_out_ptr + out_offsets, acc, mask=present[:, None] & (dim_v < head_size_v)[None, :])
    else:
        store_rows(
            acc, row_max, row_sum, token, head, present, out_ptr, lse_ptr, output_scale_ptr, head_size_v,
            out_stride_token, out_stride_head, out_stride_dim, lse_stride_token, lse_stride_head,
            OUT_MANTISSA, BLOCK_DV,
        )  # fmt: skip


class Tiles(NamedTuple):
    rows: int  # BLOCK_M
    keys: int  # BLOCK_N
    dims: int  # BLOCK_D
    dims_v: int  # BLOCK_DV


def tiles_for(head_size: int, head_size_v: int, element_size: int, max_rows: int) -> Tiles:
    """Tile sizes whose q, K and V tiles fit shared memory (227 KB) at any head size; all at least 16 for tl.dot."""
    dims = max(16, triton.next_power_of_2(head_size))
    dims_v = max(16, triton.next_power_of_2(head_size_v))
    row_bytes = max(dims, dims_v) * element_size
    # float32 products are unrolled fused multiply-adds, not matrix instructions: smaller tiles compile 4x faster.
    largest = 16 if row_bytes > 1024 else 32 if row_bytes > 512 or element_size == 4 else 64
    return Tiles(16 if max_rows <= 16 else largest, largest, dims, dims_v)


def launch(args: LaunchArguments) -> None:
    """Attention over the cache only (`args.k` and `args.v` are not used); writes `args.out` and `args.lse`.

    `num_splits == 0` launches unified_paged_kernel once; `num_splits > 0` launches it with SPLIT_KV, one program per
    split, and then split_kv_combine_kernel. Workspaces start as NaN: what a split does not store must not matter.
    """
    num_tokens, num_q_heads, head_size = args.q.shape
    head_size_v = args.out.shape[2]
    k_strides, v_strides = key_strides(args.k_cache, args.layout), value_strides(args.v_cache, args.layout)
    num_kv_heads = num_heads_of(args.k_cache, args.layout)
    gqa_ratio = num_q_heads // num_kv_heads
    max_rows = args.max_query_len * gqa_ratio
    tiles = tiles_for(head_size, head_size_v, args.compute_dtype.itemsize, max_rows)
    num_tiles, num_seqs = triton.cdiv(max_rows, tiles.rows), args.seq_lens.shape[0]
    table_stride = 0 if args.block_table is None else args.block_table.stride(0)
    lse_strides = (0, 0) if args.lse is None else args.lse.stride()
    k_descale, v_descale = descales_of(args)
    (q, q_mantissa), (out, out_mantissa) = as_loaded(args.q), as_loaded(args.out)
    (k_cache, cache_mantissa), (v_cache, _) = as_loaded(args.k_cache), as_loaded(args.v_cache)
    splits = max(args.num_splits, 1)

    partial_out = partial_max = partial_sum = None
    part_strides = (0,) * 7
    if args.num_splits:
        shape = (splits, num_tokens, num_q_heads)
        partial_out = args.workspace("partial_out", (*shape, head_size_v), torch.float32)
        partial_max = args.workspace("partial_max", shape, torch.float32)
        partial_sum = args.workspace("partial_sum", shape, torch.float32)
        part_strides = (*partial_out.stride()[:3], *partial_max.stride()[:2], *partial_sum.stride()[:2])

    unified_paged_kernel[(num_tiles * splits, num_kv_heads, num_seqs)](
        q, k_cache, v_cache,
        args.block_table, args.kv_indptr, args.kv_page_indices, args.kv_last_page_len,
        args.query_start_loc, args.seq_lens,
        args.q_descale, k_descale.tensor, v_descale.tensor, args.output_scale,
        args.alibi_slopes, args.sinks, out, args.lse, partial_out, partial_max, partial_sum,
        args.softmax_scale, args.logits_soft_cap,
        gqa_ratio, head_size, head_size_v, page_size_of(args.k_cache, args.layout), args.sliding_window,
        args.sink_tokens, splits,
        *args.q.stride(), *args.out.stride(), *lse_strides, table_stride,
        k_strides.page, k_strides.slot, k_strides.head, k_strides.dim, k_strides.lane,
        v_strides.page, v_strides.slot, v_strides.head, v_strides.dim, v_strides.slot_lane,
        k_descale.page, k_descale.slot, k_descale.head, v_descale.page, v_descale.slot, v_descale.head,
        *part_strides,
        VECTOR=k_strides.vector, SLOT_VECTOR=v_strides.slot_vector,
        CAUSAL=args.causal, HAS_SOFT_CAP=args.logits_soft_cap > 0,
        QUANTISED=args.kv_dtype != "auto", DESCALES_BY_KEY=descales_by_key(args), DTYPE=_TYPES[args.compute_dtype],
        Q_MANTISSA=q_mantissa, CACHE_MANTISSA=cache_mantissa, OUT_MANTISSA=out_mantissa, SPLIT_KV=args.num_splits > 0,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_D=tiles.dims, BLOCK_DV=tiles.dims_v, num_stages=1,
    )  # fmt: skip
    if args.num_splits:
        split_kv_combine_kernel[(num_tiles, num_kv_heads, num_seqs)](
            args.query_start_loc, args.seq_lens, args.sinks, args.output_scale, out, args.lse,
            partial_out, partial_max, partial_sum,
            gqa_ratio, head_size_v, splits, *args.out.stride(), *lse_strides, *part_strides,
            OUT_MANTISSA=out_mantissa, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, BLOCK_DV=tiles.dims_v,
        )  # fmt: skip
