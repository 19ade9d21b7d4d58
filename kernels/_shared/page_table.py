"""Where a sequence finds its page ids and how long it is, from either form of page table, as a device function.

Invariant: only entries of the sequence at hand lie behind the pointer that is returned, up to its last live page.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pages_of_sequence(
    block_table_ptr,  # [num_seqs, max_pages] int32 or None
    table_stride,
    seq_lens_ptr,  # [num_seqs] int32; not used with a 1-D table
    kv_indptr_ptr,  # [num_seqs + 1] int32 or None
    kv_page_indices_ptr,  # [total pages] int32 or None
    kv_last_page_len_ptr,  # [num_seqs] int32 or None
    seq,
    page_size,
):
    """Pointer to the first page id, and the number of tokens in the pages."""
    if kv_indptr_ptr is None:
        pages = block_table_ptr + seq * table_stride
        seq_len = tl.load(seq_lens_ptr + seq)
    else:
        first = tl.load(kv_indptr_ptr + seq)
        whole = tl.load(kv_indptr_ptr + seq + 1) - first - 1
        pages = kv_page_indices_ptr + first
        seq_len = tl.maximum(whole, 0) * page_size + tl.load(kv_last_page_len_ptr + seq)
    return pages, seq_len
