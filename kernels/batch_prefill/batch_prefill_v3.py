"""Batch prefill, third version: fp8 queries, keys and values, tiles of keys pipelined two deep, descales folded.

Invariant: a tile of keys and its descales are loaded together, two tiles ahead, into a slot that is used up before it
is filled again; so the descales that a tile meets are those of its own page, also where the next one lies in another.

The K descale is folded into the row maximum: products of payloads are never scaled one by one, but inside the exponent,
exp2(s * factor - maximum). The maximum is lowered by SHIFT, so that P in [0, 2^SHIFT] uses the range of fp8. The
V descale is folded into the rescaling: the accumulator is kept in units of the V descale of the tile at hand.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from harness.kernel.arguments import LaunchArguments

from .._shared.page_table import pages_of_sequence
from .._shared.paged_tile import cache_offsets, key_strides, num_heads_of, page_size_of, value_strides
from .._shared.query_tile import query_rows
from .._shared.softmax_rows import store_rows

SHIFT = tl.constexpr(8.0)  # 2^8 is the largest power of two within e4m3fn, whose largest value is 448
LN2 = tl.constexpr(math.log(2))
BLOCK_N = 64  # keys of a tile; with descales by page a tile must lie inside one
_RUNTIME = (
    "q_ptr", "k_cache_ptr", "v_cache_ptr", "block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr", "kv_indptr_ptr",
    "kv_page_indices_ptr", "kv_last_page_len_ptr", "q_descale_ptr", "k_scale_ptr", "v_scale_ptr",
    "kv_block_descale_ptr", "out_ptr", "lse_ptr", "gqa_ratio", "head_size", "head_size_v", "page_size",
    "q_stride_token", "q_stride_head", "out_stride_token", "out_stride_head", "lse_stride_token", "lse_stride_head",
    "table_stride", "k_stride_page", "k_stride_slot", "k_stride_head", "v_stride_page", "v_stride_slot",
    "v_stride_head", "descale_stride_page", "descale_stride_head", "descale_stride_kind",
)  # fmt: skip
_INNERMOST = ("q_stride_dim", "out_stride_dim", "k_stride_dim", "v_stride_dim")


@triton.jit
def load_keys(
    k_cache_ptr,
    table,
    tile_start,
    end_key,
    page_size,
    kv_head,
    dim,  # [BLOCK_D]
    head_size,
    stride_page: tl.int64,
    stride_slot: tl.int64,
    stride_head: tl.int64,
    stride_dim: tl.int64,
    BLOCK_N: tl.constexpr,
):
    """Pages [BLOCK_N] of the keys of a tile, and their payload [BLOCK_D, BLOCK_N]; 0 from end_key on."""
    key = tile_start + tl.arange(0, BLOCK_N)
    live = key < end_key
    page = tl.load(table + key // page_size, mask=live, other=0)
    offsets = cache_offsets(
        page[None, :], (key % page_size)[None, :], kv_head, dim[:, None],
        stride_page, stride_slot, stride_head, stride_dim, 0, 1,
    )  # fmt: skip
    return page, tl.load(k_cache_ptr + offsets, mask=live[None, :] & (dim < head_size)[:, None], other=0.0)


@triton.jit
def load_descales(
    k_scale_ptr,
    v_scale_ptr,
    kv_block_descale_ptr,
    table,
    tile_start,
    end_key,
    page_size,
    kv_head,
    stride_page: tl.int64,
    stride_head: tl.int64,
    stride_kind: tl.int64,
):
    """Descales of K and V of a tile, which lies in one page; behind the last tile they are those of the last."""
    if kv_block_descale_ptr is None:
        k_descale = tl.load(k_scale_ptr)
        v_descale = tl.load(v_scale_ptr)
    else:
        some = end_key > 0
        page = tl.load(table + tl.minimum(tile_start, end_key - 1) // page_size, mask=some, other=0)
        entry = kv_block_descale_ptr + page.to(tl.int64) * stride_page + kv_head * stride_head
        k_descale = tl.load(entry, mask=some, other=1.0)
        v_descale = tl.load(entry + stride_kind, mask=some, other=1.0)
    return k_descale, v_descale


@triton.jit
def consume(
    q,  # [BLOCK_M, BLOCK_D] fp8 payload
    k,  # [BLOCK_D, BLOCK_N] fp8 payload
    page,  # [BLOCK_N]
    tile_start,
    k_descale,
    v_descale,
    unit,  # V descale that acc is in units of
    row_max,  # [BLOCK_M] of logits in base 2, lowered by SHIFT
    row_sum,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_DV]
    query_pos,  # [BLOCK_M]
    end_key,
    logit_scale,  # softmax scale * log2(e) * descale of q
    v_cache_ptr,
    page_size,
    kv_head,
    dim_v,  # [BLOCK_DV]
    head_size_v,
    stride_page: tl.int64,
    stride_slot: tl.int64,
    stride_head: tl.int64,
    stride_dim: tl.int64,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of keys: new row maximum, row sum and accumulator."""
    key = tile_start + tl.arange(0, BLOCK_N)
    factor = logit_scale * k_descale
    products = tl.dot(q, k)  # [BLOCK_M, BLOCK_N] of payloads
    seen = key[None, :] < end_key
    if CAUSAL:
        seen = seen & (key[None, :] <= query_pos[:, None])
    products = tl.where(seen, products, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(products, 1) * factor - SHIFT)  # a descale is above 0
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(products * factor - base[:, None])
    alpha = tl.exp2(row_max - base)
    row_sum = row_sum * alpha + tl.sum(p, 1)

    offsets = cache_offsets(
        page[:, None], (key % page_size)[:, None], kv_head, dim_v[None, :],
        stride_page, stride_slot, stride_head, stride_dim, 0, 1,
    )  # fmt: skip
    # 0 * NaN is NaN: values behind the last token must not be loaded, a zero weight does not hide them.
    v = tl.load(v_cache_ptr + offsets, mask=(key < end_key)[:, None] & (dim_v < head_size_v)[None, :], other=0.0)
    acc = acc * (alpha * (unit / v_descale))[:, None] + tl.dot(p.to(v.dtype), v)
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_INNERMOST)
def batch_prefill_v3_kernel(
    q_ptr,  # [num_tokens, num_q_heads, head_size] fp8
    k_cache_ptr,  # [pages, page_size, num_kv_heads, head_size] fp8
    v_cache_ptr,  # [pages, page_size, num_kv_heads, head_size_v] fp8
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
    out_ptr,  # [num_tokens, num_q_heads, head_size_v]
    lse_ptr,  # [num_tokens, num_q_heads] float32 or None
    softmax_scale_log2: tl.float32,  # softmax scale * log2(e)
    gqa_ratio: tl.int32,
    head_size: tl.int32,
    head_size_v: tl.int32,
    page_size: tl.int32,
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
    v_stride_page: tl.int64,
    v_stride_slot: tl.int64,
    v_stride_head: tl.int64,
    v_stride_dim: tl.int64,
    descale_stride_page: tl.int64,
    descale_stride_head: tl.int64,
    descale_stride_kind: tl.int64,
    CAUSAL: tl.constexpr,
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
    end_key = seq_len
    if CAUSAL:
        last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // gqa_ratio, query_len - 1)
        end_key = tl.minimum(seq_len, context_len + last_query + 1)

    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    q_offsets = (token * q_stride_token + head * q_stride_head)[:, None] + (dim * q_stride_dim)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=present[:, None] & (dim < head_size)[None, :], other=0.0)
    logit_scale = softmax_scale_log2 * tl.load(q_descale_ptr)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Slots a and b hold the tiles at `start` and one behind it.
    page_a, k_a = load_keys(
        k_cache_ptr, table, 0, end_key, page_size, kv_head, dim, head_size,
        k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, BLOCK_N,
    )  # fmt: skip
    k_descale_a, v_descale_a = load_descales(
        k_scale_ptr, v_scale_ptr, kv_block_descale_ptr, table, 0, end_key, page_size, kv_head,
        descale_stride_page, descale_stride_head, descale_stride_kind,
    )  # fmt: skip
    page_b, k_b = load_keys(
        k_cache_ptr, table, BLOCK_N, end_key, page_size, kv_head, dim, head_size,
        k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, BLOCK_N,
    )  # fmt: skip
    k_descale_b, v_descale_b = load_descales(
        k_scale_ptr, v_scale_ptr, kv_block_descale_ptr, table, BLOCK_N, end_key, page_size, kv_head,
        descale_stride_page, descale_stride_head, descale_stride_kind,
    )  # fmt: skip
    unit = v_descale_a

    for start in range(0, end_key, 2 * BLOCK_N):
        page_next, k_next = load_keys(
            k_cache_ptr, table, start + 2 * BLOCK_N, end_key, page_size, kv_head, dim, head_size,
            k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, BLOCK_N,
        )  # fmt: skip
        k_descale_next, v_descale_next = load_descales(
            k_scale_ptr, v_scale_ptr, kv_block_descale_ptr, table, start + 2 * BLOCK_N, end_key, page_size, kv_head,
            descale_stride_page, descale_stride_head, descale_stride_kind,
        )  # fmt: skip
        row_max, row_sum, acc = consume(
            q, k_a, page_a, start, k_descale_a, v_descale_a, unit,
            row_max, row_sum, acc, query_pos, end_key, logit_scale, v_cache_ptr, page_size, kv_head, dim_v, head_size_v,
            v_stride_page, v_stride_slot, v_stride_head, v_stride_dim, CAUSAL, BLOCK_N,
        )  # fmt: skip
        unit = v_descale_a
        page_a, k_a, k_descale_a, v_descale_a = page_next, k_next, k_descale_next, v_descale_next

        page_next, k_next = load_keys(
            k_cache_ptr, table, start + 3 * BLOCK_N, end_key, page_size, kv_head, dim, head_size,
            k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, BLOCK_N,
        )  # fmt: skip
        k_descale_next, v_descale_next = load_descales(
            k_scale_ptr, v_scale_ptr, kv_block_descale_ptr, table, start + 3 * BLOCK_N, end_key, page_size, kv_head,
            descale_stride_page, descale_stride_head, descale_stride_kind,
        )  # fmt: skip
        row_max, row_sum, acc = consume(
            q, k_b, page_b, start + BLOCK_N, k_descale_b, v_descale_b, unit,
            row_max, row_sum, acc, query_pos, end_key, logit_scale, v_cache_ptr, page_size, kv_head, dim_v, head_size_v,
            v_stride_page, v_stride_slot, v_stride_head, v_stride_dim, CAUSAL, BLOCK_N,
        )  # fmt: skip
        unit = v_descale_b
        page_b, k_b, k_descale_b, v_descale_b = page_next, k_next, k_descale_next, v_descale_next

    store_rows(
        acc * unit, row_max * LN2, row_sum, token, head, present, out_ptr, lse_ptr, None, head_size_v,
        out_stride_token, out_stride_head, out_stride_dim, lse_stride_token, lse_stride_head, 0, BLOCK_DV,
    )  # fmt: skip


