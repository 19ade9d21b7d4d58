"""Batch prefill, second version: every layout, page size and score modifier, in 16 bit or all of q, K and V in fp8.

Invariant: one program owns one tile of (token, query head) rows of one sequence and one KV head, so every element of
`out` and `lse` is stored once; nothing but live slots of the cache, and page-table entries of live pages, is read.

fp8 payloads are exact in 16 bit and are multiplied there. Descales are applied in float32: those of q and K to the
logits, that of V to the finished row or, where every page has its own, to P.
"""

from __future__ import annotations

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
from .._shared.payload import as_loaded, payload_values
from .._shared.query_tile import query_rows
from .._shared.softmax_rows import initial_max_and_sum, rescale, store_rows

_RUNTIME = (
    "q_ptr", "k_cache_ptr", "v_cache_ptr", "block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr", "kv_indptr_ptr",
    "kv_page_indices_ptr", "kv_last_page_len_ptr", "q_descale_ptr", "k_scale_ptr", "v_scale_ptr",
    "kv_block_descale_ptr", "alibi_slopes_ptr", "sinks_ptr", "out_ptr", "lse_ptr", "gqa_ratio", "head_size",
    "head_size_v", "page_size", "window", "sink_tokens", "q_stride_token", "q_stride_head", "out_stride_token",
    "out_stride_head", "lse_stride_token", "lse_stride_head", "table_stride", "k_stride_page", "k_stride_slot",
    "k_stride_head", "v_stride_page", "v_stride_head", "descale_stride_page", "descale_stride_head",
    "descale_stride_kind",
)  # fmt: skip
_INNERMOST = (
    "q_stride_dim", "out_stride_dim", "k_stride_dim", "k_stride_lane", "v_stride_slot", "v_stride_dim",
    "v_stride_slot_lane",
)  # fmt: skip


@triton.jit
def numbers(stored, ELEMENT: tl.constexpr, MANTISSA: tl.constexpr):
    """What is stored, in the 16-bit type ELEMENT; exact."""
    if MANTISSA > 0:
        stored = payload_values(stored, MANTISSA)
    return stored.to(ELEMENT)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_INNERMOST)
