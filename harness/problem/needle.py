"""Needles: queries whose softmax is exactly one on a chosen key, so that the output is that key's value to the bit.

Invariant: for every (token, head), the score of the target exceeds the score of every other seen key, 0 and the sink by
at least 120, ALiBi included; exp(-120) is far below the unit roundoff of float32. Gaps are measured on the keys as the
cache stores them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.case import Case
from harness.dtypes import element_type
from harness.errors import LawError
from harness.problem.masks import visible
from harness.problem.payload import payload_of
from harness.problem.spans import Span, pick_targets, spans

GAP = 120.0
_MARGIN = 160.0  # what is aimed at: GAP, and a third more for the rounding of dequantised keys
_GRID = 64.0  # keys are multiples of 1 / 64 below 4: exact in every 16-bit dtype, their products exact in float64
_CHUNK = 1 << 24  # scores at a time


def snap_keys(case: Case, k: torch.Tensor) -> torch.Tensor:
    """Keys of equal length sqrt(head_size), on a coarse grid: the dtype and shape of `k` [num_keys, kv_heads, d].

    Equal lengths make each key its own best match: k_t . k_t > k_t . k_j.
    """
    fixed = (k.to(torch.float32) * 1024.0).round().to(torch.int64)  # integers: exact sums in any order
    square = (fixed * fixed).sum(dim=-1, keepdim=True).clamp(min=1).to(torch.float64) * 2.0**-20
    longer = torch.sqrt(torch.full_like(square, float(case.head_size)) / square)
    unit = k.to(torch.float64) * longer
    return ((unit * _GRID).round() / torch.full_like(unit, _GRID)).clamp(-3.984375, 3.984375).to(k.dtype)


def stored_as(case: Case, k: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
    """The payload that the cache will hold for `k`: float64 [num_keys, kv_heads, d], in units of `descale`, which
    broadcasts against it.
    """
    if case.kv_dtype == "auto":
        return k.to(torch.float64)
    return payload_of(k, descale, element_type(case.stored_dtype)).to(torch.float64)


def needle_queries(
    case: Case,
    payload: torch.Tensor,
    descale: torch.Tensor,
    softmax_scale: float,
    slopes: Sequence[float] | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    """Power-of-two multiples of the stored target keys: [num_tokens, num_q_heads, head_size] in the dtype of the case,
    and 1; 8-bit queries are the target keys as they are stored, and the descale that makes every one of them needle
    enough.

    `payload` [num_keys, kv_heads, d] float64 (see stored_as) times `descale` ([1, 1, 1], or [num_keys, kv_heads, 1]
    where each page has its own) is what kernels see; `sinks` [num_q_heads] or None. Queries that see nothing are 0.
    Raises LawError where two seen keys are stored alike, or where the query leaves the range of its dtype.
    """
    device, heads = payload.device, case.num_q_heads
    element = element_type(case.dtype)
    q = torch.zeros((case.rows.num_tokens, heads, case.head_size), dtype=torch.float64, device=device)
    enough = 0.0
    slope = torch.zeros(heads) if slopes is None else torch.tensor(slopes, dtype=torch.float32)
    slope = slope.to(device=device, dtype=torch.float64)
    rival = torch.zeros_like(slope)  # [heads] a key of zeros where none should be, or the sink: ALiBi touches neither
    if sinks is not None:
        rival = torch.maximum(rival, sinks.to(torch.float64))
    powers = torch.tensor([2.0**e for e in range(-40, 128)], dtype=torch.float64, device=device)
    longest = max(case.rows.seq_lens)
    # One descale for all is left out of the products, which stay exact in float64.
    unit, stored = (float(descale), payload) if descale.numel() == 1 else (1.0, payload * descale)
    for span in spans(case.rows, device, max(1, _CHUNK // (heads * max(longest, 1)))):
        if span.seq_len <= 0:
            continue
        target, seen = pick_targets(case, span)  # [tokens, heads], [tokens, 1]
        keys = stored[span.keys]  # [keys, kv_heads, d]
        chosen = payload[span.keys][target, torch.arange(heads, device=device) // case.gqa_ratio]  # [tokens, heads, d]
        dots = _dots(chosen, keys)  # [tokens, heads, keys]
        own = dots.gather(2, target[:, :, None])[:, :, 0]  # [tokens, heads]
        needed = _needed(case, span, target, dots, own, slope)
        bias = slope * (target - span.query_pos[:, None])  # [tokens, heads]
        needed = torch.maximum(needed, (_MARGIN + rival - bias) / own)
        needed = needed / torch.full_like(own, unit * softmax_scale)
        needed = torch.where(seen, needed, torch.zeros_like(needed))
        _refuse_twins(span, needed, target)
        if case.q_dtype != "auto":
            q[span.tokens] = torch.where(seen[:, :, None], chosen, torch.zeros_like(chosen))
            enough = max(enough, float(needed.max()))
            continue
        factor = powers[torch.searchsorted(powers, needed.contiguous()).clamp(max=len(powers) - 1)]  # [tokens, heads]
        query = torch.where(seen[:, :, None], chosen * factor[:, :, None], torch.zeros_like(chosen))
        _refuse_overflow(span, query, element.largest, case.dtype)
        q[span.tokens] = query
    if case.q_dtype != "auto":  # keys of that type, exactly; a little more than enough is no 1
        return q.to(element_type(case.q_dtype).torch), float(torch.tensor(enough * 1.25 or 0.5))
    return q.to(element.torch), 1.0


def _dots(chosen: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products of `chosen` [tokens, heads, d] with `keys` [keys, kv_heads, d] of their group: [tokens, heads, keys]."""
    tokens, heads, dim = chosen.shape
    grouped = chosen.view(tokens, keys.shape[1], -1, dim).transpose(0, 1)  # [kv_heads, tokens, group, d]
    dots = grouped.flatten(1, 2) @ keys.permute(1, 2, 0)  # [kv_heads, tokens * group, keys]
    return dots.view(*grouped.shape[:3], -1).transpose(0, 1).reshape(tokens, heads, -1)


