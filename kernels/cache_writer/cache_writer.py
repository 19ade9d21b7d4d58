"""Reshape and cache: new tokens of K and V into the slots that slot_mapping names.

Invariant: one program owns the tokens of one tile and one KV head, so every element is stored once; a token with a
negative slot is neither loaded nor stored. Offsets are int64, from the slot to the element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernel.writer import WriterArguments

from .._shared.paged_tile import cache_offsets, key_strides, page_size_of, value_strides
from .._shared.payload import as_loaded, descales_of, to_payload

TOKENS = 16  # of a tile
_RUNTIME = (
    "k_ptr", "v_ptr", "slot_mapping_ptr", "k_cache_ptr", "v_cache_ptr", "k_descale_ptr", "v_descale_ptr",
    "num_tokens", "head_size", "head_size_v", "page_size", "k_new_stride_token",
    "k_new_stride_head", "v_new_stride_token", "v_new_stride_head", "k_stride_page", "k_stride_slot", "k_stride_head",
    "v_stride_page", "v_stride_head", "v_stride_slot_lane", "k_descale_page", "k_descale_slot",
    "k_descale_head", "v_descale_page", "v_descale_slot", "v_descale_head",
)  # fmt: skip
_INNERMOST = ("k_stride_dim", "k_stride_lane", "v_stride_slot", "v_stride_dim")


@triton.jit
def quantised(values, descale, ELEMENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Payload of `values`: a correctly rounded float32 quotient, to nearest even, held inside the range of ELEMENT."""
    payload = tl.math.div_rn(values.to(tl.float32), descale)
    if tl.int8 == ELEMENT:  # a sum with 1.5 * 2^23 is rounded to an integer
        payload = tl.minimum(tl.maximum(payload, -127.0), 127.0)
        return ((payload + 12582912.0) - 12582912.0).to(tl.int8)
    return to_payload(payload, ELEMENT, MANTISSA)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_INNERMOST)
def cache_writer_kernel(
    k_ptr,  # [num_tokens, num_kv_heads, head_size]
    v_ptr,  # [num_tokens, num_kv_heads, head_size_v]
    slot_mapping_ptr,  # [num_tokens] int64
    k_cache_ptr,
    v_cache_ptr,
    k_descale_ptr,  # float32, by its strides
    v_descale_ptr,
    num_tokens: tl.int32,
    head_size: tl.int32,
    head_size_v: tl.int32,
    page_size: tl.int32,
    k_new_stride_token: tl.int64,
    k_new_stride_head: tl.int64,
    v_new_stride_token: tl.int64,
    v_new_stride_head: tl.int64,
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
    VECTOR: tl.constexpr,
    SLOT_VECTOR: tl.constexpr,
    QUANTISED: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (token tiles, num_kv_heads)."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1)  # int64
    stored = slot >= 0
    page = tl.where(stored, slot, 0) // page_size
    offset = tl.where(stored, slot, 0) % page_size
    token = token.to(tl.int64)

    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    k_mask = stored[:, None] & (dim < head_size)[None, :]
    v_mask = stored[:, None] & (dim_v < head_size_v)[None, :]
    k_new = (token * k_new_stride_token + head * k_new_stride_head)[:, None] + dim[None, :]
    v_new = (token * v_new_stride_token + head * v_new_stride_head)[:, None] + dim_v[None, :]
    k = tl.load(k_ptr + k_new, mask=k_mask, other=0.0)
    v = tl.load(v_ptr + v_new, mask=v_mask, other=0.0)

    if QUANTISED:
        k_at = page * k_descale_page + offset * k_descale_slot + head * k_descale_head
        v_at = page * v_descale_page + offset * v_descale_slot + head * v_descale_head
        k_descale = tl.load(k_descale_ptr + k_at, mask=stored, other=1.0)[:, None]
        v_descale = tl.load(v_descale_ptr + v_at, mask=stored, other=1.0)[:, None]
        k = quantised(k, k_descale, k_cache_ptr.dtype.element_ty, MANTISSA)
        v = quantised(v, v_descale, v_cache_ptr.dtype.element_ty, MANTISSA)

    k_offsets = cache_offsets(
        page[:, None], offset[:, None], head, dim[None, :],
        k_stride_page, k_stride_slot, k_stride_head, k_stride_dim, k_stride_lane, VECTOR,
    )  # fmt: skip
    v_offsets = cache_offsets(
        page[:, None], offset[:, None], head, dim_v[None, :],
        v_stride_page, v_stride_slot, v_stride_head, v_stride_dim, 0, 1, v_stride_slot_lane, SLOT_VECTOR,
    )  # fmt: skip
    tl.store(k_cache_ptr + k_offsets, k, mask=k_mask)
    tl.store(v_cache_ptr + v_offsets, v, mask=v_mask)


def launch(args: WriterArguments) -> None:
    """Stores every token of `args.k` and `args.v` whose slot is not negative; launches cache_writer_kernel once."""
    num_tokens, num_kv_heads, head_size = args.k.shape
    head_size_v = args.v.shape[2]
    k_strides, v_strides = key_strides(args.k_cache, args.layout), value_strides(args.v_cache, args.layout)
    k_descale, v_descale = descales_of(args)
    (k_cache, mantissa), (v_cache, _) = as_loaded(args.k_cache), as_loaded(args.v_cache)
    cache_writer_kernel[(triton.cdiv(num_tokens, TOKENS), num_kv_heads)](
        args.k, args.v, args.slot_mapping, k_cache, v_cache, k_descale.tensor, v_descale.tensor,
        num_tokens, head_size, head_size_v, page_size_of(args.k_cache, args.layout),
        *args.k.stride()[:2], *args.v.stride()[:2],
        k_strides.page, k_strides.slot, k_strides.head, k_strides.dim, k_strides.lane,
        v_strides.page, v_strides.slot, v_strides.head, v_strides.dim, v_strides.slot_lane,
        k_descale.page, k_descale.slot, k_descale.head, v_descale.page, v_descale.slot, v_descale.head,
        VECTOR=k_strides.vector, SLOT_VECTOR=v_strides.slot_vector,
        QUANTISED=args.kv_dtype != "auto", MANTISSA=mantissa,
        BLOCK_T=TOKENS, BLOCK_D=triton.next_power_of_2(head_size), BLOCK_DV=triton.next_power_of_2(head_size_v),
    )  # fmt: skip
