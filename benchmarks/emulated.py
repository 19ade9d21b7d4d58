"""Emulated kernels as contracts: roundings that no in-tree kernel has (fp8 P, sums after the cast, 16-bit partials).

Invariant: each rounds exactly where its profile declares it, in an order that the launch arguments pick.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from harness.cache.content import Content
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import FEATURES, Contract
from harness.kernel.numerics import NumericsProfile
from harness.kernel.registry import Launcher, find_kernels, load_entry
from references.attention import AttentionInputs
from tests.oracle.emulated_kernel import Schedule, run_emulated

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PROFILES = {
    "emulated": NumericsProfile(mma="mma_sync"),
    "emulated_fp8_p": NumericsProfile(p_dtype="fp8_e4m3", p_scale=256.0, mma="mma_sync"),
    "emulated_fp8_p_unscaled": NumericsProfile(p_dtype="fp8_e4m3", mma="mma_sync"),
    "emulated_sum_after_cast": NumericsProfile(sum_after_cast=True, mma="mma_sync"),
    "emulated_fp8_p_sum_after_cast": NumericsProfile(
        p_dtype="fp8_e4m3", p_scale=448.0, sum_after_cast=True, mma="mma_sync"
    ),
    "emulated_bf16_partials": NumericsProfile(split_partial_dtype="bf16", mma="mma_sync"),
    "emulated_fp8_out": NumericsProfile(out_dtype="fp8_e4m3", out_scale=2.0**-5, mma="mma_sync"),
}


Gather = Callable[[LaunchArguments, int, int], tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def gather() -> Gather:
    """K and V of one sequence through the page table, dequantised and rounded to the query dtype: the SDPA kernel's."""
    entry: Any = load_entry(replace(find_kernels()["torch_sdpa_paged"], entry="torch_sdpa_paged.py:gather"))
    function: Gather = entry
    return function


def gathered(args: LaunchArguments) -> tuple[AttentionInputs, list[int]]:
    """What `args` describe, as packed float32 keys and values; and where the query rows of each sequence start."""
    starts, seq_lens = args.query_start_loc.tolist(), [max(n, 0) for n in args.seq_lens.tolist()]
    pairs = [gather()(args, seq, seq_len) for seq, seq_len in enumerate(seq_lens)]
    inputs = AttentionInputs(
        q=args.q,
        k=torch.cat([k for k, _ in pairs]).float(),
        v=torch.cat([v for _, v in pairs]).float(),
        query_lens=tuple(b - a for a, b in itertools.pairwise(starts)),
        seq_lens=tuple(seq_lens),
        softmax_scale=args.softmax_scale,
        causal=args.causal,
        sliding_window=args.sliding_window or None,
        logits_soft_cap=args.logits_soft_cap or None,
        alibi_slopes=args.alibi_slopes,
        sinks=args.sinks,
    )
    return inputs, starts


def _launch(profile: NumericsProfile, args: LaunchArguments) -> None:
    schedule = Schedule(tile=64 if args.max_seq_len % 2 else 128, reverse=args.max_seq_len % 3 == 0)
    schedule = Schedule(schedule.tile, schedule.reverse, splits=max(args.num_splits, 1))
    out, lse = run_emulated(gathered(args)[0], profile, _DTYPES[args.q.dtype], schedule)
    args.out.copy_(out)
    assert args.lse is not None
    args.lse.copy_(lse)


EMULATED: tuple[tuple[Contract, Launcher], ...] = tuple(
    (
        Contract(
            name=name,
            about="float32 emulation in tiles, with an online softmax",
            entry="",
            content=Content.ALL,
            features=frozenset(FEATURES) - {"queries_before_keys"},
            descales_per=frozenset({"tensor", "page"}),
            numerics=profile,
        ),
        functools.partial(_launch, profile),
    )
    for name, profile in _PROFILES.items()
)
