"""Batch prefill as it is called: V3 where it can be, V2 otherwise.

Invariant: exactly one of the two is launched, the one that v3_conditions names.
"""

from __future__ import annotations

import torch

from harness.dispatch.batch_prefill import BatchPrefillFacts
from harness.kernel.arguments import LaunchArguments

from .._shared.paged_tile import page_size_of
from . import batch_prefill_v2, batch_prefill_v3
from .v3_conditions import V3_CONDITIONS, V3_KERNEL

_WORDS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
}


def launch(args: LaunchArguments) -> None:
    """Attention over the cache only; writes `args.out` and `args.lse`."""
    decision = V3_CONDITIONS.decide(_facts(args))
    version = batch_prefill_v3 if V3_KERNEL in decision.kernels else batch_prefill_v2
    version.launch(args)


def _facts(args: LaunchArguments) -> BatchPrefillFacts:
    return BatchPrefillFacts(
        arch="",
        q_dtype=_WORDS[args.q.dtype],
        k_dtype=_WORDS[args.k_cache.dtype],
        v_dtype=_WORDS[args.v_cache.dtype],
        layout=args.layout,
        page_size=page_size_of(args.k_cache, args.layout),
        sliding_window=args.sliding_window,
        logits_soft_cap=args.logits_soft_cap,
        alibi=args.alibi_slopes is not None,
        sinks=args.sinks is not None,
        sink_tokens=args.sink_tokens,
        descales_per_page=args.kv_block_descale is not None,
    )