def batch_prefill_v2_kernel(
    q_ptr,  # [num_tokens, num_q_heads, head_size]
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,  # [num_seqs, max_pages] int32 or None
    query_start_loc_ptr,  # [num_seqs + 1] int32
    seq_lens_ptr,  # [num_seqs] int32
    kv_indptr_ptr,  # [num_seqs + 1] int32 or None
    kv_page_indices_ptr,  # [total pages] int32 or None
    kv_last_page_len_ptr,  # [num_seqs] int32 or None
    q_descale_ptr,  # [1] float32
    k_scale_ptr,  # [1] float32
    v_scale_ptr,  # [1] float32
    kv_block_descale_ptr,  # [num_pages, num_kv_heads, 2] float32 or None
    alibi_slopes_ptr,  # [num_q_heads] float32 or None
    sinks_ptr,  # [num_q_heads] float32 or None
    out_ptr,  # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,  # [num_tokens, num_q_heads] float32 or None
    softmax_scale: tl.float32,
    cap: tl.float32,
    gqa_ratio: tl.int32,
    head_size: tl.int32,
    head_size_v: tl.int32,
    page_size: tl.int32,
    window: tl.int32,
    sink_tokens: tl.int32,
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
    descale_stride_page: tl.int64,
    descale_stride_head: tl.int64,
    descale_stride_kind: tl.int64,
    VECTOR: tl.constexpr,
    SLOT_VECTOR: tl.constexpr,
    MANTISSA: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    PER_PAGE_DESCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (query tiles, num_kv_heads, num_seqs)."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    query_start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - query_start
    if tile * BLOCK_M >= query_len * gqa_ratio:
        return
    table, seq_len = pages_of_sequence(
        block_table_ptr, table_stride, seq_lens_ptr, kv_indptr_ptr, kv_page_indices_ptr, kv_last_page_len_ptr,
        seq, page_size,
    )  # fmt: skip

    query, present, token, head = query_rows(tile, query_start, query_len, kv_head, gqa_ratio, BLOCK_M)
    context_len = seq_len - query_len
    query_pos = context_len + query

    # Keys [first_key, end_key) that some row of the tile may see, from a whole tile on; and sink tokens before them.
    first_key = 0
    end_key = seq_len
    if CAUSAL:
        last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // gqa_ratio, query_len - 1)
        end_key = tl.minimum(seq_len, context_len + last_query + 1)
    if window > 0:
        oldest = tl.maximum(context_len + (tile * BLOCK_M) // gqa_ratio - window + 1, 0)
        first_key = oldest // BLOCK_N * BLOCK_N
    sink_tiles = tl.cdiv(tl.maximum(tl.minimum(tl.minimum(sink_tokens, first_key), end_key), 0), BLOCK_N)
    num_tiles = sink_tiles + tl.cdiv(tl.maximum(end_key - first_key, 0), BLOCK_N)

    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    q_offsets = (token * q_stride_token + head * q_stride_head)[:, None] + (dim * q_stride_dim)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=present[:, None] & (dim < head_size)[None, :], other=0.0)
    q = numbers(q, ELEMENT, MANTISSA)
    if alibi_slopes_ptr is not None:
        slope = tl.load(alibi_slopes_ptr + head, mask=present, other=0.0)
    logit_scale = softmax_scale
    if QUANTISED:
        logit_scale = logit_scale * tl.load(q_descale_ptr)
        if not PER_PAGE_DESCALE:
            logit_scale = logit_scale * tl.load(k_scale_ptr)

    row_max, row_sum = initial_max_and_sum(sinks_ptr, head, present, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for number in range(0, num_tiles):
        tile_start = tl.where(number < sink_tiles, number * BLOCK_N, first_key + (number - sink_tiles) * BLOCK_N)
        key = tile_start + tl.arange(0, BLOCK_N)
        cached = key < seq_len
        page = tl.load(table + key // page_size, mask=cached, other=0)
        slot = key % page_size

        k_offsets = cache_offsets(
            page[None, :], slot[None, :], kv_head, dim[:, None],
            k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, k_stride_lane, VECTOR,
        )  # fmt: skip
        k = tl.load(k_cache_ptr + k_offsets, mask=cached[None, :] & (dim < head_size)[:, None], other=0.0)
        scores = tl.dot(q, numbers(k, ELEMENT, MANTISSA)) * logit_scale  # [BLOCK_M, BLOCK_N]
        if PER_PAGE_DESCALE:
            descale = kv_block_descale_ptr + page.to(tl.int64) * descale_stride_page + kv_head * descale_stride_head
            scores *= tl.load(descale, mask=cached, other=1.0)[None, :]
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
        if PER_PAGE_DESCALE:
            p *= tl.load(descale + descale_stride_kind, mask=cached, other=1.0)[None, :]

        v_offsets = cache_offsets(
            page[:, None], slot[:, None], kv_head, dim_v[None, :],
            v_stride_page, v_stride_slot, v_stride_head, v_stride_dim, 0, 1, v_stride_slot_lane, SLOT_VECTOR,
        )  # fmt: skip
        # 0 * NaN is NaN: values behind the last token must not be loaded, a zero weight does not hide them.
        v = tl.load(v_cache_ptr + v_offsets, mask=cached[:, None] & (dim_v < head_size_v)[None, :], other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(ELEMENT), numbers(v, ELEMENT, MANTISSA))

    if QUANTISED and not PER_PAGE_DESCALE:
        acc *= tl.load(v_scale_ptr)
    store_rows(
        acc, row_max, row_sum, token, head, present, out_ptr, lse_ptr, None, head_size_v,
        out_stride_token, out_stride_head, out_stride_dim, lse_stride_token, lse_stride_head, 0, BLOCK_DV,
    )  # fmt: skip


def tiles_for(head_size: int, head_size_v: int, max_rows: int) -> tuple[int, int]:
    """Rows and keys of a tile, whose q, K and V fit shared memory (227 KB) at any head size; at least 16 for tl.dot."""
    largest = 32 if max(head_size, head_size_v) > 256 else 64
    return 16 if max_rows <= 16 else largest, largest


def launch(args: LaunchArguments) -> None:
    """Attention over the cache only; writes `args.out` and `args.lse` by one batch_prefill_v2_kernel."""
    _, num_q_heads, head_size = args.q.shape
    head_size_v = args.out.shape[2]
    k_strides, v_strides = key_strides(args.k_cache, args.layout), value_strides(args.v_cache, args.layout)
    num_kv_heads = num_heads_of(args.k_cache, args.layout)
    gqa_ratio = num_q_heads // num_kv_heads
    max_rows = args.max_query_len * gqa_ratio
    (q, mantissa), (k_cache, _), (v_cache, _) = (as_loaded(x) for x in (args.q, args.k_cache, args.v_cache))
    rows, keys = tiles_for(head_size, head_size_v, max_rows)
    batch_prefill_v2_kernel[(triton.cdiv(max_rows, rows), num_kv_heads, args.seq_lens.shape[0])](
        q, k_cache, v_cache, args.block_table, args.query_start_loc, args.seq_lens,
        args.kv_indptr, args.kv_page_indices, args.kv_last_page_len,
        args.q_descale, args.k_scale, args.v_scale, args.kv_block_descale, args.alibi_slopes, args.sinks,
        args.out, args.lse, args.softmax_scale, args.logits_soft_cap,
        gqa_ratio, head_size, head_size_v, page_size_of(args.k_cache, args.layout), args.sliding_window,
        args.sink_tokens,
        *args.q.stride(), *args.out.stride(), *((0, 0) if args.lse is None else args.lse.stride()),
        0 if args.block_table is None else args.block_table.stride(0),
        k_strides.page, k_strides.slot, k_strides.head, k_strides.dim, k_strides.lane,
        v_strides.page, v_strides.slot, v_strides.head, v_strides.dim, v_strides.slot_lane,
        *((0, 0, 0) if args.kv_block_descale is None else args.kv_block_descale.stride()),
        VECTOR=k_strides.vector, SLOT_VECTOR=v_strides.slot_vector, MANTISSA=mantissa, CAUSAL=args.causal,
        HAS_SOFT_CAP=args.logits_soft_cap > 0,
        QUANTISED=args.kv_dtype != "auto", PER_PAGE_DESCALE=args.kv_block_descale is not None,
        BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        BLOCK_DV=max(16, triton.next_power_of_2(head_size_v)), num_stages=1,
    )  # fmt: skip