def launch(args: LaunchArguments) -> None:
    """Attention of fp8 queries over an fp8 cache; writes `args.out` and `args.lse` by one batch_prefill_v3_kernel."""
    _, num_q_heads, head_size = args.q.shape
    num_kv_heads = num_heads_of(args.k_cache, args.layout)
    gqa_ratio = num_q_heads // num_kv_heads
    k_strides, v_strides = key_strides(args.k_cache, args.layout), value_strides(args.v_cache, args.layout)
    max_rows = args.max_query_len * gqa_ratio
    # At most 32 rows: larger tiles go to warp-group instructions, whose accumulators of fp8 products keep 13 bits.
    rows = 16 if max_rows <= 16 else 32
    batch_prefill_v3_kernel[(triton.cdiv(max_rows, rows), num_kv_heads, args.seq_lens.shape[0])](
        args.q, args.k_cache, args.v_cache, args.block_table, args.query_start_loc, args.seq_lens,
        args.kv_indptr, args.kv_page_indices, args.kv_last_page_len,
        args.q_descale, args.k_scale, args.v_scale, args.kv_block_descale, args.out, args.lse,
        args.softmax_scale * math.log2(math.e), gqa_ratio, head_size, args.out.shape[2],
        page_size_of(args.k_cache, args.layout),
        *args.q.stride(), *args.out.stride(), *((0, 0) if args.lse is None else args.lse.stride()),
        0 if args.block_table is None else args.block_table.stride(0),
        k_strides.page, k_strides.slot, k_strides.head, k_strides.dim,
        v_strides.page, v_strides.slot, v_strides.head, v_strides.dim,
        *((0, 0, 0) if args.kv_block_descale is None else args.kv_block_descale.stride()),
        CAUSAL=args.causal, BLOCK_M=rows, BLOCK_N=BLOCK_N, BLOCK_D=max(32, triton.next_power_of_2(head_size)),
        BLOCK_DV=max(16, triton.next_power_of_2(args.out.shape[2])), num_stages=1,
    )  # fmt: skip
