"""Which keys a query sees, and the score modifiers that depend on positions.

Invariant: positions are absolute within a sequence; the query of new token i is at context_len + i and may be negative.
A key is seen when 0 <= key < seq_len, key <= query if causal, and query - key < window if there is a window (the window
bounds the past only, also without a causal mask).
"""

from __future__ import annotations

import torch


def visible(
    query_pos: torch.Tensor, key_pos: torch.Tensor, seq_len: int, causal: bool, window: int | None
) -> torch.Tensor:
    """bool, the broadcast shape of `query_pos` and `key_pos` (both integer)."""
    first, end = visible_range(query_pos, seq_len, causal, window)
    return (key_pos >= first) & (key_pos < end)


def visible_range(
    query_pos: torch.Tensor, seq_len: int, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """First seen key and one past the last, each shaped as `query_pos`; nothing is seen where end <= first."""
    first = torch.zeros_like(query_pos) if window is None else (query_pos - window + 1).clamp(min=0)
    end = (query_pos + 1).clamp(max=seq_len) if causal else torch.full_like(query_pos, seq_len)
    return first, end


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slopes of ALiBi (Press, Smith, Lewis 2021): 2^(-8 i / n), i = 1..n, for a power of two n.

    Other head counts take the slopes of the power of two below, then every other one of the power of two above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(below)
    return slopes if below == num_heads else slopes + _geometric(2 * below)[::2][: num_heads - below]


def _geometric(n: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8.0 * i / n) for i in range(1, n + 1))
