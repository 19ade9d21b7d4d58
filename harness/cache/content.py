"""What the KV cache must hold at launch: the one place that tells prefill rows from decode rows.

Invariant: a kernel of class
  context    finds tokens [0, context_len) of every row in the cache; the new tokens arrive as k and v arguments;
  all        finds tokens [0, seq_len) of every row in the cache, the current token included, and nowhere else;
  by_phase   is `context` for prefill rows (query_len > 1) and `all` for decode rows (query_len == 1).
A cache writer finds `written`, which is `context` for every row, and stores the new tokens of all; what it leaves is
what a kernel of class `all` finds. No attention kernel has this class.
Getting this wrong is the set-up fault this project grew from: a decode row whose newest token is in no cache.
"""

from __future__ import annotations

from enum import Enum


class Content(str, Enum):
    CONTEXT = "context"
    ALL = "all"
    BY_PHASE = "by_phase"
    WRITTEN = "written"

    def cached_len(self, query_len: int, context_len: int) -> int:
        """Number of leading tokens of a row that the cache must hold at launch."""
        if self is Content.ALL or (self is Content.BY_PHASE and is_decode(query_len)):
            return max(context_len + query_len, 0)
        return max(context_len, 0)

    @property
    def takes_new_tokens(self) -> bool:
        """Whether new tokens arrive as separate k and v arguments: of prefill rows, or of all to a writer."""
        return self is not Content.ALL


def is_decode(query_len: int) -> bool:
    """A decode row has exactly one new token."""
    return query_len == 1


def phase(query_len: int) -> str:
    return "decode" if is_decode(query_len) else "prefill"
