"""The query rows of a tile: (token, head of the group) pairs of one sequence and one KV head, as a device function.

Invariant: the head runs fastest, so any GQA ratio fills a tile; rows behind the last query of the sequence are absent.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_rows(tile, query_start, query_len, kv_head, gqa_ratio, BLOCK_M: tl.constexpr):
    """Of each row of tile number `tile`, [BLOCK_M] each: the query within its sequence, whether it is present, its
    token (int64) and its query head.
    """
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // gqa_ratio
    token = (query_start + query).to(tl.int64)
    head = kv_head * gqa_ratio + row % gqa_ratio
    return query, query < query_len, token, head
