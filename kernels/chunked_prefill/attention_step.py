"""One step of online softmax over a tile of keys, as Triton device functions shared by prefill and decode.

Invariant: scores, maxima, sums and accumulators are float32; only P is rounded, to the dtype of V, right before P @ V;
a row that has seen no key keeps maximum -inf, sum 0 and accumulator 0, and no step turns that into NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._shared.paged_tile import cache_offsets, soft_cap
from .._shared.payload import payload_values

NUM_WARPS = 8
NUM_STAGES = 1  # page-table indirection leaves nothing to pipeline


class Tiling(NamedTuple):
    """Compile-time sizes of a launch. Head sizes are padded to powers of two, their loads and stores masked."""

    queries: int  # per tile (prefill)
    keys: int  # per tile
    head_size: int
    head_size_v: int


def tiling(head_size: int, head_size_v: int, element_size: int) -> Tiling:
    """Sizes that keep a program within 227 KB of shared memory. float32 products take no matrix unit: fewer queries."""
    padded, padded_v = (max(16, triton.next_power_of_2(d)) for d in (head_size, head_size_v))
    row_bytes = max(padded, padded_v) * element_size
    keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 2048 else 16
    queries = 64 if element_size == 2 else 32 if row_bytes <= 2048 else 16
    return Tiling(queries, keys, padded, padded_v)


@triton.jit
def load_cached(
    cache_ptr,
    scale_ptr,  # float32 of each KV head, or of all; read for quantised payloads only
    page,  # [keys] page ids
    slot,  # [keys]
    keep,  # [keys] bool: keys that exist
    kv_head,
    dim,  # [dims]
    head_size,
    stride_page,
    stride_slot,
    stride_head,
    stride_dim,
    stride_lane,
    stride_scale,  # 0 where one scale is for all heads
    VECTOR: tl.constexpr,
    QUANTISED: tl.constexpr,
    MANTISSA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[keys, dims] of K or V in DTYPE, 0 where key or dim does not exist. Quantised: payload * scale in float32."""
    offset = cache_offsets(
        page[:, None],
        slot[:, None],
        kv_head.to(tl.int64),
        dim[None, :],
        stride_page,
        stride_slot,
        stride_head,
        stride_dim,
        stride_lane,
        VECTOR,
    )
    tile = tl.load(cache_ptr + offset, mask=keep[:, None] & (dim < head_size)[None, :], other=0.0)
    if QUANTISED:
        tile = payload_values(tile, MANTISSA) * tl.load(scale_ptr + kv_head * stride_scale)
    return tile.to(DTYPE)


@triton.jit
def masked_scores(
    q,  # [queries, dims]
    k,  # [keys, dims]
    seen,  # [queries, keys] bool
    distance,  # [queries, keys] key position - query position
    slope,  # [queries or 1, 1] float32, None without ALiBi
    softmax_scale,
    cap,
    HAS_SOFT_CAP: tl.constexpr,
):
    """[queries, keys] float32 logits, -inf where not seen. Order: product, scale, soft cap, bias, mask."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale
    if HAS_SOFT_CAP:
        scores = soft_cap(scores, cap)
    if slope is not None:
        scores += slope * distance
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def fold(scores, v, row_max, row_sum, acc):
    """Fold scores [queries, keys] and v [keys, dims] into row_max, row_sum [queries] and acc [queries, dims]."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf would be NaN
    p = tl.exp(scores - shift[:, None])
    rescale = tl.exp(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def finish(row_max, row_sum, acc):
    """Output [queries, dims] and natural-log LSE [queries]; 0 and -inf for a row that saw nothing."""
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc / divisor[:, None], row_max + tl.log(divisor)
