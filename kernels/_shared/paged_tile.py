"""Addressing of a paged KV cache, visibility and score modifiers, as Triton device functions.

Invariant: every offset is computed in int64, and both layouts go through the same formula, so that a strided view of a
cache costs nothing and a pool beyond 2^31 elements is addressed right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class CacheStrides(NamedTuple):
    """Element strides of one cache tensor by meaning. `vector` is x, the innermost vector of K in vllm_classic."""

    page: int
    slot: int
    head: int
    dim: int  # of dim // vector
    lane: int  # of dim % vector
    vector: int


def key_strides(k_cache: torch.Tensor, layout: str) -> CacheStrides:
    """Strides of K: linear_nhd [pages, page, heads, d] or vllm_classic [pages, heads, d/x, page, x]."""
    s = k_cache.stride()
    if layout == "linear_nhd":
        return CacheStrides(s[0], s[1], s[2], s[3], 0, 1)
    return CacheStrides(page=s[0], slot=s[3], head=s[1], dim=s[2], lane=s[4], vector=k_cache.shape[4])


def value_strides(v_cache: torch.Tensor, layout: str) -> CacheStrides:
    """Strides of V: linear_nhd [pages, page, heads, dv] or vllm_classic [pages, heads, dv, page]."""
    s = v_cache.stride()
    if layout == "linear_nhd":
        return CacheStrides(s[0], s[1], s[2], s[3], 0, 1)
    return CacheStrides(page=s[0], slot=s[3], head=s[1], dim=s[2], lane=0, vector=1)


def page_size_of(k_cache: torch.Tensor, layout: str) -> int:
    return k_cache.shape[1] if layout == "linear_nhd" else k_cache.shape[3]


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
):
    """Element offset of (page, slot, kv_head, dim); shapes broadcast, the result is int64."""
    offset = page.to(tl.int64) * stride_page + slot.to(tl.int64) * stride_slot + kv_head * stride_head
    dim = dim.to(tl.int64)
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
