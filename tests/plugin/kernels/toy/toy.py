"""Paged attention in plain torch: causal, all in the cache, linear_nhd."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from harness.kernel.arguments import LaunchArguments


def honest(args: LaunchArguments, dropped: int = 0) -> None:
    starts = args.query_start_loc.tolist()
    group = args.q.shape[1] // args.k_cache.shape[2]
    page_size = args.k_cache.shape[1]
    for seq, seq_len in enumerate(args.seq_lens.tolist()):
        q = args.q[starts[seq] : starts[seq + 1]]  # [query_len, num_q_heads, head_size]
        pages = args.block_table[seq, : -(-seq_len // page_size)].long()
        k = _tokens(args.k_cache, pages, seq_len, args.k_scale).repeat_interleave(group, 1)
        v = _tokens(args.v_cache, pages, seq_len, args.v_scale).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * args.softmax_scale
        keys = torch.arange(seq_len, device=q.device)
        position = keys[seq_len - len(q) :]
        seen = keys <= position[:, None] - dropped
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
        args.out[starts[seq] : starts[seq + 1]] = torch.einsum("hqk,khd->qhd", p, v)


def _tokens(cache: torch.Tensor, pages: torch.Tensor, seq_len: int, scale: torch.Tensor) -> torch.Tensor:
    """[seq_len, num_kv_heads, head_size] float32"""
    return cache[pages].flatten(0, 1)[:seq_len].float() * scale


def zeros(args: LaunchArguments) -> None:
    args.out.zero_()


def silent(args: LaunchArguments) -> None:
    pass


def forgetful(args: LaunchArguments) -> None:
    honest(args, dropped=1)


def greedy(args: LaunchArguments) -> None:
    honest(args)
    args.q.mul_(2)


def overrun(args: LaunchArguments) -> None:
    honest(args)
    behind = args.out.storage_offset() + args.out.numel()
    args.out.as_strided((1,), (1,), behind).fill_(1.0)


def raising(args: LaunchArguments) -> None:
    raise RuntimeError("no such instruction")


def skipping(args: LaunchArguments) -> None:
    pytest.skip("not today")


def quitting(args: LaunchArguments) -> None:
    sys.exit(0)


def segfaulting(args: LaunchArguments) -> None:
    ctypes.string_at(0)


def fenced(args: LaunchArguments) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    inside = -(-args.v_cache.data_ptr() // page) * page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(inside), ctypes.c_size_t(page), 0) == 0
    ctypes.string_at(inside + 8, 1)


def aborting(args: LaunchArguments) -> None:
    os.abort()


def spinning(args: LaunchArguments) -> None:
    while True:
        pass


def hungry(args: LaunchArguments) -> None:
    bytearray(1 << 62)


def gorging(args: LaunchArguments) -> None:
    torch.empty(1 << 60)


litter: list[int] = []  # what stumbling stumbles over: on purpose the state that kernels must not have


def littering(args: LaunchArguments) -> None:
    litter.append(1)
    honest(args)


def unsociable(args: LaunchArguments) -> None:
    Path("here").touch(exist_ok=False)
    time.sleep(1.5)
    honest(args)
    Path("here").unlink()


def wavering(args: LaunchArguments) -> None:
    litter.append(1)
    honest(args)
    if len(litter) % 2:
        args.out[1, 2, 3] = args.out[1, 2, 3].nextafter(torch.tensor(9.0))


def stumbling(args: LaunchArguments) -> None:
    if litter:
        ctypes.string_at(0)
    honest(args)


def exiting(args: LaunchArguments) -> None:
    os._exit(3)


def careless(args: LaunchArguments) -> None:
    torch.manual_seed(0)
    honest(args)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