def _needed(
    case: Case, span: Span, target: torch.Tensor, dots: torch.Tensor, own: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """Factor on the target key that opens the gap, before scales: float64 [tokens, heads]; inf where none does.

    `dots` [tokens, heads, keys], `own` and `target` [tokens, heads], `slope` [heads].
    """
    position = torch.arange(span.seq_len, device=dots.device)
    gap = own[:, :, None] - dots  # [tokens, heads, keys]
    rivals = visible(
        span.query_pos[:, None, None], position, span.seq_len, case.causal, case.sliding_window, case.sink_tokens
    )
    rivals = rivals & (position != target[:, :, None])
    wanted = _MARGIN + slope[:, None] * (position - target[:, :, None])
    none = torch.full_like(gap, float("inf"))
    factor = torch.where(gap > 0, wanted / gap, none)
    return torch.where(rivals, factor, torch.zeros_like(gap)).amax(dim=2)


def _refuse_twins(span: Span, needed: torch.Tensor, target: torch.Tensor) -> None:
    if not bool(torch.isinf(needed).any()):
        return
    token, head = torch.isinf(needed).nonzero()[0].tolist()
    raise LawError(
        f"needle: sequence {span.seq}, head {head}: no query singles out the key at position "
        f"{int(target[token, head])}, "
        f"as another seen key is stored as close to it as itself; use a larger head_size or shorter rows"
    )


def _refuse_overflow(span: Span, query: torch.Tensor, largest: float, dtype: str) -> None:
    size = query.abs().amax(dim=2)  # [tokens, heads]
    if float(size.max()) <= largest:
        return
    token, head = divmod(int(size.argmax()), size.shape[1])
    raise LawError(
        f"needle: sequence {span.seq}, query {token}, head {head} would need elements of {float(size.max()):.3g}, "
        f"beyond {largest:g}, the end of {dtype}"
    )
