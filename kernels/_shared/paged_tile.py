"""Addressing of a paged KV cache, visibility and score modifiers, as Triton device functions.

Invariant: every offset is computed in int64, and all layouts go through the same formula, so that a strided view of a
cache costs nothing and a pool beyond 2^31 elements is addressed right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class CacheStrides(NamedTuple):
    """Element strides of one cache tensor by meaning; `vector`, `slot_vector`: x where dims, slots are split."""

    page: int
    slot: int  # of slot // slot_vector
    head: int
    dim: int  # of dim // vector
    lane: int = 0  # of dim % vector
    vector: int = 1
    slot_lane: int = 0  # of slot % slot_vector
    slot_vector: int = 1


def key_strides(k_cache: torch.Tensor, layout: str) -> CacheStrides:
    """Strides of K; vllm_classic and vectorized: [pages, heads, d/x, page, x]. ValueError for an unknown layout."""
    if layout in ("vllm_classic", "vectorized"):
        page, head, dim, slot, lane = k_cache.stride()
        return CacheStrides(page, slot, head, dim, lane, k_cache.shape[4])
    return _whole_strides(k_cache, layout)


def value_strides(v_cache: torch.Tensor, layout: str) -> CacheStrides:
    """Strides of V; vllm_classic: [pages, heads, dv, page], vectorized: [pages, heads, page/x, dv, x]."""
    if layout == "vllm_classic":
        page, head, dim, slot = v_cache.stride()
        return CacheStrides(page, slot, head, dim)
    if layout == "vectorized":
        page, head, slot, dim, slot_lane = v_cache.stride()
        return CacheStrides(page, slot, head, dim, slot_lane=slot_lane, slot_vector=v_cache.shape[4])
    return _whole_strides(v_cache, layout)


def _whole_strides(cache: torch.Tensor, layout: str) -> CacheStrides:
    """linear_nhd [pages, page, heads, d], linear_3d [pages, heads, d] (one slot), hnd [pages, heads, page, d]."""
    s = cache.stride()
    if layout == "linear_nhd":
        return CacheStrides(s[0], s[1], s[2], s[3])
    if layout == "linear_3d":
        return CacheStrides(s[0], 0, s[1], s[2])
    if layout == "hnd":
        return CacheStrides(s[0], s[2], s[1], s[3])
    raise ValueError(f"unknown layout {layout}")


def page_size_of(k_cache: torch.Tensor, layout: str) -> int:
    if layout == "linear_3d":
        return 1
    return k_cache.shape[{"linear_nhd": 1, "hnd": 2}.get(layout, 3)]


def num_heads_of(k_cache: torch.Tensor, layout: str) -> int:
    return k_cache.shape[2 if layout == "linear_nhd" else 1]


@triton.jit
def cache_offsets(
    page,  # int, any shape that broadcasts against dim
    slot,
    kv_head,
    dim,
    stride_page: tl.int64,
    stride_slot: tl.int64,
    stride_head: tl.int64,
    stride_dim: tl.int64,
    stride_lane: tl.int64,
    VECTOR: tl.constexpr,
    stride_slot_lane=0,
    SLOT_VECTOR: tl.constexpr = 1,
):
    """Element offset of (page, slot, kv_head, dim); shapes broadcast, the result is int64."""
    slot = slot.to(tl.int64)
    dim = dim.to(tl.int64)
    offset = page.to(tl.int64) * stride_page + kv_head * stride_head
    offset += (slot // SLOT_VECTOR) * stride_slot + (slot % SLOT_VECTOR) * stride_slot_lane
    return offset + (dim // VECTOR) * stride_dim + (dim % VECTOR) * stride_lane


@triton.jit
def soft_cap(scores, cap):
    """cap * tanh(scores / cap); tanh through exp, whose overflow to inf still gives -1."""
    return cap * (2.0 / (1.0 + tl.exp(-2.0 * (scores / cap))) - 1.0)


@triton.jit
def visible(query_pos, key_pos, num_keys, window, CAUSAL: tl.constexpr, sink_tokens=0):
    """Which keys a query sees: 0 <= key < num_keys, key <= query if causal, and of these the last `window` (0: all) and
    the first `sink_tokens`.
    """
    seen = (key_pos >= 0) & (key_pos < num_keys)
    if CAUSAL:
        seen = seen & (key_pos <= query_pos)
    return seen & ((window <= 0) | (query_pos - key_pos < window) | (key_pos < sink_tokens))
