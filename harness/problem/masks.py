"""Which keys a query sees, and the score modifiers that depend on positions.

Invariant: positions are absolute within a sequence; the query of new token i is at context_len + i and may be negative.
A key is seen when 0 <= key < seq_len, key <= query if causal, and query - key < window or key < sink_tokens if there is
a window (the window bounds the past only, also without a causal mask). So what a query sees is one range of keys and,
before it, the sink tokens that the window has left behind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Seen(NamedTuple):
    """Keys [first, end) and, disjoint from them, [0, sinks); int64 of one shape. Nothing where end <= first."""

    first: torch.Tensor
    end: torch.Tensor
    sinks: torch.Tensor


def visible(
    query_pos: torch.Tensor, key_pos: torch.Tensor, seq_len: int, causal: bool, window: int | None, sink_tokens: int
) -> torch.Tensor:
    """bool, the broadcast shape of `query_pos` and `key_pos` (both integer)."""
    first, end, sinks = visible_range(query_pos, seq_len, causal, window, sink_tokens)
    return ((key_pos >= first) & (key_pos < end)) | ((key_pos >= 0) & (key_pos < sinks))


def visible_range(query_pos: torch.Tensor, seq_len: int, causal: bool, window: int | None, sink_tokens: int) -> Seen:
    """What queries at `query_pos` see, each tensor shaped as `query_pos`."""
    first = torch.zeros_like(query_pos) if window is None else (query_pos - window + 1).clamp(min=0)
    end = (query_pos + 1).clamp(max=seq_len) if causal else torch.full_like(query_pos, seq_len)
    return Seen(first, end, first.clamp(max=max(min(sink_tokens, seq_len), 0)))


def to_seen(key: torch.Tensor, seen: Seen) -> torch.Tensor:
    """`key`, or where it is not seen the end of the window that is nearest; `seen` broadcasts against it."""
    inside = torch.minimum(torch.maximum(key, seen.first), seen.end - 1)
    return torch.where((key >= 0) & (key < seen.sinks), key, inside)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slopes of ALiBi (Press, Smith, Lewis 2021): 2^(-8 i / n), i = 1..n, for a power of two n.

    Other head counts take the slopes of the power of two below, then every other one of the power of two above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(below)
    return slopes if below == num_heads else slopes + _geometric(2 * below)[::2][: num_heads - below]


def _geometric(n: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8.0 * i / n) for i in range(1, n + 1))
