"""Kernels with small faults of paging, and the honest one they are made from."""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.kernel.arguments import LaunchArguments


def honest(args: LaunchArguments) -> None:
    _attend(args, gain=0.0)


def drifting(args: LaunchArguments) -> None:
    """From the second page of a sequence on, V is a little too large."""
    _attend(args, gain=5e-4)


def one_page(args: LaunchArguments) -> None:
    """V of the second page of the first sequence is 0.6 % too large on KV head 1."""
    v_cache = args.v_cache.float()  # a copy: rounding to bfloat16 would hide the gain
    page = int(args.block_table[0, 1])
    v_cache[page, :, 1] *= 1.006
    _attend(replace(args, v_cache=v_cache), gain=0.0)


def broken_on_one_page(args: LaunchArguments) -> None:
    """Wrong where a sequence has one page only."""
    if args.max_seq_len <= args.k_cache.shape[1]:
        args.out.zero_()
    else:
        honest(args)


def _attend(args: LaunchArguments, gain: float) -> None:
    """Causal attention in float32 over a cache of layout linear_nhd that holds every token."""
    starts, page_size = args.query_start_loc.tolist(), args.k_cache.shape[1]
    group = args.q.shape[1] // args.k_cache.shape[2]
    for seq, seq_len in enumerate(args.seq_lens.tolist()):
        q = args.q[starts[seq] : starts[seq + 1]]  # [query_len, num_q_heads, head_size]
        position = torch.arange(seq_len)
        page = args.block_table[seq, position // page_size].long()
        k = args.k_cache[page, position % page_size].float().repeat_interleave(group, 1)
        v = args.v_cache[page, position % page_size].float().repeat_interleave(group, 1)
        v = v * (1 + gain * (position >= page_size))[:, None, None]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * args.softmax_scale
        seen = position <= torch.arange(seq_len - len(q), seq_len)[:, None]
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        args.out[starts[seq] : starts[seq + 1]] = torch.einsum("hqk,khd->qhd", p, v).to(args.out.dtype)
