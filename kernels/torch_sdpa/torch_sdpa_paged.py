"""torch.nn.functional.scaled_dot_product_attention over a paged KV cache that holds every token.

Invariant: only slots of live tokens are ever indexed, so what lies behind the last token may be anything. K and V are
dequantised and rounded to the dtype of the case as the other kernels do; from there on everything is float32 (the mask,
too: an ALiBi bias rounded to a 16-bit mask would be one more rounding) until the output is rounded once. The descale of
an 8-bit query multiplies the scores.

The math backend is asked for by name: on CUDA the fused float32 kernels would run on TF32 matrix units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from harness.kernel.arguments import LaunchArguments


def launch(args: LaunchArguments) -> None:
    """Attention over the cache only (`args.k` and `args.v` are not used); writes `args.out`. Needs torch only."""
    starts, seq_lens = args.query_start_loc.tolist(), args.seq_lens.tolist()
    for seq, seq_len in enumerate(seq_lens):
        rows = slice(starts[seq], starts[seq + 1])
        if rows.start < rows.stop:
            out = _attend(args, seq, args.q[rows], max(seq_len, 0), seq_len - (rows.stop - rows.start))
            args.out[rows] = _stored(args, out)


def _stored(args: LaunchArguments, out: torch.Tensor) -> torch.Tensor:
    """float32 `out` of any shape in the dtype of the output; 8 bits saturate."""
    if args.output_scale is None:
        return out.to(args.out.dtype)
    largest = torch.finfo(args.out.dtype).max
    return (out / args.output_scale).clamp(-largest, largest).to(args.out.dtype)


def gather(args: LaunchArguments, seq: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K [seq_len, num_kv_heads, head_size] and V [.., head_size_v] of one sequence, in the dtype of the case."""
    page_size = page_size_of(args)
    position = torch.arange(seq_len, device=args.q.device)  # [seq_len]
    page = _pages(args, seq)[position // page_size].long()  # [seq_len]
    slot = position % page_size  # [seq_len]
    pair = []
    for kind, cache in enumerate((args.k_cache, args.v_cache)):
        stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache  # 8-bit floats are not indexable
        tokens = stored[_slots(args.layout, kind, page, slot, stored)].flatten(2)  # [seq_len, num_kv_heads, d]
        if args.kv_dtype != "auto":
            tokens = (tokens.view(cache.dtype).float() * _descale(args, kind, page, slot)).to(args.compute_dtype)
        pair.append(tokens)
    return pair[0], pair[1]


def page_size_of(args: LaunchArguments) -> int:
    if args.layout == "linear_3d":
        return 1
    return args.k_cache.shape[{"linear_nhd": 1, "hnd": 2}.get(args.layout, 3)]


def _pages(args: LaunchArguments, seq: int) -> torch.Tensor:
    """Page ids of one sequence and what is behind them, int32 [entries]."""
    if args.block_table is not None:
        return args.block_table[seq]
    assert args.kv_indptr is not None
    assert args.kv_page_indices is not None
    return args.kv_page_indices[args.kv_indptr[seq] :]


def _slots(layout: str, kind: int, page: torch.Tensor, slot: torch.Tensor, cache: torch.Tensor) -> tuple[Any, ...]:
    """Index of the slots (`page`, `slot`) [n] in K (`kind` 0) or V (1): [n, num_kv_heads, ...dims]."""
    every = slice(None)
    if layout == "vectorized" and kind:
        x = cache.shape[4]
        return page, every, slot // x, every, slot % x
    return {
        "linear_nhd": (page, slot),
        "linear_3d": (page,),
        "hnd": (page, every, slot),
        "vllm_classic": (page, every, every, slot),
        "vectorized": (page, every, every, slot),
    }[layout]


def _descale(args: LaunchArguments, kind: int, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Of K (`kind` 0) or V of the tokens at `page`, `slot` [seq_len]: broadcasts against [seq_len, num_kv_heads, d]."""
    by_token = (args.k_token_descale, args.v_token_descale)[kind]
    if by_token is not None:
        return by_token[page, slot][..., None]
    if args.kv_block_descale is not None:
        return args.kv_block_descale[page, :, kind, None]
    return (args.k_scale, args.v_scale)[kind][:, None]  # of each head, or of all


def visible_keys(args: LaunchArguments, distance: torch.Tensor) -> torch.Tensor:
    """Which keys a query sees, from distance = key position - query position, [query_len, seq_len]."""
    seen = torch.ones_like(distance, dtype=torch.bool)
    if args.causal:
        seen &= distance <= 0
    if args.sliding_window > 0:
        sink = torch.arange(distance.shape[1], device=distance.device) < args.sink_tokens  # [seq_len]
        seen &= (-distance < args.sliding_window) | sink
    return seen


def _attend(args: LaunchArguments, seq: int, q: torch.Tensor, seq_len: int, context_len: int) -> torch.Tensor:
    """Output [query_len, num_q_heads, head_size_v] of one sequence in float32, from q [query_len, num_q_heads, d]."""
    query_len, num_q_heads, _ = q.shape
    scale = args.softmax_scale * (1.0 if args.q_descale is None else float(args.q_descale))
    keys, values = gather(args, seq, seq_len)
    gqa_ratio = num_q_heads // keys.shape[1]
    q = q.float().transpose(0, 1)  # [num_q_heads, query_len, head_size]
    k = keys.float().transpose(0, 1).repeat_interleave(gqa_ratio, 0)  # [num_q_heads, seq_len, head_size]
    v = values.float().transpose(0, 1).repeat_interleave(gqa_ratio, 0)  # [num_q_heads, seq_len, head_size_v]

    query_pos = context_len + torch.arange(query_len, device=q.device)  # [query_len]
    distance = torch.arange(seq_len, device=q.device) - query_pos[:, None]  # [query_len, seq_len]
    seen = visible_keys(args, distance)
    bias = torch.zeros(num_q_heads, query_len, seq_len, device=q.device)
    if args.logits_soft_cap > 0:
        # SDPA cannot cap its scores: they are computed here, and SDPA adds its own (0, from a query of zeros) to them.
        cap = args.logits_soft_cap
        bias += cap * torch.tanh((q @ k.transpose(1, 2)) * scale / cap)
        q = torch.zeros_like(q)
    if args.alibi_slopes is not None:
        bias += args.alibi_slopes[:, None, None] * distance
    bias.masked_fill_(~seen, float("-inf"))
    if args.sinks is not None:  # one more key: a row of zeros, whose logit is the sink, with a value of zeros
        k, v = torch.nn.functional.pad(k, (0, 0, 0, 1)), torch.nn.functional.pad(v, (0, 0, 0, 1))
        bias = torch.cat([bias, args.sinks.view(-1, 1, 1).expand(-1, query_len, 1)], dim=2)

    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    # A row that sees no key is a softmax over nothing: 0 by definition, whatever SDPA makes of it.
    return out.masked_fill(~seen.any(1)[:, None], 0.0).transpose(0, 1)
