"""Sequences of a batch as slices of the packed tensors, and the keys that laws point queries at.

Invariant: tokens and keys are packed sequence after sequence; keys cover all positions [0, seq_len) of each, so a new
token at position p >= 0 is also key number key_start + p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from harness.case import Case, Rows
from harness.problem import random
from harness.problem.edges import edge_targets
from harness.problem.masks import Seen, to_seen, visible_range


@dataclass(frozen=True)
class Span:
    """Part of the new tokens of one sequence."""

    seq: int
    tokens: slice  # of the packed new tokens
    keys: slice  # of the packed keys: the whole sequence
    seq_len: int
    query_pos: torch.Tensor  # [tokens] int64


def key_start(rows: Rows) -> tuple[int, ...]:
    """Where the keys of each sequence start, and their total: num_seqs + 1 numbers."""
    return tuple(accumulate((max(s, 0) for s in rows.seq_lens), initial=0))


def spans(rows: Rows, device: torch.device | str, max_tokens: int | None = None) -> Iterator[Span]:
    """The batch, sequence after sequence, in spans of at most `max_tokens` tokens."""
    starts, first = key_start(rows), 0
    for seq, (query_len, context_len) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        step = max(query_len if max_tokens is None else max_tokens, 1)
        for begin in range(0, query_len, step):
            count = min(step, query_len - begin)
            yield Span(
                seq,
                slice(first + begin, first + begin + count),
                slice(starts[seq], starts[seq + 1]),
                context_len + query_len,
                torch.arange(context_len + begin, context_len + begin + count, device=device),
            )
        first += query_len


def pick_targets(case: Case, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """One seen key per (token, head), int64 [tokens, num_q_heads], and whether any key is seen, bool [tokens, 1].

    Tokens and heads take turns among: the query's own position, the last token of the page before, the first of its
    page, token 0, the newest and the oldest key in the window, both ends of a random page, a random key, and the last
    sink token where a case has some; clamped to what is seen. Where nothing is seen the target is 0. Law `needle_edges`
    has turns of its own: see harness.problem.edges.
    """
    device, page = span.query_pos.device, case.page_size
    pos = span.query_pos[:, None]  # [tokens, 1]
    first, end, sinks = visible_range(pos, span.seq_len, case.causal, case.sliding_window, case.sink_tokens)
    seen = end > first
    token = torch.arange(span.tokens.start, span.tokens.stop, device=device)[:, None]
    if case.data == "needle_edges":
        target = edge_targets(case, token, pos, Seen(first, end, sinks), span.seq_len)
        return torch.where(seen, target, torch.zeros_like(target)), seen
    turn = token + torch.arange(case.num_q_heads, device=device)  # [tokens, heads]
    draw = random.integers(case.data_seed, f"targets/{span.tokens.start}", turn.shape, 1 << 40, device)
    anywhere = first + draw % (end - first).clamp(min=1)  # [tokens, heads]
    page_start = pos.div(page, rounding_mode="floor") * page
    kinds = [
        pos, page_start - 1, page_start, torch.zeros_like(pos), end - 1, first,
        anywhere // page * page, anywhere // page * page + page - 1, anywhere,
        *([sinks - 1] if case.sink_tokens else []),
    ]  # fmt: skip
    candidates = torch.stack([kind.expand(turn.shape) for kind in kinds])  # [kinds, tokens, heads]
    target = candidates.gather(0, (turn % len(kinds))[None])[0]
    target = to_seen(target, Seen(first, end, sinks))
    return torch.where(seen, target, torch.zeros_like(target)), seen
