"""The online softmax of a tile of query rows: how a row starts, is rescaled and is stored.

Invariant: -inf as a row maximum means that nothing was seen yet; no step turns it into NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .payload import to_payload


@triton.jit
def initial_max_and_sum(sinks_ptr, head, present, BLOCK_M: tl.constexpr):
    """Row maximum and row sum before the first key: the sink is one more logit, and has no value row."""
    if sinks_ptr is not None:
        row_max = tl.load(sinks_ptr + head, mask=present, other=float("-inf")).to(tl.float32)
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    return row_max, row_sum


@triton.jit
def rescale(old_max, new_max):
    """exp(old_max - new_max), where -inf means "nothing seen yet" and gives 0, also against -inf."""
    return tl.exp(old_max - tl.where(new_max == float("-inf"), 0.0, new_max))


@triton.jit
def store_rows(
    acc,  # [BLOCK_M, BLOCK_DV] float32
    row_max,  # [BLOCK_M]
    row_sum,  # [BLOCK_M]
    token,  # [BLOCK_M] int64
    head,  # [BLOCK_M] query head
    present,  # [BLOCK_M] whether the row exists
    out_ptr,
    lse_ptr,
    output_scale_ptr,  # [1] float32 or None
    head_size_v,
    out_stride_token,
    out_stride_head,
    out_stride_dim,
    lse_stride_token,
    lse_stride_head,
    OUT_MANTISSA: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Normalise, scale and store; a row that saw neither key nor sink gets output 0 and LSE -inf."""
    dim = tl.arange(0, BLOCK_DV)
    empty = row_sum == 0.0
    out = acc / tl.where(empty, 1.0, row_sum)[:, None]
    offsets = (token * out_stride_token + head * out_stride_head)[:, None] + (dim * out_stride_dim)[None, :]
    mask = present[:, None] & (dim < head_size_v)[None, :]
    if output_scale_ptr is not None:
        out = out / tl.load(output_scale_ptr)
    tl.store(out_ptr + offsets, to_payload(out, out_ptr.dtype.element_ty, OUT_MANTISSA), mask=mask)
    if lse_ptr is not None:
        lse = tl.where(empty, float("-inf"), row_max + tl.log(tl.where(empty, 1.0, row_sum)))
        tl.store(lse_ptr + token * lse_stride_token + head * lse_stride_head, lse, mask=present)
