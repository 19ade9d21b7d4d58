"""A kernel of every layout, page table and stride that adds up in another order for some of them, when it is asked to.

Either order is right: the outputs differ by a rounding of float32, far within any tolerance.
"""

from __future__ import annotations

import torch

from harness.cache.layouts import by_slot
from harness.cache.page_table import page_ids
from harness.kernel.arguments import LaunchArguments


def honest(args: LaunchArguments) -> None:
    _attend(args, backwards=False)


def backwards_for_hnd(args: LaunchArguments) -> None:
    _attend(args, backwards=args.layout == "hnd")


def backwards_for_lists(args: LaunchArguments) -> None:
    _attend(args, backwards=args.block_table is None)


def backwards_for_padding(args: LaunchArguments) -> None:
    """Where a table has more entries than are needed."""
    table = args.kv_page_indices if args.block_table is None else args.block_table[0]
    needed = -(-args.max_seq_len // 16) if args.kv_indptr is None else int(args.kv_indptr[-1])
    _attend(args, backwards=table is not None and len(table) > needed)


def backwards_for_gaps(args: LaunchArguments) -> None:
    _attend(args, backwards=not args.k_cache.is_contiguous())


def refuses_hnd(args: LaunchArguments) -> None:
    if args.layout == "hnd":
        raise ValueError("heads first")
    _attend(args, backwards=False)


def _attend(args: LaunchArguments, *, backwards: bool) -> None:
    """Causal attention in float32 over a cache of pages of 16 tokens that holds every token."""
    starts, group = args.query_start_loc.tolist(), args.q.shape[1] // 2
    caches = [by_slot(cache, args.layout, which) for cache, which in ((args.k_cache, "k"), (args.v_cache, "v"))]
    for seq, seq_len in enumerate(args.seq_lens.tolist()):
        position = torch.arange(seq_len).flip(0) if backwards else torch.arange(seq_len)
        page = page_ids(args, seq, -(-seq_len // 16))[position // 16].long()
        k, v = (cache.load(page, position % 16).float().repeat_interleave(group, 1) for cache in caches)
        q = args.q[starts[seq] : starts[seq + 1]].float()  # [query_len, num_q_heads, head_size]
        scores = torch.einsum("qhd,khd->hqk", q, k) * args.softmax_scale
        seen = position <= torch.arange(seq_len - len(q), seq_len)[:, None]
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        args.out[starts[seq] : starts[seq + 1]] = torch.einsum("hqk,khd->qhd", p, v).to(args.out.dtype)
